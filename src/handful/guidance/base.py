"""What a guidance term is: when it acts (`Timing`), and what it adds to the denoised estimate (`Guidance`, `Potential`)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import Level
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.settings import Positive, Request, Weight

Jacobian = Literal["exact", "gaussian", "identity"]
Normalize = Literal["rms", "rms-image", "sample", "none"]
Gain = Literal["constant", "linear", "sine", "edm"]
Input = Literal["x0_hat", "x_t", "state", "blend"]
Rule = Literal["shift", "held", "ancestral", "before"]


def _open_end(interval: object) -> object:
    """(2, inf), as Python writes it, has no upper end; a file says null."""
    if isinstance(interval, tuple) and interval[1:] == (math.inf,):
        return interval[0], None
    return tuple(interval) if isinstance(interval, list) else interval


def _rising(interval: tuple[float, float | None]) -> tuple[float, float | None]:
    low, high = interval
    if high is not None and high < low:
        raise ValueError("the low end comes first: (low, high), low <= high")
    return interval


class Timing(Request):
    """On which steps a term acts, and how strongly.

    Attributes:
        every: On every n-th step, counted so that the last step of each n acts (the first step is pure noise, where an
            estimate of the image says little). None, in a recipe: the largest n that guides at least four steps of a run
            (Heun's method evaluates most of them twice).
        interval: Of the progress along the path, (0, 1) for all of it.
        noise: Of the noise-to-signal ratio sigma / alpha; an upper end of None is none.
        gain: Over the progress p: "constant" 1, "linear" 1 - p, "sine" sin(pi p), "edm" (EluCD's on EDM, at step i of N)
            1 - i / (N + 1) + boost * sin(pi i / N).
        boost: Of the gain "edm", and of the ancestral rule (see `Pull`).
    """

    every: Positive | None = 1
    interval: Annotated[tuple[Weight, Weight], AfterValidator(_rising)] = (0.0, 1.0)
    noise: Annotated[tuple[Weight, Weight | None], BeforeValidator(_open_end), AfterValidator(_rising)] = (0.0, None)
    gain: Gain = "constant"
    boost: Weight = 0.0

    def covers(self, level: Level) -> bool:
        """Whether level lies inside both intervals."""
        low, high = self.interval
        least, most = self.noise
        ratio = level.ratio
        return low <= level.progress <= high and bool((least <= ratio).all()) and (most is None or bool((ratio <= most).all()))

    def due(self, level: Level) -> bool:
        """Whether a term acts at this step, counting by `every`; off a path it always does."""
        every = self.every or 1
        return level.index is None or level.index % every == every - 1

    def strength(self, level: Level) -> float:
        """The gain at this level, 0 outside the intervals."""
        if not self.covers(level):
            return 0.0
        p = level.progress
        if self.gain == "edm":
            i = level.index or 0
            steps = i / p + 1 if i else 1  # progress is i / (N - 1)
            return 1.0 - i / (steps + 1) + self.boost * math.sin(math.pi * i / steps)
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
        x_t: (n, c, h, w).
        x0_hat: The unguided estimate, the shape of x_t.
        chunk: At most this many images at once through the denoiser; None for all.
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
    """A term of `Guided`. Scale 0 is no guidance, for every term.

    Class attributes:
        shifts: Whether it moves x0_hat. A term that only changes the condition does not, and costs no evaluation.
    """

    name: ClassVar[str]
    shifts: ClassVar[bool] = True

    def __init__(self, scale: float, timing: Timing | None = None) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise RequestError("scale", scale, "a guidance scale is a finite number, 0 or more", "Use 0 for no guidance.")
        self.scale, self.timing = scale, timing or Timing()

    def strength(self, level: Level) -> float:
        """Scale times gain at this level; 0 on steps where the term does not act."""
        return self.scale * self.timing.strength(level) if self.timing.due(level) else 0.0

    def begin(self) -> None:  # noqa: B027 - most terms keep nothing
        """Called where a path of levels starts (and off a path at every evaluation): forget what was kept of the last one."""

    def tell(self, condition: Condition, level: Level) -> Condition:
        """The condition that the network gets while the term acts; most terms leave it unchanged."""
        return condition

    @abstractmethod
    def shift(self, step: Step) -> Tensor:
        """What to add to x0_hat, the shape of x_t."""


class Smoothing(Request):
    """A potential averaged over disturbed views of what it looks at, so that no single pixel pattern pleases it.

    Of images, the likelihood exp(-U) is averaged, as in TFG's Monte-Carlo smoothing; of sets, the energy U.

    Attributes:
        samples: Views; 1 with nothing else set is the potential itself.
        noise: Deviation of Gaussian noise, in units of r = sigma / sqrt(alpha^2 + sigma^2), so that it ends with the noise.
        shift: Images are moved by up to this many pixels in each direction.
        flip: Every second view is mirrored: for photographs, not for digits.
    """

    samples: Positive = 1
    noise: Weight = 0.0
    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False

    @property
    def active(self) -> bool:
        return self.noise > 0 or self.shift > 0 or (self.flip and self.samples > 1)

    def views(self, images: Tensor, level: Level, seed: int = 0) -> Iterator[Tensor]:
        """Disturbed copies of images (n, c, h, w), differentiable; by the seed and the step's index alone."""
        draw = torch.Generator().manual_seed((seed * 1_000_003 + (level.index or 0)) % 2**32)
        deviation = self.noise * float(level.sigma / level.total)
        for number in range(self.samples):
            view = images
            if self.shift:
                rows, columns = (torch.randint(2 * self.shift + 1, (2,), generator=draw)).tolist()
                height, width = images.shape[-2:]
                padded = pad(view, (self.shift,) * 4, mode="replicate")
                view = padded[..., rows : rows + height, columns : columns + width]
            if self.flip and number % 2:
                view = view.flip(-1)
            if deviation:
                view = view + deviation * torch.randn(images.shape, generator=draw).to(images)
            yield view


class Pull(Request):
    """How a potential's gradient becomes a shift.

    Attributes:
        jacobian: "exact": back through the denoiser; "gaussian": d x0_hat / d x_t as for unit-variance data;
            "identity": the gradient at x0_hat used as if at x_t.
        normalize: "rms": shift = -scale * r * g / rms(g), r = sigma / sqrt(alpha^2 + sigma^2), without unit, the rms over
            the cohort for a potential of sets and over each image for one of images; "rms-image": over each image for
            every potential; "sample": x_t itself moves by scale * rms(x_t), so shift = -scale * rms(x_t) / alpha * g /
            rms(g), each image by itself; "none": the gradient's own size, -(sigma^2 / alpha) grad_{x_t} U.
        hold: With `every` > 1, where the rule is "shift" and normalize rms or rms-image: on the steps between, the last
            direction is used again, at the present r. None, in a recipe: where rule, normalize and every allow it.
        reduce: The potential looks at images of 1/reduce of the resolution (`Denoiser.preview`), at about 1/reduce^2 of
            the decoder's cost; its exemplars must have been shrunk alike. None, in a recipe: 1 for pixel models, for models
            of latents the factor at which a linear map, fitted to the exemplars, replaces the decoder (1 without exemplars).
        input: What is decoded for the potential to look at: "x0_hat"; "x_t", divided by its rms where that exceeds 1;
            "blend", x0_hat and x_t by shares of r and 1 - r (c-VSG); or "state", x_t / n, not decoded, for
            networks that know noise. The gradient at x_t and state needs no denoiser.
        rule: "shift": of x0_hat, the score's own correction. Or what some papers do instead, to the sample: "held", x_s +=
            alpha_s * shift after a step, eps held fixed (TFG, c-VSG); "ancestral", the mean of x_s moves by (V + boost *
            sin(pi i / N) * max V) * scale * -g, V the variance that is sampled with (EluCD on DDPM); "before", x_t += alpha_t *
            shift before the step is evaluated (EluCD on EDM). "held" and "ancestral" look at the x0_hat that the sample is
            made of, with the shifts of terms that are no potentials (classifier-free guidance's).
        inner: The number of gradient steps on x0_hat, each of the full strength (Universal guidance, TFG); not through the
            denoiser, so with a gaussian or identity jacobian.
    """

    jacobian: Jacobian = "exact"
    normalize: Normalize = "rms"
    hold: bool | None = False
    reduce: Positive | None = 1
    input: Input = "x0_hat"
    rule: Rule = "shift"
    inner: Positive = 1
    smoothing: Smoothing = Smoothing()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.hold and (self.normalize in ("none", "sample") or self.rule != "shift"):
            raise RequestError(
                "hold", True, "a held direction needs a gradient normalized by rms, and the rule shift", "Set hold to false."
            )
        if self.inner > 1 and (self.jacobian == "exact" or self.input != "x0_hat" or self.rule == "ancestral"):
            remedy = "Use a gaussian or identity jacobian, the input x0_hat and the rule shift or held, or inner 1."
            raise RequestError("inner", self.inner, "inner steps move x0_hat; they can't go back through the denoiser", remedy)
        if self.rule == "before" and self.input not in ("x_t", "state"):
            raise RequestError("input", self.input, "the rule before acts where there is no estimate yet", "Use the input x_t.")
        if self.rule == "ancestral" and (self.normalize != "none" or self.jacobian == "exact"):
            problem = "the ancestral rule takes the plain gradient at x0_hat"
            remedy = "Use normalize none and jacobian identity."
            raise RequestError("normalize, jacobian", (self.normalize, self.jacobian), problem, remedy)
        return self


class Potential(Guidance):
    """A term given by an energy of what an extractor sees in the decoded denoised images; `Guided` lowers it.

    Class attributes:
        per: "set" where the energy couples the images of a cohort, "image" where each has its own.

    Attributes:
        seed: Of the draws of `pull.smoothing`.
    """

    per: ClassVar[Literal["set", "image"]]

    def __init__(
        self, extractor: FeatureExtractor, scale: float, timing: Timing | None = None, pull: Pull | None = None
    ) -> None:
        super().__init__(scale, timing)
        self.extractor, self.pull, self.seed = extractor, pull or Pull(), 0

    def at(self, level: Level) -> Potential:
        """The potential as it stands at a level of noise; itself for most."""
        return self

    def measured(self, level: Level) -> float | Tensor:
        """Its strength once it has seen the images; most terms return `strength` unchanged."""
        return self.strength(level)

    def view(self, images: Tensor) -> Tensor:
        """What is seen in images (n, c, h, w): (n, D); the extractor's features where nothing else is said."""
        return self.extractor(images)

    @abstractmethod
    def energy(self, features: Tensor) -> Tensor:
        """What `view` saw of the cohort, (n, D) -> energy: shape () for a set, (n,) for images; lowered."""

    def shift(self, step: Step) -> Tensor:
        raise TypeError("potentials share one backward pass, so only Guided computes their shift")


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
        self,
        extractor: FeatureExtractor,
        exemplars: Tensor,
        scale: float,
        *,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, scale, timing, pull)
        if exemplars.ndim != 2 or not len(exemplars):
            problem = f"{self.name} guidance needs features (k, D), k >= 1"
            raise RequestError("exemplars", tuple(exemplars.shape), problem, "Give at least one exemplar of the class.")
        self.exemplars = exemplars.detach()
