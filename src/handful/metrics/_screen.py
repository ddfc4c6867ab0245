"""Exact comparisons of distances at the price of a matrix product.

|x - y|^2 = |x|^2 + |y|^2 - 2 x.y is fast and cancels: in float32 it is wrong by up to D 6e-8 (|x|^2 + |y|^2), which
turns neighbours round when features sit far from the origin or nearly coincide. Here that product only *screens*. Less
its worst rounding error it is a certain lower bound of the squared distance, plus it a certain upper bound; whatever
the two bounds leave open is decided from the differences, in float64 (`direct`). So the answers are those of float64
differences for all pairs, to the bit, and float32 decides only what float32 can.
The error bound is the classical one of an inner product (Higham, Accuracy and Stability of Numerical Algorithms, 3.1),
valid for any order of summation, so for any BLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from handful.metrics._features import SCRATCH_VALUES, mean, row_blocks

# Stands for underflow: coordinates are scaled so that the largest norm is about 1.
UNDERFLOW = 1e-30


@dataclass(frozen=True)
class Frame:
    """Where screening happens: points less `centre` (against cancellation), times a power of two (exact)."""

    centre: np.ndarray  # (D,) float64 holding float32 values: the same shift in either precision
    scale: float

    @property
    def squared(self) -> float:
        return self.scale * self.scale


def frame_of(*sets: np.ndarray) -> Frame:
    """The frame centred on the sets' means, in which the farthest point has a norm of at most 1."""
    centre = np.mean([mean(points) for points in sets], axis=0).astype(np.float32).astype(np.float64)
    largest = 0.0
    for points in sets:
        for rows in row_blocks(*points.shape):
            centred = points[rows] - centre
            largest = max(largest, float(np.einsum("ij,ij->i", centred, centred).max()))
    exponent = 0 if largest == 0 else int(np.clip(np.ceil(np.log2(largest) / 2), -100, 110))
    return Frame(centre, 2.0**-exponent)


@dataclass(frozen=True)
class Rows:
    """A block of points in a frame, ready for `lower_bounds`."""

    values: np.ndarray  # (b, D), in the screening precision
    shrunk: np.ndarray  # (b,) squared norms less their share of the error bound
    slack: np.ndarray  # (b,) float64: upper bound = lower bound + slack of both points


def screened(points: np.ndarray, frame: Frame, dtype: type) -> Rows:
    """Puts a block of points, (b, D), into a frame, in float32 or float64."""
    width = points.shape[1]
    centred = points - frame.centre.astype(np.result_type(points.dtype, dtype))
    values = (centred * centred.dtype.type(frame.scale)).astype(dtype, copy=False)
    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    # In units of |x|^2 + |y|^2: D u for the product; 16 u for centring, rounding and the two sums; the rest for what
    # float64 itself rounds, in the norms and in `direct`.
    unit, unit64 = np.finfo(dtype).eps / 2, np.finfo(np.float64).eps / 2
    error = (width + 16) * unit + 4 * (width + 16) * unit64
    shrunk = ((1 - error) * squares - UNDERFLOW).astype(dtype)
    return Rows(values, shrunk, 2 * error * squares + 2 * UNDERFLOW)


def lower_bounds(a: Rows, b: Rows, out: np.ndarray) -> np.ndarray:
    """Certain lower bounds of squared distances in the frame, (len a, len b), written to `out` (flat, large enough)."""
    bounds = out[: len(a.values) * len(b.values)].reshape(len(a.values), len(b.values))
    np.matmul(a.values, b.values.T, out=bounds)
    bounds *= -2
    bounds += a.shrunk[:, None]
    bounds += b.shrunk
    return bounds


def direct(a: np.ndarray, i: np.ndarray, b: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Squared distances of the pairs (a[i], b[j]) from their differences in float64, (len i,).

    numpy sums each row in an order that depends on D alone, so equal pairs give equal bits, and ties stay ties.
    """
    distances = np.empty(len(i))
    for pairs in row_blocks(len(i), a.shape[1], SCRATCH_VALUES // 2):
        difference = a[i[pairs]].astype(np.float64)
        difference -= b[j[pairs]]
        np.square(difference, out=difference)
        distances[pairs] = difference.sum(axis=1)
    return distances
