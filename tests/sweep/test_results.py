"""Rows, gains and means, against numbers computed by hand."""

from __future__ import annotations

import pytest
from support.sweeps import digits_sweep, made_up

from handful.errors import RequestError
from handful.sweep.columns import gained, numbers
from handful.sweep.planned import Setting, completed, planned_sets
from handful.sweep.results import against_baseline, means, parquet_of, read_results, rows_of


def record(planned, coverage, frechet, seconds):
    found = {"coverage": coverage, "frechet": frechet, "judge_accuracy": None}
    return {
        "recipe": planned.recipe.as_dict(),
        "images": 16,
        "seconds": seconds,
        "flops_ratio": 1.5,
        "measured": {"validation": found, "test": {**found, "coverage": coverage - 0.1}},
    }


@pytest.fixture(scope="module")
def sets(digits):
    return planned_sets(completed(digits_sweep(digits, seeds=[0, 1])))


def test_gains_and_ratios_are_against_the_baseline_of_the_same_seed_and_half(sets):
    records = {each.name: record(each, 0.5 + 0.1 * place, 2.0 + place, 4.0 + place) for place, each in enumerate(sets)}
    rows = rows_of(sets, records, "none")
    assert [(row["seed"], row["method"], row["scale"], row["split"]) for row in rows[:4]] == [
        (0, "none", 0.0, "validation"),
        (0, "none", 0.0, "test"),
        (0, "chamfer", 0.1, "validation"),
        (0, "chamfer", 0.1, "test"),
    ]
    last = rows[-1]  # place 5; its baseline is place 3
    assert (last["seed"], last["scale"], last["split"]) == (1, 0.3, "test")
    assert last["coverage"] == pytest.approx(0.9)
    assert last["gain_coverage"] == pytest.approx(0.2)
    assert last["gain_frechet"] == pytest.approx(5.0 - 7.0), "a larger distance is a loss"
    assert last["frechet_ratio"] == pytest.approx(7.0 / 5.0)
    assert last["cost_ratio"] == pytest.approx(9.0 / 7.0)
    assert last["gain_judge_accuracy"] is None, "what was not measured gains nothing"
    assert [row["gain_coverage"] for row in rows if row["method"] == "none"] == [0.0] * 4


def test_without_the_baselines_set_there_are_rows_but_no_gains(sets):
    rows = rows_of(sets, {sets[1].name: record(sets[1], 0.5, 2.0, 4.0)}, "none")
    assert [row["split"] for row in rows] == ["validation", "test"]
    assert (rows[0]["coverage"], rows[0]["gain_coverage"], rows[0]["cost_ratio"]) == (0.5, None, None)


def test_a_set_that_is_generated_but_not_measured_has_no_row(sets):
    assert rows_of(sets, {sets[0].name: {**record(sets[0], 0.5, 2.0, 4.0), "measured": None}}, "none") == []


def test_every_column_that_can_gain_has_its_gain():
    assert set(against_baseline({}, {})) == {f"gain_{name}" for name in gained()} | {"frechet_ratio", "robust_frechet_ratio"}
    assert set(against_baseline({}, {})) <= set(numbers())


def test_parquet_gives_the_rows_back_and_the_same_bytes_for_the_same_rows(tmp_path):
    rows = made_up({("none", 0.0, 0): {"coverage": [0.5, 0.7]}, ("cfg", 2.0, 0): {"coverage": [0.25, 1 / 3]}})
    (tmp_path / "results.parquet").write_bytes(parquet_of(rows))
    assert read_results(tmp_path / "results.parquet") == rows
    assert parquet_of([dict(row) for row in rows]) == parquet_of(rows)


def test_columns_of_a_newer_judge_are_kept_beside_the_known_ones(tmp_path):
    rows = made_up({("none", 0.0, 0): {"coverage": [0.5]}})
    (tmp_path / "results.parquet").write_bytes(parquet_of([{**rows[0], "novelty": 0.25}, rows[1]]))
    found = read_results(tmp_path / "results.parquet")
    assert [row["novelty"] for row in found] == [0.25, None]


def test_a_damaged_file_of_results_is_a_request_error(tmp_path):
    (tmp_path / "results.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RequestError, match="can't be read"):
        read_results(tmp_path / "results.parquet")


def test_means_and_spreads_are_over_the_seeds_of_one_half():
    rows = made_up({("cfg", 2.0, 0): {"coverage": [0.2, 0.4, 0.9], "f1": [0.5, 0.5, 0.5]}}, test={"coverage": 0.1})
    found = means(rows, "validation")[Setting("cfg", 2.0, 0)]
    assert found.mean["coverage"] == pytest.approx(0.5)
    assert found.spread["coverage"] == pytest.approx(((0.3**2 + 0.1**2 + 0.4**2) / 2) ** 0.5), "of a sample of three"
    assert found.spread["f1"] == 0.0
    assert (found.mean["utility"], found.spread["utility"]) == (None, None)
    assert means(rows, "test")[Setting("cfg", 2.0, 0)].mean["coverage"] == pytest.approx(0.6)


def test_a_column_that_one_seed_lacks_has_no_mean():
    """A mean over the other seeds would be compared with means over all."""
    rows = made_up({("cfg", 2.0, 0): {"coverage": [0.2, 0.4]}})
    rows[0]["coverage"] = None
    assert means(rows, "validation")[Setting("cfg", 2.0, 0)].mean["coverage"] is None


def test_one_seed_has_no_spread():
    found = means(made_up({("cfg", 2.0, 0): {"coverage": [0.2]}}), "test")[Setting("cfg", 2.0, 0)]
    assert (found.mean["coverage"], found.spread["coverage"], found.seeds) == (0.2, None, (0,))
