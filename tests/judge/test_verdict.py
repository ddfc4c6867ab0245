"""The verdict's words follow the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from handful.judge.verdict import kind_of, verdict


def found(real: dict[str, float] | None = None, **values: Any) -> dict[str, Any]:
    real = {"precision": 0.96, "coverage": 0.95, "judge_accuracy": 0.9} if real is None else real
    return {"pooled": {"ceiling": real}, **values}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"precision": 0.94, "coverage": 0.90, "judge_accuracy": 0.88},
            "Good: they look like the real ones (precision 0.940; real images 0.960), and they show",
        ),
        (
            {"precision": 0.94, "coverage": 0.60},
            "Fair: they lack some of the variety (coverage 0.600; real images 0.950). What is good: they look like the",
        ),
        ({"precision": 0.04, "coverage": 0.01}, "Bad: most do not look like the real ones"),
        ({"precision": 0.94, "coverage": 0.90, "judge_accuracy": 0.22}, "Bad: most do not show their class (accuracy 0.220"),
        (
            {"precision": 0.94, "coverage": 0.90, "copied": 0.305},
            "Fair: 30.5 % of them may be copies of exemplars (real images about 1 %). What is good",
        ),
    ],
)
def test_the_worst_metric_beside_real_images_decides(values, said):
    assert verdict(found(**values))[0].startswith(said)


def test_a_judge_that_fails_on_real_images_says_nothing_of_the_generated_ones():
    first, second = verdict(found({"precision": 0.9, "judge_accuracy": 0.2}, precision=0.9, judge_accuracy=0.1))
    assert first == "Good: they look like the real ones (precision 0.900; real images 0.900)."
    assert second.startswith("This judge gives only 20 % of the real images")


def test_copies_are_a_sentence_of_their_own_and_nothing_measured_says_nothing():
    assert verdict(found(copied=0.3))[1].startswith("A possible copy is nearer to an exemplar")
    assert verdict({}) == []


def test_few_images_are_held_against_as_few_real_ones():
    ceiling = {"coverage": 0.98, "n_real": 260, "n_generated": 260}
    of = {"k": 5, "coverage": 0.48, "pooled": {"ceiling": ceiling, "generated": {"n_real": 520, "n_generated": 80}}}
    first, second = verdict(of)
    assert first == "Good: they show the variety of the real ones (coverage 0.480; as few real images about 0.518)."
    assert second.startswith("Only 80 images beside 520 real ones")
    of["pooled"]["generated"]["n_generated"] = 520
    assert verdict(of) == ["Bad: they lack most of the variety (coverage 0.480; real images 0.980)."]


def gain(value: float, low: float, high: float, verdict: str | None = None) -> dict[str, Any]:
    return {"value": value, "baseline": 0.0, "gain": value, "interval": (low, high), "verdict": verdict}


def test_a_gain_is_named_by_its_verdict_and_by_its_sign_where_that_is_no_gain():
    assert kind_of(gain(0.1, 0.05, 0.2, "partly")) == "partly"
    assert kind_of(gain(0.1, -0.05, 0.2, "no gain")) == "may be chance"
    assert kind_of(gain(-0.1, -0.2, -0.05, "no gain")) == "worse"
    assert kind_of(gain(-0.01, -0.2, 0.05, "no gain")) == "no gain"
    assert kind_of(gain(0.1, 0.05, 0.2)) == "better"
    assert kind_of({"gain": 0.1, "interval": None}) == "-"


def test_gains_are_one_sentence_with_f1_first_and_each_metric_by_its_kind():
    metrics = {"f1": gain(0.7, 0.6, 0.8, "survives"), "density": gain(0.2, 0.1, 0.3, "adversarial"), "recall": {"gain": 0.1}}
    (said,) = verdict({"gains": {"plain": {"metrics": metrics}}})
    assert said == (
        "F1 is 0.700, that of plain 0.000: a real gain: it survives small changes such as JPEG. The gain is real in F1;"
        " seen only by the judge in density."
    )
    (said,) = verdict({"gains": {"plain": {"metrics": {"f1": metrics["f1"], "recall": metrics["recall"]}}}})
    assert said == "F1 is 0.700, that of plain 0.000: a real gain: it survives small changes such as JPEG.", "said once"
