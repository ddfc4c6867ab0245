"""CRDI: many images of a new domain from ten (Cao & Gong, ECCV 2024, arXiv 2407.07249): sampling with fitted embeddings.

Each target image i has a learned shift of the score for each segment e of the guided steps, G[i, e] of the image's shape
(its sample-wise guidance embeddings, SGE):

    eps' = eps - sigma s G    <=>    x0_hat' = x0_hat + (sigma^2 / alpha) s G         since x_t = alpha x0_hat + sigma eps

An image starts from a noised target and walks down by DDIM. Inside the guided interval it is given the G of a randomly
chosen target ("relaxing") with an annealed perturbation; below it the model is left alone. `inversion_fit` learns G.

Steps are counted from the clean end, as there: step 0 is the last one of a path, and an interval (lo, hi) holds the steps
lo <= i < hi. alpha and sigma are the level's at unit variance (alpha^2 + sigma^2 = 1), as the paper's models have them; for
flow and EDM paths that means x_t / n, so embeddings do not depend on a network's parametrization.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import Level, Levels, noised
from handful.core.samplers import ddim
from handful.errors import RequestError, counted
from handful.guidance.base import Guidance, Step, Timing
from handful.guidance.draws import normal, random_at
from handful.guidance.embeddings import Embeddings
from handful.guidance.guided import Guided
from handful.guidance.method import Context, File, TermRequest
from handful.guidance.settings import Weight

Exchange = Literal["step", "image", "none"]

NAME_IT = "Name the file that handful invert wrote (--embeddings FILE)."
_OWN, _EXCHANGE, _PERTURBATION, _START = 1, 2, 3, 4  # what an image's random numbers are for; see draws.py


class InversionRequest(TermRequest):
    """Guidance by a new domain's fitted embeddings (CRDI).

    Images start from noised targets, and path, clamp and condition are those of the fit.

    Attributes:
        scale: 1 is the strength of the fit; 0 noises and denoises the targets without guidance (SDEdit).
        exchange: Whose embeddings an image is given: at every guided "step" those of a target chosen anew (the paper's
            relaxing), for the whole "image" those of one chosen target, or with "none" those of its own target.
        perturbation: Of the embeddings, annealed; None takes what the file says.
    """

    needs = frozenset({"embeddings"})

    method: Literal["inversion"] = "inversion"
    embeddings: Annotated[File, Field(json_schema_extra={"missing": NAME_IT})]
    exchange: Exchange = "step"
    perturbation: Weight | None = None

    @property
    def embeddings_file(self) -> Path:
        return Path(self.embeddings).expanduser()

    def build(self, context: Context) -> Inversion:
        assert context.embeddings is not None, "embeddings: read the file first (handful.recipe.inverting.read_inversion)"
        options = {"exchange": self.exchange, "perturbation": self.perturbation}
        return Inversion(context.embeddings, context.seeds, self.scale, **options, timing=self.timing())


class Inversion(Guidance):
    """A target's embeddings as a term.

    Every random choice is an image's own, a function of its seed and of the step: it does not depend on the cohort, on its
    order or chunks, nor on how often a level is evaluated. (The original permutes the targets over its batch at every step:
    the same for each image, but not for the batch.)

    Args:
        seeds: One per image of the cohort, in its order.
        scale: 1 is the strength of the fit, 0 no guidance.
        own: The place of each image's own target, from which it starts; None chooses by its seed.
        perturbation: a of s G + a (step - lo) / (hi - lo) N(0, 1); None takes the embeddings'.
        timing: Where inside the guided interval it acts.

    Raises:
        RequestError: If a setting is out of its range.
    """

    name = "inversion"

    def __init__(
        self,
        embeddings: Embeddings,
        seeds: Sequence[int],
        scale: float = 1.0,
        *,
        exchange: Exchange = "step",
        own: Sequence[int] | None = None,
        perturbation: float | None = None,
        timing: Timing | None = None,
    ) -> None:
        super().__init__(scale, timing)
        perturbation = embeddings.perturbation if perturbation is None else perturbation
        InversionRequest(embeddings="them", exchange=exchange, perturbation=perturbation)
        own = list(own) if own is not None else own_targets(seeds, len(embeddings))
        if len(own) != len(seeds) or not all(0 <= target < len(embeddings) for target in own):
            problem = f"it must name a target (0 to {len(embeddings) - 1}) for each of {counted(len(seeds), 'image')}"
            raise RequestError("own", own, problem, "Leave it out to have them chosen.")
        self.embeddings, self.seeds, self.own = embeddings, list(seeds), own
        self.exchange: Exchange = exchange
        self.perturbation = perturbation

    def strength(self, level: Level) -> float:
        return 0.0 if self.embeddings.step_of(level) is None else super().strength(level)

    def shift(self, step: Step) -> Tensor:
        place = self.embeddings.step_of(step.level)
        if len(step.x_t) != len(self.seeds):
            raise ValueError(
                f"the cohort has {counted(len(step.x_t), 'image')}, and this term has {counted(len(self.seeds), 'seed')}"
            )
        if place is None:
            return torch.zeros_like(step.x_t)
        score = self.embeddings.scale * self.embeddings.G[self.targets_at(place), self.embeddings.segment_of(place)]
        lo, hi = self.embeddings.interval
        if amount := self.perturbation * (place - lo) / (hi - lo):  # of the score itself: it is not multiplied by s
            score = score + amount * normal(self.seeds, self.embeddings.shape, place, 0, _PERTURBATION).to(score)
        return self.strength(step.level) * score_factor(step.level) * score.to(step.x_t)

    def targets_at(self, step: int) -> list[int]:
        """Whose embeddings each image is given at a guided step."""
        if self.exchange == "none":
            return self.own
        return _chosen(self.seeds, len(self.embeddings), step + 1 if self.exchange == "step" else 0, _EXCHANGE)


def own_targets(seeds: Sequence[int], targets: int) -> list[int]:
    """For each image the target that it starts from, chosen by its seed."""
    return _chosen(seeds, targets, 0, _OWN)


def noised_start(x0: Tensor, which: Sequence[int], noise: Tensor, levels: Levels, hi: int) -> tuple[Tensor, Levels]:
    """Targets noised to the top of an interval, and the path from there (with plain DDIM after it: SDEdit).

    Args:
        x0: The targets (N, c, h, w).
        which: The place of each image's target, n of them.
        noise: Standard normal, (n, c, h, w).
        hi: The interval's upper end, as steps of this path.

    Returns:
        The states (n, c, h, w), and the last `hi` steps of the path.

    Raises:
        RequestError: If the path has no such step.
    """
    if not 1 <= hi <= levels.steps:
        raise RequestError(
            "interval", hi, f"the path has only {counted(levels.steps, 'step')}", "Give a smaller number of steps."
        )
    path = levels.last(hi)
    return noised(x0.to(noise)[list(which)], noise, path[0]), path


@torch.no_grad()
def reconstruct(
    denoiser: Denoiser,
    embeddings: Embeddings,
    seed: int = 0,
    *,
    exchange: Exchange = "none",
    perturbation: float = 0.0,
    condition: Condition | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The targets from their own noised selves, by DDIM with their own embeddings: how far those invert the model.

    Args:
        denoiser: The model that they were fitted on.
        seed: Of the noise, each target's its own.
        exchange, perturbation: As for `Inversion`; by default there is neither.
        condition: N conditions; None: `no_condition`.
        chunk: At most this many images at once through the network.

    Returns:
        x0 (N, c, h, w), on the targets' device.
    """
    keys = target_keys(seed, len(embeddings))
    noise = normal(keys, embeddings.shape, 0, 0, _START).to(embeddings.x0)
    own = range(len(embeddings))
    term = Inversion(embeddings, keys, exchange=exchange, own=own, perturbation=perturbation)
    x, levels = noised_start(embeddings.x0, own, noise, embeddings.levels, embeddings.interval[1])
    return ddim(Guided(denoiser, [term], chunk), x, levels, condition or no_condition(denoiser, len(embeddings)))


def no_condition(denoiser: Denoiser, n: int) -> Condition:
    """The condition "no class" for n images.

    Raises:
        RequestError: If the model takes labels and has no null class.
    """
    if denoiser.prompted:
        return denoiser.condition([""] * n)
    if denoiser.label_count and denoiser.null_class is None:
        problem = "this model takes labels, and has no null class"
        raise RequestError("condition", None, problem, "Name the null class's label with --null-class, or give a class.")
    return denoiser.condition([denoiser.null_class or 0] * n)


def score_factor(level: Level) -> float:
    """sigma^2 / alpha at unit variance: what turns a shift of the score into one of x0_hat."""
    return float(level.sigma**2 / (level.alpha * level.total))


def target_keys(seed: int, n: int) -> list[int]:
    """A key of random numbers for each of n targets: of the seed and its place, whatever their number."""
    return [seed + ((place + 1) << 64) for place in range(n)]


def _chosen(seeds: Sequence[int], targets: int, step: int, purpose: int) -> list[int]:
    return [int(random_at(seed, step, 0, purpose).randint(targets)) for seed in seeds]
