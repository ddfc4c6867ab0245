"""Chamfer guidance (Dall'Asen et al., NeurIPS 2025, arXiv 2508.10631, equation 4).

    CD(X, Y) = w_c * 1/k sum_i min_j d(phi(x_i), phi(y_j))      coverage: every exemplar has a generated image near it
             + w_f * 1/n sum_j min_i d(phi(y_j), phi(x_i))      fidelity: every generated image has an exemplar near it

with exemplars X = {x_1 .. x_k} of one class, the cohort Y = {y_1 .. y_n} generated for it, features phi and d the squared
Euclidean distance. It needs no unconditional model.

With a margin m > 0 (ours, not the paper's) a pair closer than m times the exemplar's own spacing counts as touching:

    d'(x_i, y_j) = max(0, d(x_i, y_j) - m^2 s_i),   s_i = min_{l != i} d(x_i, x_l)

An exemplar then stands for its neighbourhood, not for a point. Nothing pulls a generated image nearer to an exemplar than
real images of the class lie to each other: it is not copied, and with few exemplars the fidelity term does not gather the
cohort in k spots (docs/findings.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Self

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import ExemplarPotential, Pull, Timing
from handful.guidance.distances import squared_distances
from handful.guidance.method import ByExemplarsRequest, Context
from handful.guidance.settings import Weight

SINGLE = "margin: none for a class with a single exemplar, as it is measured between neighbours; images may become copies"
COVERAGE_WEIGHT = 4.0  # with few exemplars the paper's 1 draws a cohort to them (docs/findings.md)


def spacing(exemplars: Tensor) -> Tensor:
    """s_i, each exemplar's squared distance to its nearest other one: (k, D) -> (k,); 0 for a single exemplar."""
    if len(exemplars) < 2:
        return exemplars.new_zeros(len(exemplars))
    d = squared_distances(exemplars, exemplars)
    return d.fill_diagonal_(torch.inf).amin(1)


def chamfer_distance(
    exemplars: Tensor,
    generated: Tensor,
    coverage_weight: float = 1.0,
    fidelity_weight: float = 1.0,
    slack: Tensor | None = None,
) -> Tensor:
    """The Chamfer distance of features.

    Args:
        exemplars: (k, D), k >= 1.
        generated: (n, D), n >= 1.
        coverage_weight, fidelity_weight: w_c and w_f; the paper's are 1.
        slack: (k,), the squared distance to each exemplar that counts as touching, m^2 s_i; None is the paper's 0.

    Returns:
        Shape ().
    """
    d = squared_distances(exemplars, generated)
    if slack is not None:
        d = (d - slack[:, None]).clamp_min(0)
    return coverage_weight * d.amin(1).mean() + fidelity_weight * d.amin(0).mean()


class ChamferRequest(ByExemplarsRequest):
    """Chamfer guidance by the exemplars.

    Attributes:
        coverage_weight, fidelity_weight: w_c and w_f; the paper's are 1 and 1.
        margin: m; 0 is the paper's formula. A recipe that leaves it open gets 1 where pixels compare the images.
    """

    method: Literal["chamfer"] = "chamfer"
    coverage_weight: Weight = COVERAGE_WEIGHT
    fidelity_weight: Weight = 1.0
    margin: Weight = 0.0

    @model_validator(mode="after")
    def _weighs(self) -> Self:
        if not (self.coverage_weight or self.fidelity_weight):
            raise RequestError("coverage_weight", 0.0, "both weights are 0", "The paper's are 1 and 1.")
        return self

    def of_few(self, fewest: int) -> str:
        return SINGLE if self.margin and fewest < 2 else ""

    def build(self, context: Context) -> Chamfer:
        return Chamfer(
            *self.seen(context),
            coverage_weight=self.coverage_weight,
            fidelity_weight=self.fidelity_weight,
            margin=self.margin,
            **self.when(),
        )


class Chamfer(ExemplarPotential):
    """Chamfer guidance of a cohort of one class by that class's exemplars.

    Args:
        extractor: phi.
        exemplars: phi of the exemplars, (k, D).
        scale, timing, pull: See `Potential`.
        coverage_weight, fidelity_weight, margin: See `ChamferRequest`.

    Raises:
        RequestError: If there is no exemplar, or a setting is out of its range.
    """

    name = "chamfer"

    def __init__(
        self,
        extractor: FeatureExtractor,
        exemplars: Tensor,
        scale: float,
        *,
        coverage_weight: float = COVERAGE_WEIGHT,
        fidelity_weight: float = 1.0,
        margin: float = 0.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, exemplars, scale, timing=timing, pull=pull)
        asked = ChamferRequest(coverage_weight=coverage_weight, fidelity_weight=fidelity_weight, margin=margin)
        self.weights = asked.coverage_weight, asked.fidelity_weight
        self.slack = margin**2 * spacing(self.exemplars) if margin else None

    def energy(self, features: Tensor) -> Tensor:
        slack = None if self.slack is None else self.slack.to(features)
        return chamfer_distance(self.exemplars.to(features), features, *self.weights, slack)
