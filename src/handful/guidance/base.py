"""What a guidance term is: when it acts (`Timing`), and what it adds to the denoised estimate (`Guidance`, `Potential`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from handful.denoiser import Condition, Denoiser
from handful.errors import RequestError
from handful.features import FeatureExtractor
from handful.noise import Level

Jacobian = Literal["exact", "gaussian", "identity"]
Normalize = Literal["rms", "rms-image", "none"]
Gain = Literal["constant", "linear", "sine"]


@dataclass(frozen=True)
class Timing:
    """On which steps a term acts, and how strongly.

    Attributes:
        every: On every n-th step, counted so that the last step of each n acts (the first step is pure noise, where an
            estimate of the image says little).
        interval: Of the progress along the path, (0, 1) for all of it.
        noise: Of the noise-to-signal ratio sigma / alpha, (0, inf) for all of it.
        gain: Over the progress p: "constant" 1, "linear" 1 - p, "sine" sin(pi p).
    """

    every: int = 1
    interval: tuple[float, float] = (0.0, 1.0)
    noise: tuple[float, float] = (0.0, math.inf)
    gain: Gain = "constant"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RequestError("every", self.every, "a term acts on every n-th step, n >= 1", "Use 1 for all steps.")
        for name, (low, high) in (("interval", self.interval), ("noise", self.noise)):
            if not 0 <= low <= high:
                raise RequestError(name, (low, high), "it must rise from 0 or more", "Give (low, high), low <= high.")
        if self.gain not in get_args(Gain):
            raise RequestError("gain", self.gain, "no such gain", f"Choose one of: {', '.join(get_args(Gain))}.")

    def covers(self, level: Level) -> bool:
        """Whether level lies inside both intervals."""
        low, high = self.interval
        least, most = self.noise
        ratio = level.ratio
        return low <= level.progress <= high and bool((least <= ratio).all()) and bool((ratio <= most).all())

    def due(self, level: Level) -> bool:
        """Whether level's turn has come, counting by `every`; off a path it always has."""
        return level.index is None or level.index % self.every == self.every - 1

    def strength(self, level: Level) -> float:
        """The gain at this level, 0 outside the intervals."""
        if not self.covers(level):
            return 0.0
        p = level.progress
        return {"constant": 1.0, "linear": 1.0 - p, "sine": math.sin(math.pi * p)}[self.gain]


def in_chunks(call: Callable[[slice], Tensor], n: int, chunk: int | None) -> Tensor:
    """`call` on slices of at most `chunk` of n images, joined; on all at once where chunk is None."""
    if chunk is None or n <= chunk:
        return call(slice(None))
    return torch.cat([call(slice(i, i + chunk)) for i in range(0, n, chunk)])


@dataclass
class Step:
    """One evaluation of a guided denoiser: what its terms share.

    Attributes:
        denoiser: The denoiser without guidance.
        x_t: (n, c, h, w).
        level, condition: As given.
        x0_hat: The unguided estimate, the shape of x_t.
        chunk: At most so many images at once through the denoiser; None for all.
    """

    denoiser: Denoiser
    x_t: Tensor
    level: Level
    condition: Condition
    x0_hat: Tensor
    chunk: int | None = None

    @cached_property
    def x0_hat_null(self) -> Tensor:
        """The estimate under the null condition: a second evaluation, computed once however many terms ask."""
        null = self.condition.null()
        return in_chunks(lambda part: self.denoiser(self.x_t[part], self.level, null[part]), len(self.x_t), self.chunk)


class Guidance(ABC):
    """A term of `Guided`. Scale 0 is no guidance, for every term."""

    name: ClassVar[str]

    def __init__(self, scale: float, timing: Timing | None = None) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise RequestError("scale", scale, "a guidance scale is a finite number, 0 or more", "Use 0 for no guidance.")
        self.scale, self.timing = scale, timing or Timing()

    def strength(self, level: Level) -> float:
        """Scale times gain at this level; 0 on steps where the term does not act."""
        return self.scale * self.timing.strength(level) if self.timing.due(level) else 0.0

    def begin(self) -> None:  # noqa: B027 - most terms keep nothing
        """Called where a path of levels starts (and off a path at every evaluation): forget what was kept of the last one."""

    @abstractmethod
    def shift(self, step: Step) -> Tensor:
        """What to add to x0_hat, the shape of x_t."""


