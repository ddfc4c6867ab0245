"""Exact nearest neighbours among features, in bounded memory: a matrix product screens, float64 differences decide."""

from __future__ import annotations

from typing import Any

import numpy as np

from handful.errors import RequestError
from handful.metrics._features import as_count, as_features, require_same_width
from handful.metrics._screen import Frame, direct, frame_of, lower_bounds, screened

BLOCK = 2048


def neighbour_radii(features: Any, k: int, *, name: str = "features", block: int = BLOCK) -> np.ndarray:
    """NN_k of every image: the distance to its k-th nearest neighbour inside its own set, itself excluded.

    An identical copy of an image is a neighbour at distance 0, so an image with k copies has radius 0.

    Args:
        features: (n, D); numpy array or torch tensor.
        k: which neighbour, 1 <= k < n.
        name: what errors call the features.
        block: rows compared at once; memory grows with its square, the answer does not depend on it.

    Returns:
        Euclidean distances, (n,) float64, >= 0.

    Raises:
        RequestError: bad features, k < 1, block < 1, or fewer than k + 1 images.

    Source: Naeem et al., "Reliable fidelity and diversity metrics for generative models" (ICML 2020), section 3.
    """
    return np.sqrt(squared_radii(as_features(features, name), as_count(k, "k"), as_count(block, "block"), name))


def squared_radii(features: np.ndarray, k: int, block: int, name: str) -> np.ndarray:
    """`neighbour_radii` of checked features, squared: comparisons with it need no rounding by a square root."""
    require_neighbours(len(features), k, name)
    return _smallest(features, None, k, block, first_of_ties=False)[0][:, -1]


def require_neighbours(n: int, k: int, name: str) -> None:
    """Raises RequestError where a set of n images has no k-th neighbour, and says which k it has."""
    if n <= k:
        problem = f"too few images for k = {k} (an image is not its own neighbour)"
        raise RequestError(name, n, problem, f"Give at least {k + 1}" + (f", or k <= {n - 1}." if n > 1 else "."))


