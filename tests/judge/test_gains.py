"""Gains: the arithmetic by hand, the verdicts by their rule, and sets whose gain is known to be real or not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from handful.features.registry import FeatureExtractor, load_extractor
from handful.judge.evaluate import Evaluation, Judge
from handful.judge.gains import AS_IS, Comparison, Gain, Measured, compare, gain_of
from handful.zoo.digits import load_digits_split


def measured(metric: str, as_is: float, after: dict[str, float], spread: float = 0.0, images: int = 100) -> Measured:
    """A set with one metric; its draws lie evenly around a mean that is off on purpose, `spread` to either side."""
    values = {AS_IS: as_is, **after}
    draws = {view: {metric: value - 0.3 + np.linspace(-spread, spread, 201)} for view, value in values.items()}
    return Measured(images, {view: {metric: value} for view, value in values.items()}, draws)


def test_the_arithmetic_by_hand():
    made = measured("coverage", 0.75, {"jpeg": 0.625, "lowpass": 0.5}, spread=0.1)
    baseline = measured("coverage", 0.5, {"jpeg": 0.5, "lowpass": 0.4375}, images=80)
    comparison = compare(made, baseline)
    assert (comparison.images, comparison.baseline_images, comparison.draws, comparison.level) == (100, 80, 201, 0.9)
    found = comparison.metrics["coverage"]
    assert (found.value, found.baseline, found.gain) == (0.75, 0.5, 0.25)
    assert found.after == {"jpeg": 0.125, "lowpass": 0.0625}
    assert found.surviving == 0.09375
    assert found.robust_gain == 0.375
    # evenly spread draws: 90 % of them lie within 0.9 of the spread, around the gain and not around their own mean
    assert found.interval == pytest.approx((0.25 - 0.09, 0.25 + 0.09))
    # the same draws in both views: their mean spreads as each does
    assert found.surviving_interval == pytest.approx((0.09375 - 0.09, 0.09375 + 0.09))
    assert found.verdict == "partly"


def test_a_lower_frechet_distance_is_a_gain():
    found = gain_of("frechet", measured("frechet", 6.0, {"jpeg": 5.0}, 0.1), measured("frechet", 8.0, {"jpeg": 6.5}))
    assert (found.gain, found.surviving, found.robust_gain) == (2.0, 1.5, 0.75)
    assert found.verdict == "survives"
    assert gain_of("copied", Measured(9, {AS_IS: {"copied": 0.25}}), Measured(9, {AS_IS: {"copied": 0.125}})).gain == -0.125


@pytest.mark.parametrize(
    ("gain", "after", "spread", "verdict", "share"),
    [
        (0.0, [0.1, 0.1], 0.0, "no gain", None),
        (-0.2, [-0.2, -0.2], 0.1, "no gain", None),
        (0.1, [0.1, 0.1], 0.2, "no gain", None),  # smaller than its noise
        (0.4, [0.4, 0.4], 0.1, "survives", 1.0),
        (0.4, [0.5, 0.7], 0.1, "survives", 1.5),
        (0.4, [0.3, 0.3], 0.1, "survives", 0.75),
        (0.4, [0.7, 0.05], 0.1, "partly", 0.9375),  # one transform takes nearly all
        (0.4, [0.2, 0.2], 0.1, "partly", 0.5),
        (0.4, [0.05, 0.05], 0.1, "adversarial", 0.125),
        (0.4, [-0.2, -0.2], 0.1, "adversarial", -0.5),
        (0.4, [0.35, -0.2], 0.1, "adversarial", 0.1875),
    ],
)
def test_the_verdict_follows_its_rule(gain, after, spread, verdict, share):
    views: dict[str, float] = {name: 0.5 + value for name, value in zip(("jpeg", "lowpass"), after, strict=True)}
    found = gain_of("f1", measured("f1", 0.5 + gain, views, spread), measured("f1", 0.5, dict.fromkeys(views, 0.5)))
    assert found.verdict == verdict
    assert found.robust_gain == (None if share is None else pytest.approx(share))


def test_what_survives_must_itself_be_told_from_chance():
    made, baseline = (measured("f1", value, {"jpeg": value}, 0.02) for value in (0.6, 0.5))
    assert gain_of("f1", made, baseline).verdict == "survives"
    noisy = {view: {"f1": drawn["f1"] * (10 if view else 1)} for view, drawn in made.draws.items()}
    assert gain_of("f1", replace(made, draws=noisy), baseline).verdict == "partly"


def test_without_draws_there_is_no_interval_share_or_verdict_and_without_transforms_no_share():
    made, baseline = (Measured(9, {AS_IS: {"recall": v}, "jpeg": {"recall": v / 2}}) for v in (0.75, 0.25))
    assert gain_of("recall", made, baseline) == Gain(0.75, 0.25, 0.5, None, {"jpeg": 0.25}, 0.25)
    plain = gain_of("f1", measured("f1", 0.9, {}, 0.1), measured("f1", 0.5, {}, 0.1))
    assert (plain.surviving, plain.robust_gain, plain.verdict) == (None, None, None)
    assert plain.interval == pytest.approx((0.4 - 0.09, 0.4 + 0.09), abs=0.1)


def test_a_metric_that_one_side_lacks_has_no_gain():
    assert gain_of("judge_accuracy", Measured(9, {AS_IS: {"judge_accuracy": 0.5}}), Measured(9, {AS_IS: {}})) == Gain(0.5, None)


# --- whole sets --------------------------------------------------------------------------------------------------------


class Digits:
    """Held-out digits: half of them the reference, of the others 200 to make sets of."""

    def __init__(self) -> None:
        split = load_digits_split()
        self.images, self.targets = split.test_images[1:400:2], split.test_labels[1:400:2]
        self.labels = names(self.targets)
        self.extractors = {name: load_extractor(name) for name in ("digits-judge", "digits-guide")}
        self.judges = {
            name: Judge(split.test_images[::2], names(split.test_labels[::2]), extractor, ceiling=False)
            for name, extractor in self.extractors.items()
        }

    def compare(self, judge: str, made: Tensor, baseline: Tensor, labels: list[str] | None = None) -> Comparison:
        def measure(images: Tensor, stream: str) -> Measured:
            seen = self.judges[judge].see(images, labels or self.labels)
            return self.judges[judge].measured(seen, self.judges[judge].judged(seen), stream=stream)

        return compare(measure(made, "made"), measure(baseline, "baseline"))


def names(targets: Tensor) -> list[str]:
    return [str(int(target)) for target in targets]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def ghosts(images: Tensor) -> Tensor:
    """Each digit with another at half strength over it: neither is well seen."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return (images + images[order]) / 2


