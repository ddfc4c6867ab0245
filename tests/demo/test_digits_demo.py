"""The demo: its rows, its pictures, and that it goes on where it was interrupted."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from handful.demo import digits
from handful.demo.compared import means, table_of
from handful.demo.digits import COLUMNS, ENTRIES, HEADLINE, demo
from handful.errors import RequestError
from handful.judge.measure import Training
from handful.recipe.schema import recipe_from

FEW = [ENTRIES[0], HEADLINE]


@pytest.fixture(scope="module")
def small(tmp_path_factory):  # less of each kind than the demo has
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "ENTRIES", FEW)
        patch.setattr(digits, "TRAINING", Training(steps=10, augment=False))
        yield out, demo(out, seeds=1, per_class=8)


@pytest.mark.slow
def test_every_method_and_k_has_one_finite_row(small):
    out, rows = small
    assert [(r["method"], r["scale"], r["k"]) for r in rows] == [(e.method, e.scale, e.k) for e in FEW]
    numbers = torch.tensor([[row[column] for column in COLUMNS] for row in rows], dtype=torch.float64)
    assert numbers.isfinite().all()
    assert json.loads((out / "results.json").read_text()) == rows


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_and_repeats_nothing(small):
    out, rows = small
    (out / "results.json").write_text(json.dumps(rows[:-1]))
    again = demo(out, seeds=1, per_class=8)
    assert again[:-1] == rows[:-1], "rows that were there stay as they were"
    assert again[-1] == rows[-1], "the last one is measured again on the same images, whose sampling took what it took"


@pytest.mark.slow
def test_the_contact_sheet_shows_exemplars_above_generated_digits(small):
    out, _ = small
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 64
        assert sheet.height > 10 * 2 * 64


@pytest.mark.slow
def test_a_demo_of_other_settings_is_refused(small):
    out, _ = small
    with pytest.raises(RequestError, match="other settings"):
        demo(out, seeds=1, per_class=16)


def test_a_directory_with_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="holds no demo"):
        demo(tmp_path, seeds=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("options", "field"), [({"seeds": 0}, "seeds"), ({"per_class": 4}, "per_class")])
def test_settings_without_sense_are_refused_before_anything_is_written(tmp_path, options, field):
    with pytest.raises(RequestError, match=field):
        demo(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_means_and_spreads_are_those_of_the_seeds():
    base = {"method": "none", "scale": 0.0, "k": 0, **dict.fromkeys(COLUMNS, 0.5)}
    (mean,) = means([{**base, "seed": 0, "coverage": 0.2}, {**base, "seed": 1, "coverage": 0.4}], COLUMNS)
    assert mean["coverage"] == pytest.approx(0.3)
    assert mean["coverage_spread"] == pytest.approx(0.2 / 2**0.5), "standard deviation of a sample of two"
    assert means([{**base, "seed": 0}], COLUMNS)[0]["coverage_spread"] is None


def test_the_table_shows_spreads_only_where_there_are_seeds_and_no_column_that_nobody_measured():
    mean = {"method": "cfg", "scale": 1.0, "k": 0, "seeds": 3, "coverage": 0.5, "coverage_spread": 0.01, "utility": None}
    shown = table_of("t", [mean], {"coverage": "C", "utility": "U"}, ())
    assert shown.headings == ["method", "C"]
    assert shown.rows == [["cfg w=1", "0.500 ±0.010"]]
    assert table_of("t", [mean | {"seeds": 1, "coverage_spread": None}], {"coverage": "C"}, ()).rows[0][1] == "0.500"


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_entry_is_a_recipe(entry):
    guidance = recipe_from({"model": {"name": "digits"}, **entry.says}).guidance or ()
    assert bool(guidance) == (entry.method != "none")