def nearest(queries: Any, keys: Any, *, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """The nearest key of every query, such as the nearest exemplar of every generated image.

    Args:
        queries: (n, D); numpy array or torch tensor.
        keys: (m, D), m >= 1.
        block: rows compared at once; the answer does not depend on it.

    Returns:
        distance: Euclidean, (n,) float64, >= 0.
        index: row of the nearest key, (n,) int64; of equally near keys the first.

    Raises:
        RequestError: bad queries or keys, different D, or block < 1.
    """
    queries, keys = as_features(queries, "queries"), as_features(keys, "keys")
    require_same_width(queries, keys, "queries", "keys")
    squared, index = _smallest(queries, keys, 1, as_count(block, "block"), first_of_ties=True)
    return np.sqrt(squared[:, 0]), index[:, 0]


class _Kept:
    """The `size` smallest values met so far of each of n rows, and the columns they came from (inf and -1 before)."""

    def __init__(self, n: int, size: int, dtype: type):
        self.values = np.full((n, size), np.inf, dtype)
        self.columns = np.full((n, size), -1, np.int64)
        self.worst = np.full(n, np.inf, dtype)
        self.size = size

    def offer(self, start: int, values: np.ndarray, first_column: int) -> None:
        """Offers a block, (rows, columns), to the rows from `start` on."""
        rows = slice(start, start + len(values))
        better = values < self.worst[rows, None]
        if np.count_nonzero(better) > 4 * self.size * len(values):
            self._offer_all(rows, values, first_column)
        else:  # the usual case after a row's first block: a few values in millions
            row, column = np.nonzero(better)
            self.offer_pairs(row + start, column + first_column, values[row, column])

    def _offer_all(self, rows: slice, values: np.ndarray, first_column: int) -> None:
        columns = _pick(values, self.size)
        values = np.hstack([self.values[rows], np.take_along_axis(values, columns, 1)])
        columns = np.hstack([self.columns[rows], columns + first_column])
        chosen = _pick(values, self.size)
        self.values[rows] = np.take_along_axis(values, chosen, 1)
        self.columns[rows] = np.take_along_axis(columns, chosen, 1)
        self.worst[rows] = self.values[rows].max(axis=1)

    def offer_pairs(self, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> None:
        """Offers single entries; of equal values the lower column is kept."""
        touched = np.unique(row)
        row = np.concatenate([np.repeat(touched, self.size), row])
        column = np.concatenate([self.columns[touched].ravel(), column])
        value = np.concatenate([self.values[touched].ravel(), value])
        order = np.lexsort((column, value, row))
        row = row[order]
        first = np.searchsorted(row, touched)
        keep = order[(first[:, None] + np.arange(self.size)).ravel()]
        self.values[touched] = value[keep].reshape(-1, self.size)
        self.columns[touched] = column[keep].reshape(-1, self.size)
        self.worst[touched] = self.values[touched, -1]


def _pick(values: np.ndarray, size: int) -> np.ndarray:
    """Columns of the `size` smallest values of each row, in no order; all columns where there are not more."""
    if values.shape[1] <= size:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(values, size - 1, axis=1)[:, :size]


def _smallest(
    queries: np.ndarray, keys: np.ndarray | None, k: int, block: int, first_of_ties: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest squared distances of every query, ascending, and their keys, (n, k) each.

    keys=None: among the queries themselves, each without itself. Only `first_of_ties` fixes which of equal keys is taken.
    """
    others = queries if keys is None else keys
    frame = frame_of(queries) if keys is None else frame_of(queries, keys)
    kept = _screen_all(queries, keys, frame, 2 * k + 8, block)  # more than k: spares for what float32 cannot rank
    found = np.isfinite(kept.values)  # the rest are empty places, or the image itself
    squared = np.full(kept.columns.shape, np.inf)
    row = np.nonzero(found)[0]
    squared[found] = direct(queries, row, others, kept.columns[found])
    order = np.lexsort((kept.columns, squared), axis=1)[:, :k]
    squared, columns = np.take_along_axis(squared, order, 1), np.take_along_axis(kept.columns, order, 1)
    # What was not kept is at least as far as the largest bound kept. Where that does not decide the k-th, ask float64.
    certain, reached = np.maximum(kept.worst.astype(np.float64), 0), squared[:, -1] * frame.squared
    open_rows = np.flatnonzero(reached >= certain if first_of_ties else reached > certain)
    if len(open_rows):
        settled = _settle(queries, keys, open_rows, squared[open_rows, -1], frame, k, block)
        squared[open_rows], columns[open_rows] = settled.values, settled.columns
    return squared, columns


def _screen_all(queries: np.ndarray, keys: np.ndarray | None, frame: Frame, size: int, block: int) -> _Kept:
    """The `size` smallest float32 lower bounds of every query."""
    kept = _Kept(len(queries), size, np.float32)
    others = queries if keys is None else keys
    out = np.empty(min(block, len(queries)) * min(block, len(others)), np.float32)
    for i in range(0, len(queries), block):
        a = screened(queries[i : i + block], frame, np.float32)
        for j in range(i if keys is None else 0, len(others), block):
            same = keys is None and i == j
            b = a if same else screened(others[j : j + block], frame, np.float32)
            bounds = lower_bounds(a, b, out)
            if same:
                np.fill_diagonal(bounds, np.inf)
            kept.offer(i, bounds, j)
            if keys is None and not same:  # the product is symmetric: one block serves both sides
                kept.offer(j, bounds.T, i)
    return kept


def _settle(
    queries: np.ndarray, keys: np.ndarray | None, rows: np.ndarray, reached: np.ndarray, frame: Frame, k: int, block: int
) -> _Kept:
    """The k smallest squared distances of some queries, whose k-th is at most `reached`: screened in float64.

    Every key whose float64 lower bound does not exclude it is compared directly, so the answer is exact however many
    points crowd together; only then is it slow.
    """
    kept = _Kept(len(rows), k, np.float64)
    others = queries if keys is None else keys
    out = np.empty(min(block, len(rows)) * min(block, len(others)), np.float64)
    for i in range(0, len(rows), block):
        chosen = rows[i : i + block]
        a = screened(queries[chosen], frame, np.float64)
        for j in range(0, len(others), block):
            bounds = lower_bounds(a, screened(others[j : j + block], frame, np.float64), out)
            if keys is None:
                own = np.flatnonzero((chosen >= j) & (chosen < j + block))
                bounds[own, chosen[own] - j] = np.inf
            limit = np.minimum(reached[i : i + block], kept.worst[i : i + block])
            row, column = np.nonzero(bounds <= limit[:, None] * frame.squared)
            if len(row):
                kept.offer_pairs(row + i, column + j, direct(queries, chosen[row], others, column + j))
    return kept
