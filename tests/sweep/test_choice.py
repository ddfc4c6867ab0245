"""The choice, on rows made by hand whose answer is known."""

from __future__ import annotations

import pytest
from support.sweeps import digits_sweep, made_up

from handful.sweep.choice import best_at_each_k, choose
from handful.sweep.outputs import chosen_yaml
from handful.sweep.planned import Setting, completed, planned_sets
from handful.sweep.printed import choice_table, results_table

NONE, LOW, HIGH, FEW = (
    Setting("none", 0.0, 0),
    Setting("chamfer", 0.1, 32),
    Setting("chamfer", 0.3, 32),
    Setting("chamfer", 0.1, 2),
)


def rows_of(values, test=None):
    return made_up({(s.method, s.scale, s.k): columns for s, columns in values.items()}, test)


def asked(digits, **changes):
    return digits_sweep(digits, **{"objective": "coverage", **changes})


def test_the_best_mean_on_the_validation_half_wins_whatever_the_test_half_says(digits):
    rows = rows_of({NONE: {"coverage": [0.50, 0.60]}, LOW: {"coverage": [0.70, 0.80]}, HIGH: {"coverage": [0.65, 0.75]}})
    for row in rows:
        if row["split"] == "test":
            row["coverage"] = {"none": 0.9}.get(row["method"], row["coverage"] - 0.05)
    choice = choose(rows, asked(digits))
    assert choice.best is not None
    assert choice.best.setting == LOW
    assert choice.best.validation.mean["coverage"] == pytest.approx(0.75)
    assert choice.best.test is not None
    assert choice.best.test.mean["coverage"] == pytest.approx(0.70), "the half that had no say reports"
    assert {name: pick.setting for name, pick in choice.methods.items()} == {"none": NONE, "chamfer": LOW}


def test_the_lead_is_the_mean_of_the_differences_seed_by_seed(digits):
    """Seeds move both settings alike (0.1 between them), yet the difference is 0.05 at each: far beyond its spread."""
    rows = rows_of({NONE: {"coverage": [0.5, 0.6]}, LOW: {"coverage": [0.70, 0.80]}, HIGH: {"coverage": [0.65, 0.75]}})
    choice = choose(rows, asked(digits))
    assert choice.best is not None
    lead = choice.best.lead
    assert lead is not None
    assert (lead.runner_up, lead.within_spread) == (HIGH, False)
    assert lead.gap == pytest.approx(0.05)
    assert lead.spread == pytest.approx(0.0, abs=1e-12)
    assert choice.over_methods is not None
    assert (choice.over_methods.runner_up, choice.over_methods.gap) == (NONE, pytest.approx(0.2))


def test_a_lead_that_another_seed_may_change_is_within_the_spread(digits):
    rows = rows_of({NONE: {"coverage": [0.5, 0.5]}, LOW: {"coverage": [0.9, 0.6]}, HIGH: {"coverage": [0.6, 0.8]}})
    choice = choose(rows, asked(digits))
    assert choice.best is not None
    lead = choice.best.lead
    assert lead is not None
    assert lead.gap == pytest.approx((0.3 - 0.2) / 2)
    assert lead.spread == pytest.approx(0.5 / 2**0.5)
    assert lead.within_spread is True
    said = [cell for row in choice_table(choice).rows for cell in row]
    assert "within the spread" in said


def test_one_seed_says_nothing_of_the_spread(digits):
    choice = choose(rows_of({NONE: {"coverage": [0.5]}, LOW: {"coverage": [0.6]}}), asked(digits))
    assert choice.best is not None
    assert choice.best.lead is not None
    assert choice.best.lead.within_spread is None
    assert choice.methods["none"].lead is None, "a method's only setting leads nothing"
    assert any("spread unknown" in row for row in choice_table(choice).rows)


def test_lower_distances_are_better(digits):
    rows = rows_of({NONE: {"frechet": [3.0, 3.2]}, LOW: {"frechet": [2.0, 2.6]}, HIGH: {"frechet": [2.4, 2.5]}})
    choice = choose(rows, asked(digits, objective="frechet"))
    assert choice.best is not None
    assert choice.best.setting == LOW
    assert choice.best.lead is not None
    assert choice.best.lead.gap == pytest.approx(0.15), "positive: so much lower"


def test_settings_beyond_the_bounds_are_passed_over_with_the_reason(digits):
    rows = rows_of(
        {
            NONE: {"coverage": [0.5], "cost_ratio": [1.0]},
            LOW: {"coverage": [0.8], "cost_ratio": [1.15]},
            HIGH: {"coverage": [0.9], "cost_ratio": [1.2]},
        }
    )
    choice = choose(rows, asked(digits, within={"cost_ratio": 1.15}))
    assert choice.best is not None
    assert choice.best.setting == LOW
    assert choice.passed_over == {HIGH: "cost_ratio is 1.2, above 1.15"}
    nothing = choose(rows, asked(digits, within={"copied": 0.1}))
    assert (nothing.best, nothing.methods) == (None, {})
    assert nothing.passed_over[NONE] == "copied is not known"
    assert "nothing can be chosen" in choice_table(nothing).notes
    assert nothing.as_dict()["best"] is None


def test_of_equals_the_first_in_the_plan_is_taken(digits):
    rows = rows_of({NONE: {"coverage": [0.5]}, HIGH: {"coverage": [0.5]}, LOW: {"coverage": [0.5]}})
    choice = choose(rows, asked(digits))
    assert choice.best is not None
    assert (choice.best.setting, choice.methods["chamfer"].setting) == (NONE, HIGH)


def test_at_each_k_the_validation_half_chooses_the_scale(digits):
    rows = rows_of({NONE: {"coverage": [0.5]}, LOW: {"coverage": [0.6]}, HIGH: {"coverage": [0.7]}, FEW: {"coverage": [0.4]}})
    assert best_at_each_k(rows, asked(digits)) == {"none": {0: NONE}, "chamfer": {2: FEW, 32: HIGH}}


def test_the_table_marks_each_methods_best_and_the_best_of_all(digits):
    rows = rows_of({NONE: {"coverage": [0.5]}, LOW: {"coverage": [0.6]}, HIGH: {"coverage": [0.7]}})
    request = asked(digits)
    lines = [row[0] for row in results_table(rows, request, choose(rows, request)).rows]
    assert lines == ["*  none", "   chamfer 0.1 k=32", "** chamfer 0.3 k=32"]


def test_the_chosen_recipe_is_the_sets_own_with_what_speaks_for_it(digits):
    request = completed(asked(digits))
    rows = made_up({("none", 0.0, 0): {"coverage": [0.5]}, ("chamfer", 0.3, 4): {"coverage": [0.75]}}, test={"coverage": 0.1})
    text = chosen_yaml(choose(rows, request), planned_sets(request))
    assert text.startswith("# Chosen by handful sweep: chamfer 0.3 k=4")
    assert "coverage 0.750" in text
    assert "coverage 0.850" in text
