"""The demo of a published model: its rows, that one set serves every k where nothing guides, and its sentence."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from handful.demo import mnist
from handful.demo.compared import means
from handful.demo.mnist import COLUMNS, METHODS, UNGUIDED, answer, demo, entries


@pytest.mark.slow
def test_every_method_and_k_has_one_finite_row_and_a_picture_from_one_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "KS", (2, 3))
    monkeypatch.setattr(mnist, "STEPS", 10)
    monkeypatch.setattr(mnist, "METHODS", {name: METHODS[name] for name in ("none", "cfg", "auto")})
    rows = demo(tmp_path / "out", seeds=1, per_class=8)
    assert [(row["method"], row["k"]) for row in rows] == [(entry.method, entry.k) for entry in entries()]
    assert all(math.isfinite(row[column]) for row in rows for column in COLUMNS)
    of = {(row["method"], row["k"]): row for row in rows}
    for method in UNGUIDED:
        assert of[method, 2]["utility"] == of[method, 3]["utility"]
    assert {folder.name for folder in (tmp_path / "out" / "seed-0").iterdir()} == {*UNGUIDED, *(f"auto-k{k}" for k in (2, 3))}
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 3 * 56
    assert demo(tmp_path / "out", seeds=1, per_class=8) == rows


def test_the_sentence_names_the_best_method_of_the_smallest_k():
    rows = [
        {"method": method, "scale": 0.0, "k": k, **dict.fromkeys(COLUMNS, 0.5), "both": both, "exemplars": 0.8}
        for method, both in (("none", 0.91), ("cfg", 0.89), ("auto", 0.93))
        for k in mnist.KS
    ]
    text = answer(means(rows, COLUMNS))
    assert "With 2 real images" in text
    assert "80.0 %" in text
    assert "auto on 93.0 %" in text
