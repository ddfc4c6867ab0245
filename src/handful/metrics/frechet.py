"""Frechet distance between Gaussians fitted to two sets of features: FID on Inception-v3, FDD on DINOv2.

    d^2 = |mean1 - mean2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2)     (Dowson & Landau 1982; Heusel et al., NeurIPS 2017)

The trap is the square root of a matrix that is not symmetric and often singular: sqrtm then gives NaN, complex numbers
or hours. Here each covariance is written S = F' F. Then S1 S2 has the non-zero eigenvalues of (F1 F2')(F1 F2')', so
tr sqrt(S1 S2) is the sum of the singular values of F1 F2', real and non-negative whatever the rank. With fewer images
than features, F is the centred features themselves and F1 F2' their cross-Gram matrix; otherwise F comes from the
symmetric eigenproblem of S. Singular values keep the small directions that eigenvalues of F1 S2 F1' would lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from handful.errors import RequestError
from handful.metrics._features import as_features, as_pair, mean, row_blocks


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian fitted to features: `mean` (D,) and a factor F (r, D) of the unbiased covariance F' F, r <= D; float64."""

    mean: np.ndarray
    factor: np.ndarray


def gaussian(features: Any, name: str = "features") -> Gaussian:
    """Fits it to features (n, D), n >= 2; `name` is what errors call them.

    Raises:
        RequestError: bad features, or fewer than 2 images.
    """
    features = as_features(features, name)
    if len(features) < 2:
        raise RequestError(name, len(features), "one image has no covariance", "Give at least 2.")
    return Gaussian(*_fit(features))


def frechet_between(first: Gaussian, second: Gaussian) -> float:
    """`frechet` of two sets whose Gaussians are known: a real set's needs to be fitted only once."""
    return _distance(first.mean, first.factor, second.mean, second.factor)


def frechet(real: Any, generated: Any) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features, as FID reports it.

    In float64, with unbiased covariances (divided by n - 1). The estimate is biased upwards at small n, more so at
    large D: compare only values at equal n, beside a real-against-real ceiling.

    Args:
        real: (m, D), m >= 2; numpy array or torch tensor.
        generated: (n, D), n >= 2. The distance is symmetric; the names keep calls alike across metrics.

    Returns:
        The distance, >= 0, in squared units of the features. Never NaN, negative or complex.
        Memory: a few matrices of D x D, however large n.

    Raises:
        RequestError: features not (n, D), empty, NaN or infinite; different D; fewer than 2 images in either set.
    """
    real, generated = as_pair(real, generated)
    return frechet_between(gaussian(real, "real"), gaussian(generated, "generated"))


def frechet_from_moments(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Squared Frechet distance between two Gaussians given by mean and covariance, such as published FID statistics.

    Args:
        mean1: (D,). mean2: (D,).
        cov1: (D, D), symmetric positive semidefinite; singular is fine. cov2: the same.

    Returns:
        The distance, >= 0.

    Raises:
        RequestError: shapes that do not fit, NaN or infinite values, or a matrix that is no covariance.
    """
    factors = []
    means = []
    for number, (centre, cov) in enumerate(((mean1, cov1), (mean2, cov2)), start=1):
        cov = as_features(cov, f"cov{number}").astype(np.float64)
        centre = as_features(np.reshape(centre, (1, -1)), f"mean{number}").astype(np.float64)[0]
        if cov.shape != (len(centre), len(centre)):
            problem = f"not (D, D) with the D of mean{number}, {len(centre)}"
            raise RequestError(f"cov{number}", cov.shape, problem, "Give both moments of one set.")
        asymmetry = float(np.abs(cov - cov.T).max())
        if asymmetry > 1e-6 * np.abs(cov).max():
            problem = "the matrix is not symmetric: this is its largest difference from its transpose"
            raise RequestError(f"cov{number}", asymmetry, problem, "Give numpy.cov(features, rowvar=False).")
        means.append(centre)
        factors.append(_factor((cov + cov.T) / 2, f"cov{number}"))
    if len(means[0]) != len(means[1]):
        problem = f"the number of features differs from that of `mean1`, {len(means[0])}"
        raise RequestError("mean2", len(means[1]), problem, "Extract both with the same extractor.")
    return _distance(means[0], factors[0], means[1], factors[1])


def _fit(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, (D,), and a factor F, (min(n, D) or fewer, D), of the unbiased covariance S = F' F; float64."""
    n, width = features.shape
    centre = mean(features)
    if n < width:
        return centre, (features - centre) / np.sqrt(n - 1)
    cov = np.zeros((width, width))
    for rows in row_blocks(n, width):
        centred = features[rows] - centre
        cov += centred.T @ centred
    return centre, _factor(cov / (n - 1), "covariance")


def _factor(cov: np.ndarray, name: str) -> np.ndarray:
    """F with cov = F' F, one row per eigenvalue that is not rounding noise, (rank, D).

    Noise left in would count by its square root: 1e-16 of the variance would be 1e-8 of the distance, D times over.
    """
    values, vectors = np.linalg.eigh(cov)
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    if values[0] < -max(noise, 1e-6 * values[-1]):
        problem = "this is its smallest eigenvalue, but a covariance has none below 0"
        raise RequestError(name, float(values[0]), problem, "Give numpy.cov(features, rowvar=False).")
    keep = values > noise
    return (vectors[:, keep] * np.sqrt(values[keep])).T


def _distance(mean1: np.ndarray, factor1: np.ndarray, mean2: np.ndarray, factor2: np.ndarray) -> float:
    shift = float(np.sum((mean1 - mean2) ** 2))
    spread = float(np.sum(factor1**2) + np.sum(factor2**2))
    cross = factor1 @ factor2.T
    overlap = float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0
    return shift + max(spread - 2 * overlap, 0.0)  # rounding can leave equal covariances a hair below 0
