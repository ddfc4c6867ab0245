"""Distances between features, differentiable and safe: what the potentials of sets are made of."""

from __future__ import annotations

from torch import Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances between rows: (k, D), (n, D) -> (k, n), differentiable everywhere."""
    # the common shift takes the large part off features that share an offset, which the expansion would cancel badly
    shift = b.detach().mean(0)
    a, b = a - shift, b - shift
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_min(0)
