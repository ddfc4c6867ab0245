"""The Vendi score as a potential: diversity inside the cohort.

    VS(F) = exp(-sum_i l_i log l_i),   l the eigenvalues of K / n, K the cosine similarities of the rows of F

(Friedman & Dieng, TMLR 2023; other orders: Pasarkar & Dieng, AISTATS 2024).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Potential, Pull, Timing
from handful.guidance.method import Context, FeaturesRequest

_LEAST = 1e-10  # eigenvalues below count as 0: their logarithm's derivative would be all that is seen


def vendi_score(features: Tensor, order: float = 1.0) -> Tensor:
    """The Vendi score of features (n, D), differentiable; shape (). Computed in float64.

    Rows of zeros, which have no direction, count as nothing; without others the score is 1.

    Args:
        order: q > 0 of the Renyi entropy; 1 is Shannon's, infinity 1 / the largest eigenvalue.
    """
    unit = normalize(features.double(), dim=1)
    kernel = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    shares = torch.linalg.eigvalsh(kernel / len(unit))
    kept = shares > _LEAST  # by `where`, not by taking them out: a shape that follows from numbers can't be counted (cost)
    nothing = (~kept.any()).to(shares)
    shares = shares.where(kept, 0)
    shares = shares / (shares.sum() + nothing)
    if math.isinf(order):
        return (1 / (shares.max() + nothing)).to(features.dtype)
    safe = shares.where(kept, 1)
    if order == 1:
        return torch.exp(-(shares * safe.log()).sum()).to(features.dtype)
    return (((safe.pow(order) * kept).sum() + nothing).log() / (1 - order)).exp().to(features.dtype)


class VendiRequest(FeaturesRequest):
    """Guidance towards a diverse cohort."""

    method: Literal["vendi"] = "vendi"
    order: Annotated[float, Field(gt=0)] = 1.0

    def build(self, context: Context) -> Vendi:
        return Vendi(self.extractor(context), self.scale, order=self.order, **self.when())


class Vendi(Potential):
    """Guidance to a cohort whose images differ: raises its Vendi score."""

    name = "vendi"
    per = "set"

    def __init__(
        self,
        extractor: FeatureExtractor,
        scale: float,
        *,
        order: float = 1.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, scale, timing, pull)
        if not order > 0:
            raise RequestError("order", order, "the order must be above 0", "Use 1 for the usual Vendi score.")
        self.order = order

    def energy(self, features: Tensor) -> Tensor:
        return -vendi_score(features, self.order)
