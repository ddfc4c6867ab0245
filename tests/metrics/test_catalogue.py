"""The one table of metrics: a row from outside is measured, judged again, compared and swept without another change."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.halves import Halves, some, write

from handful import console
from handful.cli import app
from handful.metrics import catalogue
from handful.metrics.catalogue import Metric
from handful.sweep.columns import headings, improvement, numbers
from handful.sweep.results import against_baseline

TOY = Metric(
    "spread",
    "spread",
    lambda sets: float(sets.generated.std()),
    lower_is_better=True,
    redraw=lambda sets, counts: counts @ sets.generated.std(1) / counts.sum(1),
)


def test_a_row_from_outside_is_in_the_json_the_gains_and_a_sweeps_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "METRICS", (*catalogue.METRICS, TOY))
    halves = Halves()
    made, other = (write(tmp_path / name, *some(halves, first, first + 4)) for name, first in (("made", 0), ("other", 4)))
    real = write(tmp_path / "real", halves.images, halves.labels, per_class=4)
    asked = ["evaluate", made, "--real", real, "--judge", "pixels", "--neighbours", 3, "--no-ceiling", "--json", "-q"]
    assert console.answer(app, [str(each) for each in (*asked, "--baseline", f"other={other}")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spread"] == found["pooled"]["generated"]["spread"] > 0
    assert found["robust_spread"] == pytest.approx(np.mean([each["spread"] for each in found["transformed"].values()]))
    gain = found["gains"]["other"]["metrics"]["spread"]
    assert gain["gain"] == pytest.approx(gain["baseline"] - gain["value"])
    assert gain["interval"] is not None
    assert {"spread", "robust_spread", "gain_spread", "gain_robust_spread"} <= set(numbers())
    assert headings()["robust_spread"] == "rob.spread"
    assert against_baseline({"spread": 1.0}, {"spread": 3.0})["gain_spread"] == improvement("spread", 1.0, 3.0) == 2.0


def test_metrics_beyond_the_usual_are_measured_when_they_are_asked_for():
    names = [metric.name for metric in catalogue.chosen(["cmmd"])]
    assert "cmmd" in names
    assert "kernel_distance" not in names
    with pytest.raises(ValueError, match=r"there is no such metric\. Did you mean 'cmmd'"):
        catalogue.chosen(["cmd"])
