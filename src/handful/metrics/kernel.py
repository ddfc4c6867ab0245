"""Kernel distances between two sets of features, the Frechet distance at infinite n, and authenticity.

- KID (Binkowski et al., ICLR 2018) on Inception, KD on DINOv2: the unbiased squared MMD with the kernel (x.y / D + 1)^3,
  the mean over subsets. Published: 100 subsets of 1,000.
- CMMD (Jayasumana et al., CVPR 2024): squared MMD of CLIP's unit features with exp(-|x - y|^2 / (2 sigma^2)), sigma = 10,
  times 1,000; as published all pairs are kept, an image with itself too.
- FD-infinity (Chong & Forsyth, CVPR 2020): the Frechet distance is linear in 1/n; fitted to several n, it is read off at 0.
- Authenticity (Alaa et al., ICML 2022), as dgm-eval's AuthPct / 100: share of generated images that are farther from their
  nearest real image than that real image is from its own nearest real one. Copies have less.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from handful.metrics._features import as_count, as_pair, row_blocks
from handful.metrics.frechet import frechet_between, gaussian
from handful.metrics.neighbours import nearest, neighbour_radii
from handful.metrics.reference import TooFew

SUBSETS, SUBSET = 100, 1000
SIGMA, SCALE = 10.0, 1000.0
POINTS, FEWEST, MOST = 15, 10, 5000  # of the line through Frechet distances; images of its smallest set, as in dgm-eval


def kernel_distance(real: Any, generated: Any, *, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0) -> float:
    """KID or KD: the unbiased squared MMD with the cubic kernel, the mean over random subsets.

    Args:
        real: (m, D). generated: (n, D). At least 2 each.
        subsets: how many; one is enough where a subset is the whole of both sets.
        size: images of a subset, of each set; no more than the smaller set has.
        seed: of the subsets.

    Returns:
        About 0 for two samples of one distribution, and below 0 by chance.

    Raises:
        RequestError: bad features, or fewer than 2 images.
    """
    real, generated = as_pair(real, generated)
    size, smaller = as_count(size, "size"), min(len(real), len(generated))
    if smaller < 2:
        raise TooFew("the kernel distance needs 2 of each")
    size = min(size, smaller)
    if size == len(real) == len(generated):
        subsets = 1
    draw, total = np.random.default_rng(seed), 0.0
    for _ in range(as_count(subsets, "subsets")):
        x, y = (of[draw.choice(len(of), size, replace=False)].astype(np.float64) for of in (real, generated))
        xx, yy, xy = ((a @ b.T / real.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        total += within - 2 * xy.mean()
    return float(total / subsets)


def cmmd(real: Any, generated: Any, *, sigma: float = SIGMA, scale: float = SCALE) -> float:
    """CMMD of features (m, D) and (n, D), which are brought to unit length; >= 0.

    Raises:
        RequestError: bad features.
    """
    real, generated = as_pair(real, generated)
    x, y = (_unit(features) for features in (real, generated))
    xx, yy, xy = (_mean_kernel(a, b, sigma) for a, b in ((x, x), (y, y), (x, y)))
    return float(scale * (xx + yy - 2 * xy))


def frechet_at_infinity(real: Any, generated: Any, *, points: int = POINTS, seed: int = 0) -> float:
    """The Frechet distance of infinitely many generated images: a line through those of several n, at 1/n = 0.

    Args:
        real: (m, D). generated: (n, D), n of at least 20.
        points: how many n: evenly from n/10 (at least 10, at most 5,000) to n; each set is drawn anew, without repetition.
        seed: of the draws.

    Raises:
        RequestError: bad features, or fewer than 20 generated or 2 real images.
    """
    real, generated = as_pair(real, generated)
    n = len(generated)
    if n < 2 * FEWEST or len(real) < 2:
        raise TooFew(f"the Frechet distance at infinity needs {2 * FEWEST} generated images")
    sizes = np.linspace(min(MOST, max(FEWEST, n // 10)), n, as_count(points, "points")).astype(int)
    of_real, draw = gaussian(real, "real"), np.random.default_rng(seed)
    distances = [frechet_between(of_real, gaussian(generated[draw.choice(n, size, replace=False)])) for size in sizes]
    return float(np.polynomial.Polynomial.fit(1 / sizes, distances, 1)(0.0))


def authenticity(real: Any, generated: Any) -> float:
    """Share of generated images (n, D) that are no nearer to a real one (m, D), m of at least 2, than real ones are; 0 to 1.

    Raises:
        RequestError: bad features, or a single real image.
    """
    real, generated = as_pair(real, generated)
    if len(real) < 2:
        raise TooFew("authenticity needs 2 real images")
    distance, which = nearest(generated, real)
    return float(np.mean(distance > neighbour_radii(real, 1, name="real")[which]))


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths > 0, lengths, 1.0)


def _mean_kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    of_y, total = np.einsum("ij,ij->i", y, y), 0.0
    for rows in row_blocks(len(x), len(y)):
        part = x[rows]
        squared = np.einsum("ij,ij->i", part, part)[:, None] + of_y - 2 * part @ y.T
        total += float(np.exp(-squared.clip(min=0) / (2 * sigma**2)).sum())
    return total / (len(x) * len(y))
