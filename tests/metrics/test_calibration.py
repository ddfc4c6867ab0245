"""Calibration: ECE against a count by hand, chance against simulation, and temperatures that are known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from handful.errors import RequestError
from handful.guidance.classifier import tempered_energy
from handful.metrics.calibration import (
    BINS,
    HIGHEST,
    LOWEST,
    accuracy,
    calibration_error,
    chance_error,
    confidence_and_hits,
    fitted_temperature,
    negative_log_likelihood,
    posterior,
    reliability,
    resampled_errors,
    smoothed_temperatures,
)


def drawn(n: int, classes: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a perfectly calibrated classifier, and labels drawn from its own probabilities."""
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=draw)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]


def binary(confidences: list[float]) -> Tensor:
    """Probabilities of two classes whose first is the larger."""
    first = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([first, 1 - first], 1)


def test_the_error_is_the_one_counted_by_hand():
    # bins of 1/15: .55 and .58 lie in [8/15, 9/15), .81 in [12/15, 13/15), .99 in the last
    probabilities = binary([0.55, 0.58, 0.81, 0.99])
    labels = torch.tensor([0, 1, 1, 0])
    by_hand = (2 / 4) * abs(0.5 - 0.565) + (1 / 4) * abs(0 - 0.81) + (1 / 4) * abs(1 - 0.99)
    assert calibration_error(probabilities, labels) == pytest.approx(by_hand, abs=1e-7)
    assert accuracy(probabilities, labels) == 0.5
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(
        -sum(map(math.log, (0.55, 0.42, 0.19, 0.99))) / 4, abs=1e-9
    )


def test_a_perfectly_calibrated_classifier_scores_what_chance_says_and_near_nothing():
    logits, labels = drawn(40_000)
    probabilities = posterior(logits)
    confidence, _ = confidence_and_hits(probabilities, labels)
    found = calibration_error(probabilities, labels)
    assert found < 0.01
    # the deviations of 15 bins are summed: one draw lies within half of its expectation but for 1 in 1,000
    assert found == pytest.approx(chance_error(confidence), rel=0.5)


@pytest.mark.parametrize("n", [30, 400])
def test_chance_is_the_mean_over_simulated_labels(n: int):
    """On the exact path (few images a bin) and on the normal one."""
    logits, _ = drawn(n, seed=3)
    probabilities = posterior(logits)
    confidence, _ = confidence_and_hits(probabilities, torch.zeros(n, dtype=torch.int64))
    draw = np.random.default_rng(0)
    simulated = [float(resampled_errors(confidence, draw.random(n) < confidence, np.ones((1, n)))[0]) for _ in range(3000)]
    error = float(np.std(simulated)) / math.sqrt(len(simulated))
    assert chance_error(confidence) == pytest.approx(float(np.mean(simulated)), abs=4 * error + 0.01 * np.mean(simulated))


def test_chance_falls_as_one_over_the_root_of_the_number_of_images():
    confidence = np.full(64, 0.7)
    assert chance_error(np.tile(confidence, 16)) == pytest.approx(chance_error(confidence) / 4, rel=0.02)


def test_a_classifier_multiplied_by_ten_is_overconfident_and_its_temperature_is_ten():
    logits, labels = drawn(4000)
    assert calibration_error(posterior(logits * 10), labels) > 10 * calibration_error(posterior(logits), labels)
    confidence, hits = confidence_and_hits(posterior(logits * 10), labels)
    assert confidence.mean() > hits.mean() + 0.2
    fitted = fitted_temperature(logits * 10, labels)
    assert fitted == pytest.approx(10, rel=0.08)  # its standard error is 2 %
    assert calibration_error(posterior(logits * 10, temperature=fitted), labels) < 0.03


