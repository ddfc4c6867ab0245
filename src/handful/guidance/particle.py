"""Particle guidance (Corso et al., ICLR 2024, arXiv 2310.13102): the images of a cohort push each other apart.

    log Phi(y_1 .. y_n) = -(1/2) sum_ij k(phi(y_i), phi(y_j)),   k(a, b) = exp(-|a - b|^2 / h),   h = m^2 / log n

with m the median of the cohort's pairwise distances at this step (no gradient goes through it): their kernel and its
bandwidth. The potential is U = -log Phi, lowered. They take it of x_t itself or of features of the denoised estimate, by its
absolute size (`normalize: none`), weighted over the steps.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from handful.features.extractor import FeatureExtractor
from handful.guidance.base import Potential, Pull, Timing
from handful.guidance.distances import squared_distances
from handful.guidance.method import Context, FeaturesRequest


def repulsion(features: Tensor, bandwidth: float = 1.0) -> Tensor:
    """-log Phi, above, without the constant terms i = j; shape ().

    Args:
        features: (n, D). A single image has nothing to be pushed by: 0.
        bandwidth: A factor on h.
    """
    n = len(features)
    if n < 2:
        return 0 * features.sum()
    d = squared_distances(features, features)
    apart = d[torch.triu(torch.ones(n, n, dtype=torch.bool, device=d.device), 1)] if not d.is_meta else d.flatten()
    h = bandwidth * apart.detach().median() / math.log(max(n, 3))
    return torch.exp(-apart / (h + 1e-30)).sum()


class Particle(Potential):
    """Particle guidance of a cohort."""

    name = "particle"
    per = "set"

    def __init__(
        self,
        extractor: FeatureExtractor,
        scale: float,
        *,
        bandwidth: float = 1.0,
        timing: Timing | None = None,
        pull: Pull | None = None,
    ) -> None:
        super().__init__(extractor, scale, timing, pull)
        self.bandwidth = ParticleRequest(bandwidth=bandwidth).bandwidth

    def energy(self, features: Tensor) -> Tensor:
        return repulsion(features, self.bandwidth)


class ParticleRequest(FeaturesRequest):
    """Particle guidance: a cohort whose images push each other apart.

    Attributes:
        bandwidth: A factor on the kernel's h; the paper's is 1.
    """

    method: Literal["particle"] = "particle"
    bandwidth: Annotated[float, Field(gt=0)] = 1.0

    def build(self, context: Context) -> Particle:
        return Particle(self.extractor(context), self.scale, bandwidth=self.bandwidth, **self.when())
