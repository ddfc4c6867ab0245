"""CRDI's fitted embeddings, as data and as a file; `inversion` samples with them, `inversion_fit` learns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from handful.core.noise import Level, Levels
from handful.data.images import write_atomically
from handful.errors import RequestError, counted
from handful.files.sealed import seal, unseal

KIND, VERSION = "sample-wise guidance embeddings", 1
FIT_AGAIN = "Fit the targets again (handful invert)."


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The embeddings of N targets, and all that sampling with them takes.

    Attributes:
        G: (N, eta, c, h, w) float32; segment 0 is the one at the clean end.
        x0: The targets as the denoiser has them, pixels or latents; (N, c, h, w) float32.
        levels: The path they were fitted on.
        interval: (lo, hi), the guided steps counted from the clean end.
        scale: s, the strength they were fitted with.
        perturbation: a, the perturbation to sample with where nothing else is asked.
        model: The digest of the model's weights, as the caller takes it.
        targets: The targets' content hashes; empty where unknown.
        fitted: How they were fitted, for people: what JSON can hold.
    """

    G: Tensor
    x0: Tensor
    levels: Levels
    interval: tuple[int, int] = (5, 20)
    scale: float = 2.0
    perturbation: float = 0.05
    model: str = ""
    targets: tuple[str, ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.G.ndim != 5 or not len(self.G) or self.x0.shape != (len(self.G), *self.shape):
            raise ValueError(
                f"embeddings {tuple(self.G.shape)} and targets {tuple(self.x0.shape)} must be (N, eta, c, h, w) "
                "and (N, c, h, w), N >= 1"
            )
        check_interval(self.interval, self.segments, self.levels)

    def __len__(self) -> int:
        return len(self.G)

    @property
    def segments(self) -> int:
        """eta."""
        return self.G.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        return (self.G.shape[2], self.G.shape[3], self.G.shape[4])

    def segment_of(self, step: int) -> int:
        """The segment of a guided step.

        Raises:
            ValueError: If the step lies outside the interval.
        """
        for segment, steps in enumerate(segment_steps(self.interval, self.segments)):
            if step in steps:
                return segment
        raise ValueError(f"step {step} is not inside the guided interval {self.interval}")

    def step_of(self, level: Level) -> int | None:
        """The guided step that a level belongs to, of whatever path: the fitted path's nearest in sigma / (alpha + sigma).

        None outside the interval, and above the fitted path's start.

        Raises:
            ValueError: If there is a level for each image.
        """
        if level.alpha.ndim:
            raise ValueError("level: embeddings belong to one level for the whole cohort, not to one for each image")
        alpha, sigma = self.levels.alpha[:-1], self.levels.sigma[:-1]
        path, here = sigma / (alpha + sigma), level.sigma / (level.alpha + level.sigma)
        step = self.levels.steps - 1 - int((path - here).abs().argmin())
        lo, hi = self.interval
        return step if lo <= step < hi and here <= path[0] + 1e-9 else None

    def check(self, shape: tuple[int, int, int], model: str) -> None:
        """Refuses to guide a model that they were not fitted on."""
        if tuple(shape) != self.shape:
            problem = f"they were fitted on a model of {_by(self.shape)}, and this one has {_by(shape)}"
            raise RequestError("embeddings", self.shape, problem, f"Use that model. {FIT_AGAIN}")
        if model != self.model:
            problem = (
                "they were fitted on another model: its weights are "
                f"{self.model[:12] or 'unknown'} and this one's {model[:12] or 'unknown'}"
            )
            raise RequestError("embeddings", self.model[:12], problem, f"Use that model. {FIT_AGAIN}")

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically; the same embeddings give the same bytes.

        Raises:
            OSError: If it can't be written; nothing is left behind.
        """
        tensors = {"G": self.G, "x0": self.x0, "alpha": self.levels.alpha, "sigma": self.levels.sigma}
        names = ("interval", "scale", "perturbation", "model", "targets", "fitted")
        write_atomically(Path(path).expanduser(), seal(KIND, VERSION, {name: getattr(self, name) for name in names}, tensors))

    @classmethod
    def load(cls, path: str | Path, *, field: str = "embeddings") -> Embeddings:
        """Reads what `save` wrote.

        Args:
            field: What the file is called in errors.

        Raises:
            RequestError: If it is no such file, of another version, damaged or cut short.
        """
        settings, tensors = unseal(path, KIND, VERSION, field=field, remedy=FIT_AGAIN)
        settings |= {"interval": tuple(settings["interval"]), "targets": tuple(settings["targets"])}
        return cls(tensors["G"], tensors["x0"], Levels(tensors["alpha"], tensors["sigma"]), **settings)


def check_interval(interval: tuple[int, int], segments: int, levels: Levels) -> None:
    """Refuses an interval that the path does not have, and more segments than it has guided steps."""
    lo, hi = interval
    if not 0 <= lo < hi <= levels.steps:
        problem = f"the interval (lo, hi) must lie within the path's steps, 0 to {levels.steps}, with lo below hi"
        raise RequestError("interval", interval, problem, "Count the steps from the clean end; the paper's is (5, 20) of 25.")
    if not 1 <= segments <= hi - lo:
        remedy = f"Use 1 for one embedding over all steps, {hi - lo} for one per step."
        raise RequestError(
            "segments", segments, f"{hi - lo} guided steps can be cut into 1 to {counted(hi - lo, 'segment')}", remedy
        )
    if not bool(levels.alpha[levels.steps - hi] > 0):
        raise RequestError(
            "interval", interval, "it reaches pure noise, where there is no image to shift", f"Let it end at {hi - 1} or lower."
        )


def segment_steps(interval: tuple[int, int], segments: int) -> list[range]:
    """The guided steps cut into contiguous runs, the first at the clean end; where they differ, the first are longer by one."""
    length, longer = divmod(interval[1] - interval[0], segments)
    ends = [interval[0] + length * e + min(e, longer) for e in range(segments + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
