"""How noisy an image is, and the levels of noise a model knows.

Every process of the literature noises an image as `x_t = alpha * x0 + sigma * eps`. A `Level` is that pair of numbers, a
`Levels` the path of them that a sampler walks down, a `Schedule` the levels that a network was trained on. Sigma alone
would not do: rectified flows start at alpha = 0, where sigma / alpha is infinite.

Sources: VP, Ho et al. 2020 (arXiv 2006.11239) and Nichol & Dhariwal 2021 (cosine); EDM, Karras et al. 2022
(arXiv 2206.00364), equation 5; rectified flow with a shift, Esser et al. 2024 (arXiv 2403.03206), equation 23.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from handful.errors import RequestError, counted

# A training step's ratio sigma / alpha is infinite under zero-terminal-SNR; this keeps its logarithm finite.
LARGEST_RATIO = 1e12


@dataclass(frozen=True)
class Level:
    """A noise level: `x_t = alpha * x0 + sigma * eps`.

    Attributes:
        alpha: How much of the image is left; float64, shape () or (n,) for one level an image.
        sigma: How much noise is on it; the same shape.
        index: The place on the path that a sampler walks, counted from the noisy end; None off a path.
        progress: How far along that path, 0 at its start (noise), 1 at its last evaluated level.
    """

    alpha: Tensor
    sigma: Tensor
    index: int | None = None
    progress: float = 0.0

    def on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `(alpha, sigma)` in a shape, dtype and on a device that multiply x (n, c, h, w)."""
        if self.alpha.ndim == 0:  # scalars of any device and precision multiply x without promoting it
            return self.alpha, self.sigma
        shape = (-1,) + (1,) * (x.ndim - 1)
        return self.alpha.to(x).view(shape), self.sigma.to(x).view(shape)

    @property
    def ratio(self) -> Tensor:
        """Noise to signal, sigma / alpha; infinite at alpha = 0."""
        return self.sigma / self.alpha

    @property
    def total(self) -> Tensor:
        """n = sqrt(alpha^2 + sigma^2), the scale of x_t for data of unit variance."""
        return torch.hypot(self.alpha, self.sigma)


def level(alpha: float | Tensor, sigma: float | Tensor) -> Level:
    """Makes a `Level` from numbers or tensors of shape () or (n,)."""
    return Level(torch.as_tensor(alpha, dtype=torch.float64), torch.as_tensor(sigma, dtype=torch.float64))


@dataclass(frozen=True)
class Levels:
    """The path of a sampler: `steps + 1` levels from the noisiest to the last.

    Attributes:
        alpha, sigma: float64 tensors of shape (steps + 1,); sigma falls strictly, and may end at 0.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) < 2:
            raise ValueError(
                f"levels: alpha {tuple(self.alpha.shape)} and sigma {tuple(self.sigma.shape)} must be two "
                "vectors of one length, 2 or more"
            )
        alpha, sigma = self.alpha, self.sigma
        falls = sigma[1:] * alpha[:-1] < sigma[:-1] * alpha[1:]  # sigma/alpha falls, also where alpha is 0
        if (alpha < 0).any() or (sigma < 0).any() or not bool(falls.all()):
            raise ValueError("levels: sigma / alpha must fall at every step, with alpha and sigma never negative")

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    def __len__(self) -> int:
        return len(self.alpha)

    def __getitem__(self, index: int) -> Level:
        index = range(len(self))[index]
        return Level(self.alpha[index], self.sigma[index], index, min(1.0, index / max(1, self.steps - 1)))

    def __iter__(self) -> Iterator[Level]:
        return (self[i] for i in range(len(self)))

    def last(self, steps: int) -> Levels:
        """The path of its last `steps` steps."""
        first = self.steps - steps
        return Levels(self.alpha[first:], self.sigma[first:])

    def pairs(self) -> Iterator[tuple[Level, Level]]:
        """The steps: `(from, to)` level pairs."""
        return ((self[i], self[i + 1]) for i in range(self.steps))


def posterior_deviation(t: Level, s: Level) -> Tensor:
    """Standard deviation of x_s given x_t and x0, for any process: the noise an ancestral step adds; shape ()."""
    forward = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    return forward.clamp_min(0).sqrt() * s.sigma / t.sigma


def noised(x0: Tensor, eps: Tensor, at: Level) -> Tensor:
    """`alpha * x0 + sigma * eps`; x0 and eps of one shape (n, c, h, w)."""
    alpha, sigma = at.on(x0)
    return alpha * x0 + sigma * eps


class Schedule(ABC):
    """The levels a network was trained on, and the time that it takes as input.

    Attributes:
        spacings: Names of the ways to space levels; the first is the default. "model" is among them where `own` is there.
        own: The path that the model's own scheduler walks: steps -> (alpha, sigma), float64 of shape (steps + 1,), its last
            level included; None where nothing is known of it.
    """

    spacings: tuple[str, ...]
    own: Callable[[int], tuple[Tensor, Tensor]] | None = None

    def with_own(self, own: Callable[[int], tuple[Tensor, Tensor]]) -> Schedule:
        """This schedule, with the path of the model's own scheduler as the spacing "model"."""
        self.own, self.spacings = own, (*type(self).spacings, "model")
        return self

    def spacing(self, steps: int, kind: str | None = None) -> Levels:
        """The levels to sample at.

        Args:
            steps: Number of sampling steps, 1 or more.
            kind: One of `self.spacings`; the first is the default.

        Returns:
            `steps + 1` levels, the last one clean (alpha = 1, sigma = 0); by "model" it is as the scheduler has it.

        Raises:
            RequestError: If steps or kind is not possible for this schedule.
        """
        kind = kind or self.spacings[0]
        if steps < 1:
            raise RequestError("steps", steps, "sampling takes at least one step", "Ask for 1 or more; 18 is usual.")
        if kind not in self.spacings:
            raise RequestError(
                "spacing", kind, f"{type(self).__name__} has no such spacing", f"Choose one of: {', '.join(self.spacings)}."
            )
        if kind == "model" and self.own is not None:
            return Levels(*self.own(steps))
        alpha, sigma = self._spacing(steps, kind)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return Levels(torch.cat([alpha.double(), one]), torch.cat([sigma.double(), zero]))

    @abstractmethod
    def _spacing(self, steps: int, kind: str) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def time(self, at: Level) -> Tensor:
        """The network's input for the time at this level: float64, the shape of the level."""


