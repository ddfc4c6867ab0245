"""Energy-distance guidance: ours, for few exemplars (docs/findings.md).

    U(X, Y) = 2/(kn) sum_ij |phi(x_i) - phi(y_j)| - 1/n^2 sum_jl |phi(y_j) - phi(y_l)|

is the energy distance between the exemplars X and the cohort Y but for a constant (Szekely & Rizzo 2013, "Energy
statistics", equation 5): zero only where the two distributions are one. Every image is drawn towards all exemplars and
pushed off its own kind. So the cohort as a whole moves to where the exemplars are and spreads as they do, where the nearest
neighbours of Chamfer guidance pull k images hard, or gather n images in k spots, when k is much smaller than n.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from handful.guidance.base import ExemplarPotential
from handful.guidance.distances import squared_distances
from handful.guidance.method import ByExemplarsRequest, Context

ROUND = 1e-6  # of the mean squared distance: keeps the gradient of |a - b| finite where a = b


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean Euclidean distance between the rows of a (m, D) and b (n, D); shape (), differentiable everywhere."""
    d = squared_distances(a, b)
    return (d + ROUND * d.detach().mean() + 1e-30).sqrt().mean()


def energy_distance(exemplars: Tensor, generated: Tensor) -> Tensor:
    """The energy distance, without the exemplars' own term: it is constant.

    Args:
        exemplars: (k, D), k >= 1.
        generated: (n, D), n >= 1.

    Returns:
        Shape ().
    """
    return 2 * mean_distance(exemplars, generated) - mean_distance(generated, generated)


class Energy(ExemplarPotential):
    """Energy-distance guidance of a cohort of one class by that class's exemplars; see `ExemplarPotential`."""

    name = "energy"

    def energy(self, features: Tensor) -> Tensor:
        return energy_distance(self.exemplars.to(features), features)


class EnergyRequest(ByExemplarsRequest):
    """Energy-distance guidance by the exemplars, for few of them."""

    method: Literal["energy"] = "energy"

    def build(self, context: Context) -> Energy:
        return Energy(*self.seen(context), **self.when())
