"""How far a classifier's confidence can be trusted: expected calibration error, reliability, and the temperature that mends it.

    ECE = sum over bins b of  n_b / n |accuracy_b - confidence_b|      (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599)

over 15 equal bins of the confidence, the largest class probability. torchmetrics computes it. It is biased upwards: few
images in a bin deviate by chance, so that even a perfectly calibrated classifier has an ECE above 0; `chance_error` says which.

What is calibrated are class probabilities. Under EluCD's potential U(x; y) = -(tau1 f_y - log sum_j exp(tau2 f_j)) these are
p(y | x) = exp(-U(x; y)) / sum_y' exp(-U(x; y')) = softmax(tau1 f)_y: the second part is the same for every class and
cancels, so that calibration has nothing to say of tau2.

This module needs torch: import it by its own name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from handful.errors import RequestError

BINS = 15
LOWEST, HIGHEST = 0.02, 50.0  # temperatures: beyond these a posterior is one class, or nothing at all
_EXACT = 48  # images in a bin up to which chance is counted out; beyond, the normal distribution is within 1 %


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, bin by bin.

    Attributes:
        edges: Of the bins, (BINS + 1,), 0 to 1.
        count: Images in each, (BINS,).
        confidence, accuracy: Their means, (BINS,); NaN where a bin is empty.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def posterior(logits: Tensor, tau1: float = 1.0, temperature: float = 1.0) -> Tensor:
    """softmax(tau1 f / T): logits (n, classes) of any size that is finite -> probabilities, float64.

    Raises:
        RequestError: If they are no such matrix, or not finite.
    """
    if logits.ndim != 2 or not logits.shape[0] or logits.shape[1] < 2:
        problem = "logits must have the shape (n, classes), with two classes or more"
        raise RequestError("logits", tuple(logits.shape), problem, "Give a row for each image.")
    if not bool(logits.isfinite().all()):
        raise RequestError("logits", tuple(logits.shape), "they hold NaN or infinite values", "Use float32.")
    return (logits.double() * (tau1 / temperature)).softmax(1)


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error, 0 (calibrated) to 1.

    Args:
        probabilities: (n, classes), rows that sum to 1.
        labels: int64 (n,), the class that each image is of.
    """
    found = multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=BINS, norm="l1")
    return float(found)


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of images whose largest probability is their class's."""
    return float((probabilities.argmax(1) == labels).double().mean())


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean -log p(y | x), in nats; finite, as no probability is taken to be below 1e-30."""
    return float(-probabilities.gather(1, labels[:, None]).clamp_min(1e-30).log().mean())


def confidence_and_hits(probabilities: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What calibration looks at: the largest probability of each image, float32 (n,), and whether it is its class's, bool."""
    largest, place = probabilities.max(1)
    return largest.float().cpu().numpy(), (place == labels).cpu().numpy()


def reliability(confidence: np.ndarray, hits: np.ndarray) -> Reliability:
    """Confidence (n,) and hits (n,) by bins; a confidence of exactly 1 counts to the last bin."""
    edges = np.linspace(0, 1, BINS + 1)
    place = np.minimum(_places(confidence), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            edges, count, np.bincount(place, confidence, BINS) / count, np.bincount(place, hits.astype(float), BINS) / count
        )


def chance_error(confidence: np.ndarray) -> float:
    """The expected ECE of a perfectly calibrated classifier that is as confident, (n,): what is left of an ECE by chance.

    Each image of a bin is named rightly with the probability of its confidence, independently. The mean deviation of their
    number from its expectation is counted out for small bins, and the normal distribution's for larger ones.
    """
    places = _places(confidence)
    deviations = [_mean_deviation(confidence[places == place].astype(float)) for place in np.unique(places)]
    return math.fsum(deviations) / len(confidence)


def resampled_errors(confidence: np.ndarray, hits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ECEs of resampled images, for its standard error.

    Args:
        weights: How often each image is drawn, (draws, n), rows of one sum.

    Returns:
        (draws,).
    """
    gaps = np.zeros((len(confidence), BINS + 1))
    gaps[np.arange(len(confidence)), _places(confidence)] = hits.astype(float) - confidence
    return np.abs(weights @ gaps).sum(1) / weights.sum(1)


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """T that minimises the mean of -log softmax(f / T)_y (Guo et al. 2017), inside [LOWEST, HIGHEST].

    It is convex in 1/T, so the zero of its derivative, mean(E_p[f] - f_y), is found. Logits that know nothing of
    the class, or less, give HIGHEST: no confidence is the best that can be had of them. Where all n images are named rightly
    the likelihood would have no confidence too large; so, as Platt (1999) does, one image in n + 2 is taken to be of any class.

    Args:
        logits: (n, classes).
        labels: int64 (n,).
    """
    posterior(logits, 1.0, 1.0)  # its checks
    values = logits.double()
    doubt = 1 / (len(values) + 2)
    of_class = (1 - doubt) * values.gather(1, labels[:, None])[:, 0] + doubt * values.mean(1)

    def slope(log_temperature: float) -> float:
        weights = (values / math.exp(log_temperature)).softmax(1)
        return float(((weights * values).sum(1) - of_class).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(high) >= 0:  # still falling towards higher temperatures
        return HIGHEST
    if slope(low) <= 0:
        return LOWEST
    return math.exp(cast("float", brentq(slope, low, high, xtol=1e-6)))


def smoothed_temperatures(temperatures: np.ndarray) -> np.ndarray:
    """Temperatures along a path, (steps,), each averaged with its neighbours as 1 : 2 : 1 in logarithms; the ends repeated."""
    logs = np.log(np.asarray(temperatures, dtype=float))
    padded = np.pad(logs, 1, mode="edge")
    return np.exp((padded[:-2] + 2 * logs + padded[2:]) / 4)


def _places(confidence: np.ndarray) -> np.ndarray:
    """Each confidence's bin as torchmetrics counts: [lower, upper), and 1 alone in a bin of its own, number BINS."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float32).numpy()
    return np.searchsorted(edges, confidence.astype(np.float32), side="right") - 1


def _mean_deviation(chances: np.ndarray) -> float:
    """E |hits - sum of chances| of independent images."""
    if len(chances) > _EXACT:
        return math.sqrt(2 / math.pi * float((chances * (1 - chances)).sum()))
    distribution = np.ones(1)  # of the number of hits
    for chance in chances:
        distribution = np.convolve(distribution, (1 - chance, chance))
    return float(distribution @ np.abs(np.arange(len(distribution)) - chances.sum()))
