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

import math

import torch
from torch import Tensor

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.guidance.base import ExemplarPotential, Pull, Timing
from handful.guidance.distances import squared_distances


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


class Chamfer(ExemplarPotential):
    """Chamfer guidance of a cohort of one class by that class's exemplars.

    Args:
        extractor: phi.
        exemplars: phi of the exemplars, (k, D).
        scale, timing, pull: See `Potential`.
        coverage_weight, fidelity_weight: w_c and w_f.
        margin: m; 0 is the paper's formula.

    Raises:
        RequestError: If there is no exemplar, a weight is negative or both are 0, or the margin is negative or stands
            on a single exemplar, which has no spacing.
    """

    name = "chamfer"

    def __init__(
        self,
        extractor: FeatureExtractor,
        exemplars: Tensor,
        scale: float,
        *,
        coverage_weight: float = 1.0,
        fidelity_weight: float = 1.0,
        margin: float = 0.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, exemplars, scale, timing=timing, pull=pull)
        weights = (coverage_weight, fidelity_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or max(weights) == 0:
            raise RequestError(
                "coverage_weight, fidelity_weight",
                weights,
                "weights are finite, 0 or more, and not both 0",
                "Use 1 and 1 for the paper's.",
            )
        if not (math.isfinite(margin) and margin >= 0) or (margin and len(exemplars) < 2):
            raise RequestError(
                "margin",
                margin,
                f"it is 0 or more, and above 0 needs 2 exemplars ({len(exemplars)} here)",
                "Use 0 for the paper's formula, or give more exemplars.",
            )
        self.coverage_weight, self.fidelity_weight, self.margin = *weights, margin
        self.slack = margin**2 * spacing(self.exemplars) if margin else None

    def energy(self, features: Tensor) -> Tensor:
        slack = None if self.slack is None else self.slack.to(features)
        weights = self.coverage_weight, self.fidelity_weight
        return chamfer_distance(self.exemplars.to(features), features, *weights, slack)
