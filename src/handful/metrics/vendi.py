"""Vendi score: the effective number of different images in a set.

Sources: Friedman & Dieng, TMLR 2023; orders other than 1: Pasarkar & Dieng, AISTATS 2024.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from handful.errors import RequestError
from handful.metrics._features import as_features, row_blocks


def vendi(features: Any, order: float = 1.0) -> float:
    """Exponential of the entropy of the eigenvalues of K/n, K the cosine similarity of features.

    n images that are all alike score 1, n mutually orthogonal ones n. It needs no real set, and depends on n: compare
    only values at equal n. When D < n the eigenvalues come from the D x D matrix X'X/n: the non-zero ones are the same.

    Args:
        features: (n, D), n >= 1; numpy array or torch tensor. Centre them beforehand if the extractor's mean dominates.
        order: q >= 0 of the Renyi entropy. 1: Shannon. Larger: common images count more; infinity: 1 / the largest
            eigenvalue. 0: the rank. Eigenvalues below the rounding error of float64 count as 0 at every order, or
            small orders would count noise.

    Returns:
        The score, in [1, min(n, D)].

    Raises:
        RequestError: bad features; an image of all-zero features (no direction, so no cosine); order below 0 or NaN.
    """
    features = as_features(features, "features")
    if not order >= 0:
        raise RequestError("order", order, "an order is at least 0", "Give 1 for the usual Vendi score.")
    n, width = features.shape
    if n <= width:
        unit = _unit_rows(features, 0)
        kernel = unit @ unit.T
    else:
        kernel = np.zeros((width, width))
        for rows in row_blocks(n, width):
            unit = _unit_rows(features[rows], rows.start)
            kernel += unit.T @ unit
    shares = np.linalg.eigvalsh(kernel / n)
    shares = shares[shares > max(n, width) * np.finfo(np.float64).eps * shares[-1]]
    score = _effective_number(shares / shares.sum(), float(order))
    return float(min(max(score, 1.0), min(n, width)))


def _unit_rows(block: np.ndarray, start: int) -> np.ndarray:
    block = block.astype(np.float64)
    # By the largest value first: squares of very small features would underflow.
    largest = np.abs(block).max(axis=1, keepdims=True)
    if not largest.all():
        row = start + int(np.argmin(largest[:, 0]))
        problem = "an image of all-zero features has no direction"
        raise RequestError("features", f"row {row}", problem, "Drop that image, or check its extraction.")
    block /= largest
    return block / np.linalg.norm(block, axis=1, keepdims=True)


def _effective_number(shares: np.ndarray, order: float) -> float:
    """Hill number of positive shares that sum to 1."""
    if math.isinf(order):
        return 1 / float(shares.max())
    logs = np.log(shares)
    if order == 1:
        return math.exp(-float(np.sum(shares * logs)))
    # log(sum p^q) / (1 - q), written so that orders near 1 do not cancel.
    excess = float(np.sum(shares * np.expm1((order - 1) * logs)))
    if excess < -0.5:  # large orders: p^q underflows unless the largest share is taken out first
        top = float(logs.max())
        return math.exp((order * top + math.log(float(np.sum(np.exp(order * (logs - top)))))) / (1 - order))
    return math.exp(math.log1p(excess) / (1 - order))
