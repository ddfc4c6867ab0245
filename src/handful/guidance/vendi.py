"""The Vendi score as a potential, and c-VSG on it: diversity inside the cohort, and context by the exemplars.

    VS(F) = exp(-sum_i l_i log l_i),   l the eigenvalues of K / n, K the cosine similarities of the rows of F

(Friedman & Dieng, TMLR 2023; other orders: Pasarkar & Dieng, AISTATS 2024). Contextualised Vendi score guidance (Askari Hemmat
et al., ECCV 2024) maximises

    VS(memory + Y) - beta VS(exemplars + Y)

for the generated Y: new against what was generated before, nothing new against the exemplars. Here Y is the cohort, which is
generated together and so is its own memory; images of before can be added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import ExemplarPotential, Potential, Pull, Timing

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


class Vendi(Potential):
    """Guidance to a cohort whose images differ: raises its Vendi score.

    Args:
        extractor: phi.
        scale, timing, pull: See `Potential`.
        order: q; see `vendi_score`.

    Raises:
        RequestError: If the order is not above 0.
    """

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
            raise RequestError("order", order, "an order is above 0", "Use 1 for the usual Vendi score.")
        self.order = order

    def energy(self, features: Tensor) -> Tensor:
        return -vendi_score(features, self.order)


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
        if not (math.isfinite(beta) and beta >= 0):
            raise RequestError("beta", beta, "a weight is finite and 0 or more", "The paper's is 2.")
        self.beta, self.memory = beta, exemplars[:0] if memory is None else memory.detach()

    def energy(self, features: Tensor) -> Tensor:
        generated = torch.cat([self.memory.to(features), features])
        return self.beta * vendi_score(torch.cat([self.exemplars.to(features), features])) - vendi_score(generated)