@dataclass(frozen=True)
class Pull:
    """How a potential's gradient becomes a shift (design.md, "From a potential U to a shift").

    Attributes:
        jacobian: "exact": back through the denoiser; "gaussian": d x0_hat / d x_t as for unit-variance data;
            "identity": the gradient at x0_hat used as if at x_t.
        normalize: "rms": shift = -scale * r * g / rms(g), r = sigma / sqrt(alpha^2 + sigma^2), without unit, the rms over
            the cohort for a potential of sets and over each image for one of images; "rms-image": over each image for
            every potential; "none": the gradient's own size, -(sigma^2 / alpha) grad_{x_t} U.
        hold: With `every` > 1, unless normalize is "none": on the steps between, the last direction is used again, at
            the present r.
        reduce: The potential looks at images of 1/reduce of the resolution (`Denoiser.preview`), at about 1/reduce^2 of
            the decoder's cost; its exemplars must have been shrunk alike.
    """

    jacobian: Jacobian = "exact"
    normalize: Normalize = "rms"
    hold: bool = False
    reduce: int = 1

    def __post_init__(self) -> None:
        if self.jacobian not in get_args(Jacobian):
            raise RequestError("jacobian", self.jacobian, "no such way to take the gradient",
                               f"Choose one of: {', '.join(get_args(Jacobian))}.")  # fmt: skip
        if self.normalize not in get_args(Normalize):
            raise RequestError("normalize", self.normalize, "no such way to scale the gradient",
                               f"Choose one of: {', '.join(get_args(Normalize))}.")  # fmt: skip
        if self.reduce < 1:
            raise RequestError("reduce", self.reduce, "it divides the resolution", "Use 1 for the whole one, 2 for half.")
        if self.hold and self.normalize == "none":
            raise RequestError("hold", True, "a held direction needs a normalized gradient", "Set hold to false.")


class Potential(Guidance):
    """A term given by an energy of features of the decoded denoised images; `Guided` lowers it.

    Class attributes:
        per: "set" where the energy couples the images of a cohort, "image" where each has its own.
    """

    per: ClassVar[Literal["set", "image"]]

    def __init__(
        self, extractor: FeatureExtractor, scale: float, timing: Timing | None = None, pull: Pull | None = None
    ) -> None:
        super().__init__(scale, timing)
        self.extractor, self.pull = extractor, pull or Pull()

    @abstractmethod
    def energy(self, features: Tensor) -> Tensor:
        """Features (n, D) of the cohort -> energy: shape () for a set, (n,) for images."""

    def shift(self, step: Step) -> Tensor:
        raise TypeError("potentials share one backward pass: Guided takes their shift")


class ExemplarPotential(Potential):
    """A potential of a cohort of one class, given by that class's exemplars.

    Args:
        extractor: phi.
        exemplars: phi of the exemplars, (k, D).
        scale, timing, pull: See `Potential`.

    Raises:
        RequestError: If there is no exemplar.
    """

    per = "set"

    def __init__(
        self, extractor: FeatureExtractor, exemplars: Tensor, scale: float, *,
        timing: Timing | None = None, pull: Pull | None = None,
    ) -> None:  # fmt: skip
        super().__init__(extractor, scale, timing, pull)
        if exemplars.ndim != 2 or not len(exemplars):
            raise RequestError("exemplars", tuple(exemplars.shape), f"{self.name} guidance needs features (k, D), k >= 1",
                               "Give at least one exemplar of the class.")  # fmt: skip
        self.exemplars = exemplars.detach()
