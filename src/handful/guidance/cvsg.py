"""c-VSG: contextualised Vendi score guidance (Askari Hemmat et al., ECCV 2024): diverse, and in the exemplars' context.

It maximises, for the generated Y and the Vendi score VS of `vendi.py`,

    VS(memory + Y) - beta VS(exemplars + Y)

new against what was generated before, nothing new against the exemplars. Here Y is the cohort, which is generated together
and so is its own memory; images of before can be added, in Python. Cohorts of a run do not remember each other, since then
the images of one would depend on which others were made, in which order: so a class is as diverse as its cohort is large.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from handful.features.extractor import FeatureExtractor
from handful.guidance.base import ExemplarPotential, Pull, Timing
from handful.guidance.method import ByExemplarsRequest, Context
from handful.guidance.settings import Weight
from handful.guidance.vendi import vendi_score


class CVSGRequest(ByExemplarsRequest):
    """Contextualised Vendi score guidance by the exemplars.

    Attributes:
        beta: Of the exemplars' term; the paper's is 2, and 0 is vendi.
    """

    method: Literal["cvsg"] = "cvsg"
    beta: Weight = 2.0

    def build(self, context: Context) -> CVSG:
        return CVSG(*self.seen(context), beta=self.beta, **self.when())


class CVSG(ExemplarPotential):
    """Contextualised Vendi score guidance of a cohort of one class.

    Args:
        extractor: phi; the paper's is CLIP.
        exemplars: phi of the exemplars, (k, D).
        scale, timing, pull: See `Potential`; the paper's pull is in recipes/sd15-cvsg.yaml.
        beta: Weight of the exemplars' term; the paper's 2.
        memory: phi of images that were generated before, (m, D); None for none.

    Raises:
        RequestError: If there is no exemplar, or beta is negative.
    """

    name = "cvsg"

    def __init__(
        self,
        extractor: FeatureExtractor,
        exemplars: Tensor,
        scale: float,
        *,
        beta: float = 2.0,
        memory: Tensor | None = None,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, exemplars, scale, timing=timing, pull=pull)
        self.beta, self.memory = CVSGRequest(beta=beta).beta, exemplars[:0] if memory is None else memory.detach()

    def energy(self, features: Tensor) -> Tensor:
        generated = torch.cat([self.memory.to(features), features])
        return self.beta * vendi_score(torch.cat([self.exemplars.to(features), features])) - vendi_score(generated)
