"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): shift = w * (x0_hat(c) - x0_hat(null)).

Here w = 0 is the conditional model. diffusers' `guidance_scale` is w + 1. Its price is a second evaluation a step. With
`timing=Timing(noise=(lo, hi))` it is limited-interval guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from handful.guidance.base import Guidance, Step
from handful.guidance.method import Context, TermRequest


class CFG(Guidance):
    """Classifier-free guidance; the model must have a null condition."""

    name = "cfg"

    def shift(self, step: Step) -> Tensor:
        return self.strength(step.level) * (step.x0_hat - step.x0_hat_null)


class CFGRequest(TermRequest):
    """Classifier-free guidance; scale 0 is the conditional model (diffusers' `guidance_scale` is `scale + 1`).

    With `noise` or `interval` it is limited-interval guidance.
    """

    needs = frozenset({"null condition"})

    method: Literal["cfg"] = "cfg"

    def build(self, context: Context) -> CFG:
        return CFG(self.scale, self.timing())
