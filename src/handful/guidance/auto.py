"""Energy guidance whose strength is measured, not chosen: ours (docs/findings.md).

How far the exemplars lie from what the model draws is seen in the means alone. With k exemplars X, a cohort Y of n,

    M = |mean X - mean Y|^2 - S_X / k - S_Y / n          S: summed sample variances
    shift = max(M, 0) / (max(M, 0) + S_X)

M estimates the squared distance of the two distributions' means without bias, so the shift is about 0 where the model already
draws what the exemplars show, and near 1 where no exemplar looks like its images. The estimate x0_hat has the same mean as the
clean images at every level of noise, though less variance, so the shift can be measured at each step, on the cohort itself. The
energy's gradient then acts at `scale * shift`: strongly where there is far to go, and not at all where there is nowhere to go.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from handful.core.noise import Level
from handful.guidance.energy import Energy
from handful.guidance.method import ByExemplarsRequest, Context


def shift_between(exemplars: Tensor, generated: Tensor) -> Tensor:
    """The shift of the head of this file.

    Args:
        exemplars: (k, D). Of a single one the variance is unknown: the generated images' stands for it.
        generated: (n, D), n >= 2; of one nothing can be said, and the shift is 0.

    Returns:
        0 to 1, of no dimension: no number is taken from the device, and costs can be counted without data.
    """
    n, k = len(generated), len(exemplars)
    if n < 2:
        return generated.new_zeros(())
    of_generated = generated.var(0).sum()
    of_exemplars = exemplars.var(0).sum() if k > 1 else of_generated
    apart = (exemplars.mean(0) - generated.mean(0)).square().sum() - of_exemplars / k - of_generated / n
    apart = apart.clamp_min(0)
    return apart / (apart + of_exemplars).clamp_min(1e-30)


class Auto(Energy):
    """Energy guidance at `scale` times the shift that it measures at each step; see the head of this file."""

    name = "auto"
    _shift: float | Tensor = 0.0

    def energy(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            self._shift = shift_between(self.exemplars.to(features), features)
        return super().energy(features)

    def measured(self, level: Level) -> float | Tensor:
        return self._shift * self.strength(level)


class AutoRequest(ByExemplarsRequest):
    """Energy-distance guidance that measures by itself how strongly it should act; see `handful.guidance.auto`."""

    method: Literal["auto"] = "auto"

    def build(self, context: Context) -> Auto:
        return Auto(*self.seen(context), **self.when())