@pytest.mark.parametrize("known", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found_and_minimises_the_likelihood(known: float):
    logits, labels = drawn(4000, seed=1)
    given = logits * known
    fitted = fitted_temperature(given, labels)
    assert fitted == pytest.approx(known, rel=0.08)

    def cost(temperature: float) -> float:
        return negative_log_likelihood(posterior(given, temperature=temperature), labels)

    assert cost(fitted) < min(cost(fitted * 0.8), cost(fitted * 1.25))


def test_logits_that_know_nothing_or_less_get_the_highest_temperature():
    logits, labels = drawn(500)
    away = -10 * torch.nn.functional.one_hot(labels, 5).float()
    assert fitted_temperature(away, labels) == HIGHEST
    assert fitted_temperature(torch.zeros(500, 5), labels) == HIGHEST
    assert logits.shape == (500, 5)


def test_where_every_image_is_named_rightly_the_temperature_stays_off_its_bound():
    """The likelihood alone would have no confidence too large, and a saturated posterior has no gradient."""
    labels = torch.arange(20) % 5
    right = 4.0 * torch.nn.functional.one_hot(labels, 5).float()
    fitted = fitted_temperature(right, labels)
    assert fitted > 5 * LOWEST
    confidence = posterior(right, temperature=fitted).max(1).values
    assert float(confidence.mean()) == pytest.approx(1 - (4 / 5) / 22, abs=1e-6), (
        "Platt's target: one image in n + 2 is any class"
    )


def test_logits_of_huge_magnitude_give_probabilities():
    probabilities = posterior(torch.tensor([[3e37, -3e37], [0.0, 3e37]]))
    assert torch.equal(probabilities, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    assert calibration_error(probabilities, torch.tensor([0, 1])) == 0
    assert calibration_error(probabilities, torch.tensor([1, 1])) == pytest.approx(0.5)


def test_a_constant_classifier_has_an_error():
    probabilities = posterior(torch.zeros(50, 5))
    labels = torch.arange(50) % 5
    assert calibration_error(probabilities, labels) == pytest.approx(0, abs=1e-6), "it says 1/5, and 1/5 is right"
    assert calibration_error(probabilities, torch.ones(50, dtype=torch.int64)) == pytest.approx(0.2, abs=1e-6)


def test_the_probabilities_are_those_that_the_potential_stands_for():
    """exp(-U(x; y)), normalised over y, is softmax(tau1 f), whatever tau2."""
    logits, _ = drawn(6)
    for tau2 in (0.0, 0.5, 1.0, 3.0):
        energies = torch.stack([tempered_energy(logits.double(), y, 0.7, tau2) for y in range(5)], 1)
        assert torch.allclose((-energies).softmax(1), posterior(logits, 0.7), atol=1e-12)


def test_bins_and_resampled_errors_agree_with_the_error():
    logits, labels = drawn(300, seed=5)
    probabilities = posterior(logits * 3)
    confidence, hits = confidence_and_hits(probabilities, labels)
    of = reliability(confidence, hits)
    there = of.count > 0
    summed = float((of.count[there] * np.abs(of.accuracy[there] - of.confidence[there])).sum() / 300)
    assert of.count.sum() == 300
    assert len(of.count) == BINS
    assert summed == pytest.approx(calibration_error(probabilities, labels), abs=1e-6)
    assert resampled_errors(confidence, hits, np.ones((1, 300)))[0] == pytest.approx(summed, abs=1e-6)
    twice = np.zeros((1, 300))
    twice[0, :150] = 2  # the first half, each image twice
    half = calibration_error(probabilities[:150], labels[:150])
    assert resampled_errors(confidence, hits, twice)[0] == pytest.approx(half, abs=1e-6)


def test_a_confidence_of_one_counts_to_the_last_bin_of_the_picture():
    of = reliability(np.ones(4, dtype=np.float32), np.array([True, True, True, False]))
    assert of.count.tolist() == [0] * (BINS - 1) + [4]
    assert of.accuracy[-1] == 0.75


def test_smoothing_keeps_a_constant_and_a_geometric_run_but_for_its_ends():
    assert smoothed_temperatures(np.full(4, 3.0)) == pytest.approx(np.full(4, 3.0))
    run = 2.0 ** np.arange(6)
    smooth = smoothed_temperatures(run)
    assert smooth[1:-1] == pytest.approx(run[1:-1])
    assert smooth[[0, -1]] == pytest.approx([2**0.25, 2**4.75]), "the ends repeated"
    assert np.all(np.diff(smooth) > 0)


@pytest.mark.parametrize(
    ("logits", "problem"),
    [(torch.zeros(3), "two classes"), (torch.zeros(3, 1), "two classes"), (torch.full((2, 2), math.nan), "NaN")],
)
def test_what_is_no_classifiers_answer_is_refused(logits: Tensor, problem: str):
    with pytest.raises(RequestError, match=problem):
        posterior(logits)
