"""The one idea: every pretrained network is a denoiser, E[x0 | x_t].

`Denoiser` is what samplers and guidance know. `NetworkDenoiser` turns any network into one by the table below (design.md);
n = sqrt(alpha^2 + sigma^2), m = alpha + sigma. No other file converts between parametrizations.

    predicts  input    x0_hat                            sources
    eps       x_t / n  x_t / alpha - (sigma / alpha) out  Ho et al. 2020
    v         x_t / n  (alpha / n^2) x_t - (sigma / n) out  Salimans & Ho 2022, appendix D
    x0        x_t / n  out
    flow      x_t / m  x_t / m - (sigma / m) out          v = eps - x0; Liu et al. 2022, Esser et al. 2024
    edm       x_t / alpha  out                            Karras et al. 2022, equation 7
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from handful.errors import RequestError
from handful.noise import Level, Schedule

Prediction = Literal["eps", "v", "x0", "flow", "edm"]


@dataclass(frozen=True)
class Condition:
    """What a class-conditional or unconditional network is told.

    Attributes:
        labels: int64, shape (n,); None for an unconditional network.
        null_label: The label that stands for "no class", where the network has one.
    """

    labels: Tensor | None
    null_label: int | None = None

    def null(self) -> Condition:
        """The condition that tells the network nothing, of the same length.

        Raises:
            RequestError: If the network has no null class.
        """
        if self.labels is None or self.null_label is None:
            raise RequestError("guidance", "cfg", "this model has no null class to compare with",
                               "Use another guidance (chamfer needs none), or name the label with --null-class.")  # fmt: skip
        return replace(self, labels=torch.full_like(self.labels, self.null_label))

    def __getitem__(self, part: slice) -> Condition:
        return self if self.labels is None else replace(self, labels=self.labels[part])


class Denoiser(nn.Module):
    """E[x0 | x_t]: a pretrained network, or a guided one.

    Attributes:
        shape: (c, h, w) of one x0 (pixels, or latents).
        levels: The schedule that the network was trained on.
        classes: Names of the classes it knows, by label; empty where it has none or they are unknown.
    """

    shape: tuple[int, int, int]
    levels: Schedule
    classes: Sequence[str] = ()

    @abstractmethod
    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        """Estimates the clean image.

        Args:
            x_t: (n, c, h, w), the noisy images or latents.
            level: How noisy they are; one for all or one each.
            condition: n conditions.

        Returns:
            x0_hat, the shape and dtype of x_t; differentiable.
        """

    @abstractmethod
    def condition(self, labels: Sequence[int] | Tensor) -> Condition:
        """Makes the condition for n labels."""

    def decode(self, x0: Tensor) -> Tensor:
        """x0 -> images (n, c, h, w) in [-1, 1]; differentiable. Pixel models: the identity."""
        return x0

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> x0."""
        return images


def network_input(prediction: Prediction, x_t: Tensor, level: Level) -> Tensor:
    """Scales x_t (n, c, h, w) as the network saw it in training: the second column of the table."""
    alpha, sigma = level.on(x_t)
    if prediction == "edm":
        return x_t / alpha
    if prediction == "flow":
        return x_t / (alpha + sigma)
    return x_t / torch.hypot(alpha, sigma)


def denoised_from(prediction: Prediction, x_t: Tensor, out: Tensor, level: Level) -> Tensor:
    """Turns the network's output into x0_hat: the third column. All tensors (n, c, h, w)."""
    alpha, sigma = level.on(x_t)
    if prediction == "eps":
        return (x_t - sigma * out) / alpha
    if prediction == "v":
        n = torch.hypot(alpha, sigma)
        return (alpha / n**2) * x_t - (sigma / n) * out
    if prediction == "flow":
        return (x_t - sigma * out) / (alpha + sigma)
    return out  # x0 and edm networks give it themselves


class NetworkDenoiser(Denoiser):
    """A denoiser from a network and what it predicts. Subclasses say how the network is called.

    The network's weights are frozen, and it runs in its own precision; x_t and x0_hat keep the caller's.
    """

    def __init__(self, network: nn.Module, prediction: Prediction, shape: tuple[int, int, int], levels: Schedule) -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise RequestError("prediction", prediction, "no network predicts that",
                               f"Choose one of: {', '.join(get_args(Prediction))}.")  # fmt: skip
        self.network = network.eval().requires_grad_(False)
        self.prediction: Prediction = prediction
        self.shape, self.levels = shape, levels

    @abstractmethod
    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Calls the network: scaled (n, c, h, w) in its precision, time (n,) float32 -> its output (n, c, h, w)."""

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        scaled = network_input(self.prediction, x_t, level)
        time = self.levels.time(level).to(x_t.device, torch.float32).expand(len(x_t))
        parameter = next(self.network.parameters(), x_t)
        out = self.call(scaled.to(parameter.dtype), time, condition).to(x_t.dtype)
        return denoised_from(self.prediction, x_t, out, level)


class Clamped(Denoiser):
    """A pixel denoiser whose estimate is kept inside the images' range [-1, 1].

    Outermost: guidance lies inside, so that the clamp follows the shift and zeroes no gradient. Without it a strong shift
    pushes pixels out of range, and every later step starts from an image that the network never saw.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.shape, self.levels, self.classes = denoiser.shape, denoiser.levels, denoiser.classes

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        return self.denoiser(x_t, level, condition).clamp(-1, 1)

    def condition(self, labels: Sequence[int] | Tensor) -> Condition:
        return self.denoiser.condition(labels)
