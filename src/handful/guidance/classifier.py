"""Off-the-shelf classifier guidance, EluCD (Ma et al., ICLR 2024, arXiv 2310.11311), and the noise-aware kind before it.

A classifier f of clean images, with logits f_j, and two inverse temperatures:

    U(x0_hat; y) = -(tau1 f_y(x0_hat) - log sum_j exp(tau2 f_j(x0_hat)))      tau2 = tau1: log p(y | x); 0: the joint's logit

Its pre-conditioning is Softplus in place of ReLU (`handful.features.softplus`), the temperatures, and a gain over time
(`Timing`). Beyond the paper, logits can be divided by a temperature fitted for each level of noise (`handful calibrate`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from handful.core.noise import Level, Schedule
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Potential, Pull, Timing

Target = int | Sequence[int] | Tensor


def tempered_energy(logits: Tensor, target: Target, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """U, above.

    Args:
        logits: (n, classes), of any size that is finite.
        target: y, the class of all images or of each, (n,).
        tau1, tau2: Inverse temperatures, 0 or more.

    Returns:
        (n,), in float32 or the logits' float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = torch.as_tensor(target, device=logits.device).expand(len(logits))[:, None]
    # log sum exp(tau2 f) is tau2 f_y - log softmax(tau2 f)_y, which keeps its gradient where logits are huge and alike
    of_target, log_softmax = logits.gather(1, wanted)[:, 0], (tau2 * logits).log_softmax(1).gather(1, wanted)[:, 0]
    return (tau2 - tau1) * of_target - log_softmax


class Classifier(Potential):
    """Guidance by a classifier of clean images.

    Args:
        classifier: An extractor with logits.
        target: The class to guide to: the number of a class of the classifier's, one for all images or one for each.
        scale, timing, pull: See `Potential`.
        tau1, tau2: Inverse temperatures.
        temperatures: (sigma / alpha, T) pairs, rising in the first: at a level the logits are divided by T, interpolated in
            the logarithms of both and constant beyond the ends.

    Raises:
        RequestError: If the extractor is no classifier, or a temperature makes no sense.
    """

    name = "classifier"
    per = "image"

    def __init__(
        self,
        classifier: FeatureExtractor,
        target: Target,
        scale: float,
        *,
        tau1: float = 1.0,
        tau2: float = 1.0,
        temperatures: Sequence[tuple[float, float]] = (),
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(classifier, scale, timing, pull)
        if not classifier.is_classifier:
            raise RequestError("classifier", classifier.name, "it has no logits", "Name an image classifier.")
        check_temperatures(tau1, tau2, temperatures)
        self.target, self.tau1, self.tau2, self.temperatures = target, tau1, tau2, tuple(temperatures)
        self.temperature = 1.0  # of finished images

    def at(self, level: Level) -> Classifier:
        if not self.temperatures:
            return self
        here = copy.copy(self)
        here.temperature = temperature_at(self.temperatures, float(level.ratio))
        return here

    def view(self, images: Tensor) -> Tensor:
        return self.extractor.logits(images)

    def energy(self, features: Tensor) -> Tensor:
        return tempered_energy(features / self.temperature, self.target, self.tau1, self.tau2)


class NoisyClassifier(Potential):
    """Guidance by a classifier that was trained on noisy images, f(x_t, t) (Dhariwal & Nichol 2021, arXiv 2105.05233).

    It looks at x_t / n, not at an image, so no gradient goes through the denoiser: `pull.input` must be "state".

    Args:
        classifier: A module, called with (n, c, h, w) and the time (n,) that the denoiser's own network is told; gives logits.
            Its weights are frozen.
        levels: The denoiser's schedule, which knows that time.
        target, scale, tau1, tau2, timing, pull: As for `Classifier`.

    Raises:
        RequestError: If the pull looks at something else.
    """

    name = "noisy-classifier"
    per = "image"

    def __init__(
        self,
        classifier: nn.Module,
        levels: Schedule,
        target: Target,
        scale: float,
        *,
        tau1: float = 1.0,
        tau2: float = 1.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(FeatureExtractor(self.name, classifier, channels=None), scale, timing, pull or Pull(input="state"))
        if self.pull.input != "state":
            raise RequestError("input", self.pull.input, "a classifier of noisy images looks at the state", "Use state.")
        check_temperatures(tau1, tau2, ())
        self.levels, self.target, self.tau1, self.tau2 = levels, target, tau1, tau2
        self.time = torch.zeros(())

    def at(self, level: Level) -> NoisyClassifier:
        here = copy.copy(self)
        here.time = self.levels.time(level)
        return here

    def view(self, images: Tensor) -> Tensor:
        return self.extractor.network(images, self.time.to(images.device, torch.float32).expand(len(images)))

    def energy(self, features: Tensor) -> Tensor:
        return tempered_energy(features, self.target, self.tau1, self.tau2)


def check_temperatures(tau1: float, tau2: float, temperatures: Sequence[tuple[float, float]]) -> None:
    """Refuses inverse temperatures and fitted temperatures that make no sense.

    Raises:
        RequestError: Naming the field.
    """
    if not all(math.isfinite(tau) and tau >= 0 for tau in (tau1, tau2)) or max(tau1, tau2) == 0:
        raise RequestError(
            "tau1, tau2",
            (tau1, tau2),
            "inverse temperatures are finite, 0 or more, and not both 0",
            "Use 1 and 1 for log p(y | x).",
        )
    if any(not (math.isfinite(ratio) and math.isfinite(each) and ratio > 0 and each > 0) for ratio, each in temperatures):
        raise RequestError(
            "temperatures",
            list(temperatures),
            "each is a pair of positive numbers, sigma / alpha and T",
            "Take those that handful calibrate writes.",
        )
    if any(low[0] >= high[0] for low, high in pairwise(temperatures)):
        raise RequestError("temperatures", list(temperatures), "sigma / alpha must rise", "Sort the pairs.")


def temperature_at(temperatures: Sequence[tuple[float, float]], ratio: float) -> float:
    """T at a noise-to-signal ratio: linear between the pairs in the logarithms of both, constant beyond them."""
    if ratio <= temperatures[0][0]:
        return temperatures[0][1]
    for (low, before), (high, after) in pairwise(temperatures):
        if ratio <= high:
            part = math.log(ratio / low) / math.log(high / low)
            return math.exp((1 - part) * math.log(before) + part * math.log(after))
    return temperatures[-1][1]
