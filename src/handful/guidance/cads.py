"""CADS: condition-annealed diffusion sampling (Sadat et al., ICLR 2024, arXiv 2310.17347), usually beside CFG.

The condition y (a prompt's embeddings, or the network's own embedding of a class), is noised early on the path
and clean at its end. With t the time left, 1 at the path's start and 0 at its last step, at each step anew:

    y'  = sqrt(g) y + s sqrt(1 - g) n          n standard normal;   g = 1 up to tau1, 0 from tau2 on, linear between
    y'' = psi ((y' - mean(y')) / std(y') * std(y) + mean(y)) + (1 - psi) y'

Means and deviations are each image's own, over all of one embedding, so that no image depends on its neighbours. The null
condition, which CFG compares with, stays unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from handful.core.denoiser import Condition
from handful.core.noise import Level
from handful.errors import RequestError, counted
from handful.guidance.base import Guidance, Step, Timing
from handful.guidance.draws import normal
from handful.guidance.method import Context, TermRequest
from handful.guidance.settings import Weight

Share = Annotated[float, Field(ge=0, le=1)]

# Which embeddings of a prompt are noised, by name; SDXL's sizes of the image and masks of tokens are not.
EMBEDDINGS = ("text", "pooled")

_LABEL, _PURPOSE = len(EMBEDDINGS), 5  # places of an image's random numbers; see draws.py


def annealed(y: Tensor, noise: Tensor, g: float, s: float, psi: float) -> Tensor:
    """y'', above.

    Args:
        y: The condition's embedding, (n, ...).
        noise: Standard normal, its shape.
        g: Share of the signal, 0 to 1.
        s: Scale of the noise.
        psi: Share of the rescaled embedding, 0 to 1.

    Returns:
        The shape of y; an embedding without any spread keeps its mean.
    """
    over = tuple(range(1, y.ndim))
    noisy = math.sqrt(g) * y + s * math.sqrt(1 - g) * noise
    spread = noisy.std(over, correction=0, keepdim=True)
    unit = (noisy - noisy.mean(over, keepdim=True)) / spread.where(spread > 0, 1)
    rescaled = unit * y.std(over, correction=0, keepdim=True) + y.mean(over, keepdim=True)
    return psi * rescaled + (1 - psi) * noisy


class CADSRequest(TermRequest):
    """Condition-annealed sampling, usually beside cfg.

    Attributes:
        scale: s, of the noise on the condition.
        tau1, tau2: Of the time left: the condition is clean up to tau1, and nothing but noise from tau2 on.
        mix: psi, the share of the rescaled condition: below 1 more noise, and more diversity.
    """

    needs = frozenset({"noisy condition"})
    alone = True

    method: Literal["cads"] = "cads"
    scale: Weight = 0.1
    tau1: Share = 0.6
    tau2: Share = 0.9
    mix: Share = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.tau1 > self.tau2:
            problem = "tau1 must not be above tau2: the condition is clean up to tau1, and pure noise from tau2 on"
            raise RequestError("tau1, tau2", (self.tau1, self.tau2), problem, "The defaults are 0.6 and 0.9.")
        return self

    def build(self, context: Context) -> CADS:
        return CADS(context.seeds, self.scale, tau1=self.tau1, tau2=self.tau2, mix=self.mix, timing=self.timing())


class CADS(Guidance):
    """Noise on the condition, for cohorts that differ more. It shifts nothing and costs no evaluation.

    Args:
        seeds: One per image of the cohort. An image's noise is a function of its seed and the step, so a step that is
            evaluated twice (Heun, recurrence) sees the same.
        scale: s, in units of the embedding.
        tau1, tau2, mix: See `CADSRequest`.

    Raises:
        RequestError: If a setting is out of its range.
    """

    name = "cads"
    shifts = False

    def __init__(
        self,
        seeds: Sequence[int],
        scale: float = 0.1,
        *,
        tau1: float = 0.6,
        tau2: float = 0.9,
        mix: float = 1.0,
        timing: Timing | None = None,
    ) -> None:
        super().__init__(scale, timing)
        asked = CADSRequest(tau1=tau1, tau2=tau2, mix=mix)
        self.seeds, self.tau1, self.tau2, self.mix = tuple(seeds), asked.tau1, asked.tau2, asked.mix

    def signal(self, level: Level) -> float:
        """g at this level."""
        t = 1 - level.progress
        if t <= self.tau1:
            return 1.0
        return 0.0 if t >= self.tau2 else (self.tau2 - t) / (self.tau2 - self.tau1)

    def tell(self, condition: Condition, level: Level) -> Condition:
        """The condition noised: embeddings themselves, labels by a perturbation of what the network makes of them.

        Raises:
            RequestError: If the network has no condition, or another term has noised its labels already.
        """
        g = self.signal(level)
        if g == 1 or condition.nothing:
            return condition
        noised = Annealing(self.seeds, level.index or 0, g, self.strength(level), self.mix)
        embeddings = dict(condition.embeddings)
        found = [name for name in EMBEDDINGS if name in embeddings and embeddings[name].is_floating_point()]
        if not found and condition.labels is None:
            problem = "this model takes neither labels nor prompts, so there is nothing to put noise on"
            remedy = "Use a model that takes labels or prompts, or leave this guidance out."
            raise RequestError("guidance", self.name, problem, remedy)
        if not found:
            if condition.perturbation is not None:
                raise RequestError("guidance", self.name, "there are two of them", "Leave one out.")
            return replace(condition, perturbation=noised)
        return replace(condition, embeddings=embeddings | {name: noised.of(embeddings[name], name) for name in found})

    def shift(self, step: Step) -> Tensor:
        return torch.zeros_like(step.x_t)


@dataclass(frozen=True)
class Annealing:
    """The noise of some images at one step, put on any embedding of theirs."""

    seeds: tuple[int, ...]
    index: int
    g: float
    s: float
    psi: float
    _drawn: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, part: slice) -> Annealing:
        return replace(self, seeds=self.seeds[part], _drawn={})

    def __call__(self, embedding: Tensor) -> Tensor:
        """A network's embedding of the labels (n, ...) -> noised. All layers' embeddings (DiT) get the same noise."""
        return self._noised(embedding, _LABEL)

    def of(self, embedding: Tensor, name: str) -> Tensor:
        """An embedding (n, ...) of the name -> noised."""
        return self._noised(embedding, EMBEDDINGS.index(name))

    def _noised(self, embedding: Tensor, which: int) -> Tensor:
        if len(embedding) != len(self.seeds):
            raise ValueError(
                f"the cohort has {counted(len(embedding), 'image')}, and CADS has {counted(len(self.seeds), 'seed')}"
            )
        shape = tuple(embedding.shape[1:])
        key = (which, *shape)
        if key not in self._drawn:
            self._drawn[key] = normal(self.seeds, shape, self.index, which, _PURPOSE)
        dtype = embedding.dtype if embedding.dtype == torch.float64 else torch.float32
        y = embedding.to(dtype)
        return annealed(y, self._drawn[key].to(y), self.g, self.s, self.psi).to(embedding.dtype)