class VP(Schedule):
    """A variance-preserving chain of training steps: alpha^2 + sigma^2 = 1.

    Args:
        alphas_cumprod: alpha^2 at each training step, shape (T,), falling.
        rounded: Give the network whole training steps, the nearest in log-SNR; otherwise they are interpolated in
            log-SNR, which networks with sinusoidal time embeddings take well. The spacings leading, trailing and
            linspace land on whole steps either way.
    """

    spacings = ("trailing", "leading", "linspace", "logsnr")

    def __init__(self, alphas_cumprod: Tensor, rounded: bool = False) -> None:
        abar = alphas_cumprod.detach().double().cpu()
        if abar.ndim != 1 or len(abar) < 2 or not bool((abar[1:] < abar[:-1]).all()):
            raise ValueError("alphas_cumprod must be a vector of two or more falling numbers")
        self.alpha, self.sigma = abar.sqrt(), (1 - abar).sqrt()
        self.rounded = rounded
        self._log_ratio = (self.sigma / self.alpha).clamp(max=LARGEST_RATIO).log()

    def __len__(self) -> int:
        return len(self.alpha)

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02, rounded: bool = False) -> VP:
        """Ho et al. 2020: betas rise linearly."""
        return cls((1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0), rounded)

    @classmethod
    def cosine(cls, steps: int = 1000, largest_beta: float = 0.999, rounded: bool = False) -> VP:
        """Nichol & Dhariwal 2021, equation 17, with their clip of beta."""
        edge = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = ((edge + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls((1 - (1 - bar[1:] / bar[:-1]).clamp(max=largest_beta)).cumprod(0), rounded)

    def time(self, at: Level) -> Tensor:
        log_ratio = at.ratio.clamp(1e-12, LARGEST_RATIO).log()
        place = torch.searchsorted(self._log_ratio, log_ratio.contiguous()).clamp(1, len(self) - 1)
        low, high = self._log_ratio[place - 1], self._log_ratio[place]
        part = ((log_ratio - low) / (high - low)).clamp(0, 1)
        exact = place - 1 + part
        return exact.round() if self.rounded else exact

    def at(self, t: int) -> Level:
        """The level of training step t."""
        return Level(self.alpha[t], self.sigma[t])

    def steps_of(self, steps: int, kind: str) -> Tensor:
        """The training steps (int64, falling) of a spacing, by the rules of diffusers' schedulers."""
        count = len(self)
        if steps > count:
            raise RequestError(
                "steps", steps, f"the model was trained on {counted(count, 'step')}", f"Ask for {count} or fewer."
            )
        if kind == "trailing":
            return torch.arange(count, 0, -count / steps, dtype=torch.float64)[:steps].round().long() - 1
        if kind == "leading":
            return torch.arange(steps).mul(count // steps).flip(0)
        return torch.linspace(0, count - 1, steps, dtype=torch.float64).round().long().flip(0)

    def _spacing(self, steps: int, kind: str) -> tuple[Tensor, Tensor]:
        if kind != "logsnr":
            t = self.steps_of(steps, kind)
            return self.alpha[t], self.sigma[t]
        # uniform in log-SNR between the first and the last training step that still has signal to speak of
        ends = min(float(self._log_ratio[-1]), math.log(1e3)), float(self._log_ratio[0])
        ratio = torch.linspace(*ends, steps, dtype=torch.float64).exp()
        return 1 / torch.hypot(torch.ones_like(ratio), ratio), ratio / torch.hypot(torch.ones_like(ratio), ratio)


class EDM(Schedule):
    """Variance exploding with alpha = 1; Karras et al. 2022, equation 5. The network takes sigma as its time."""

    spacings = ("karras",)

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def time(self, at: Level) -> Tensor:
        return at.ratio

    def _spacing(self, steps: int, kind: str) -> tuple[Tensor, Tensor]:
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = torch.linspace(*ends, steps, dtype=torch.float64) ** self.rho
        return torch.ones_like(sigma), sigma


class Flow(Schedule):
    """Rectified flow: alpha = 1 - s, sigma = s, s from 1 to 0; `shift` moves the levels towards noise.

    The network takes `time_scale * s` as its time (Stable Diffusion 3: 1000; Flux: 1).
    """

    spacings = ("linspace",)

    def __init__(self, shift: float = 1.0, time_scale: float = 1000.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, not {shift}")
        self.shift, self.time_scale = shift, time_scale

    def time(self, at: Level) -> Tensor:
        return self.time_scale * at.sigma / (at.alpha + at.sigma)

    def _spacing(self, steps: int, kind: str) -> tuple[Tensor, Tensor]:
        s = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        s = self.shift * s / (1 + (self.shift - 1) * s)
        return 1 - s, s