def persuaded(extractor: FeatureExtractor, images: Tensor, targets: Tensor, step: float = 0.02) -> Tensor:
    """Adds the classifier's own gradient, a fiftieth at a time, until it just names every image as told."""
    pattern = torch.zeros_like(images)
    for _ in range(30):
        pattern.requires_grad_(True)
        logits = extractor.logits((images + pattern).clamp(-1, 1))
        wrong = logits.argmax(1) != targets
        (slope,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), pattern)
        pattern = (pattern - step * slope.sign() * wrong[:, None, None, None]).detach()
    return (images + pattern).clamp(-1, 1)


def test_more_diverse_real_images_gain_coverage_that_survives(digits):
    """The baseline: of each class the same four real digits over and over."""
    first = {c: [i for i, label in enumerate(digits.labels) if label == c][:4] for c in "0123456789"}
    few = torch.tensor([first[label][i % 4] for i, label in enumerate(digits.labels)])
    found = digits.compare("digits-judge", digits.images, digits.images[few]).metrics
    for name in ("coverage", "f1"):
        gain = found[name]
        assert gain.verdict == "survives", name
        assert gain.robust_gain is not None
        assert 0.75 < gain.robust_gain < 1.3, name
        assert gain.interval is not None
        assert gain.interval[0] > 0.03
    assert found["precision"].verdict == "no gain"  # all of it is real on both sides
    assert found["precision"].robust_gain is None


def test_clear_digits_gain_accuracy_over_ghosts_and_it_survives(digits):
    found = digits.compare("digits-guide", digits.images, ghosts(digits.images)).metrics["judge_accuracy"]
    assert found.value is not None
    assert found.baseline is not None
    assert found.value > 0.95 > 0.5 > found.baseline
    assert found.verdict == "survives"


def test_a_gradient_pattern_that_the_judge_likes_is_called_adversarial(digits):
    """The ghosts of before and the judge's gradient, 1.6 % of the range in the mean: all named right, hardly changed."""
    plain, guide = ghosts(digits.images), digits.extractors["digits-guide"]
    liked = persuaded(guide, plain, digits.targets)
    assert float((liked - plain).abs().mean()) < 0.05
    found = digits.compare("digits-guide", liked, plain).metrics["judge_accuracy"]
    assert found.value == 1
    assert found.gain is not None
    assert found.gain > 0.5
    assert found.robust_gain is not None
    assert found.robust_gain < 0.25
    assert found.verdict == "adversarial"
    for fine in ("resample", "lowpass"):
        assert abs(found.after[fine]) < 0.05
    # a judge of other weights is hardly taken in, to begin with
    other = digits.compare("digits-judge", liked, plain).metrics["judge_accuracy"]
    assert other.gain is not None
    assert other.gain < 0.5 * found.gain


def test_a_set_of_the_same_kind_has_no_gain_in_nine_of_ten_cases(digits):
    """Halves of one set, 12 times: an interval lies above 0 with a chance of 5 %, more than 3 in 12 with one of 0.2 %."""
    judge = Judge(digits.images, digits.labels, digits.extractors["digits-judge"], audit=False, ceiling=False)
    split = load_digits_split()
    above = 0
    for seed in range(12):
        order = 2 * torch.randperm(len(split.test_images) // 2, generator=torch.Generator().manual_seed(seed))
        sets = []
        for half in (order[:100], order[100:200]):
            seen = judge.see(split.test_images[half], names(split.test_labels[half]))
            sets.append(judge.measured(seen, judge.judged(seen), stream=str(len(sets))))
        interval = compare(*sets).metrics["coverage"].interval
        assert interval is not None
        above += interval[0] > 0
    assert above <= 3


def test_draws_repeat_and_two_sets_are_drawn_apart(digits):
    judge = digits.judges["digits-judge"]
    seen = judge.see(digits.images, digits.labels)
    found: Evaluation = judge.judged(seen)
    one, again, other = (judge.measured(seen, found, stream=stream) for stream in ("a", "a", "b"))
    np.testing.assert_array_equal(one.draws[AS_IS]["f1"], again.draws[AS_IS]["f1"])
    assert not np.array_equal(one.draws[AS_IS]["f1"], other.draws[AS_IS]["f1"])
    same = compare(one, other)
    assert all(gain.gain == 0 and gain.verdict in ("no gain", None) for gain in same.metrics.values())
    assert json.loads(json.dumps(same.to_dict(), allow_nan=False))["metrics"]["f1"]["verdict"] == "no gain"
