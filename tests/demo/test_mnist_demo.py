"""The demo of a published model: its rows, that one set serves every k where nothing guides, and its sentence."""

from __future__ import annotations

import json
import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
from PIL import Image

from handful.demo import mnist
from handful.demo.mnist import COLUMNS, METHODS, answer, demo, entries
from handful.guidance.inversion import Embeddings
from handful.recipe.inverting import FittedWith


@pytest.mark.slow
def test_every_method_and_k_has_one_finite_row_and_a_picture_from_one_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "KS", (2, 3))
    monkeypatch.setattr(mnist, "STEPS", 10)
    monkeypatch.setattr(mnist, "METHODS", {name: METHODS[name] for name in ("none", "crdi", "sdedit+others")})
    monkeypatch.setattr(mnist, "UNGUIDED", ("none",))
    few = [entry for entry in entries(8) if (entry.method, entry.k) != ("crdi", 3)]
    monkeypatch.setattr(mnist, "entries", lambda per_class: few)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    rows = demo(tmp_path / "out", seeds=1, per_class=8)
    assert [(row["method"], row["k"]) for row in rows] == [(entry.method, entry.k) for entry in few]
    for row in rows:  # of a guided set beside more exemplars the accuracy alone is not measured
        unmeasured = {"utility"} if (row["method"], row["k"]) == ("sdedit+others", 3) else set()
        assert row["images"] == 80
        assert {column for column in COLUMNS if row[column] is None} == unmeasured
        assert all(math.isfinite(row[column]) for column in COLUMNS if column not in unmeasured)
    of = {(row["method"], row["k"]): row for row in rows}
    assert of["none", 2]["utility"] == of["none", 3]["utility"]
    assert of["none", 2]["seconds"] == of["none", 3]["seconds"] > 0, "one set was made, at one cost"
    sets = {folder.name: folder for folder in (tmp_path / "out" / "seed-0").iterdir()}
    assert set(sets) == {"none", "crdi-k2", "sdedit+others-k2", "sdedit+others-k3"}
    fitted = Embeddings.load(sets["crdi-k2"] / "7.safetensors")
    assert (len(fitted), FittedWith.of(fitted).label) == (2, 7), "class by class, from the k exemplars"
    assert len(list((sets["crdi-k2"] / "7" / "images" / "7").glob("*.png"))) == 8
    manifest = pq.read_table(sets["sdedit+others-k2"] / "manifest.parquet", columns=["class", "cohort"]).to_pylist()
    halves = Counter((each["class"], each["cohort"]) for each in manifest)
    assert set(halves.values()) == {4}, "each setting of the mixture makes half of the eight"
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 56
    page = (tmp_path / "out" / "report.html").read_text()
    assert "sdedit+others-k2: a report" in page, "the headline is the first"
    for made in ("report", "evaluate"):  # it is there
        monkeypatch.setattr(mnist, made, lambda *_, **__: None)
    assert demo(tmp_path / "out", seeds=1, per_class=8) == rows
    (tmp_path / "out" / "results.json").write_text(json.dumps(rows[:3]))
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert demo(tmp_path / "out", seeds=1, per_class=8) == rows, "one process or two, resumed or not: the same, seconds too"


def said(plain: float, best: float, spread: float | None = None) -> str:
    """The answer of a demo in which auto leads where `best` is above `plain`."""
    rows = [
        {"method": method, "scale": 0.0, "k": k, "exemplars": 0.8, "both": both, "both_spread": spread}
        for method, both in (("none", plain), ("cfg", 0.89), ("auto", best))
        for k in mnist.KS
    ]
    return answer(rows)


def test_the_sentence_names_the_best_method_of_the_smallest_k_and_what_chance_does():
    text = said(0.91, 0.95)
    assert "With 2 real images" in text
    assert "80.0 %" in text
    assert "auto is highest with 95.0 %, 4.0 points above plain images, where chance makes up to 2.8." in text
    assert "up to 2.8: no method is shown to be better." in said(0.91, 0.92)
    assert "no method is shown" in said(0.91, 0.95, spread=0.02), "the spread between seeds counts where it is larger"
    assert "no method is better than no guidance" in said(0.91, 0.90)
