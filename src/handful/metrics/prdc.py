"""Precision, recall, density and coverage of a generated set against a real one, by k-nearest-neighbour balls.

With features of real images r and generated images s, and NN_k(z) the distance from z to the k-th nearest neighbour
inside z's own set (itself excluded):

    precision = share of s inside some ball(r, NN_k(r))       are the generated images realistic?
    recall    = share of r inside some ball(s, NN_k(s))       could the generator have made the real ones?
    density   = mean over s of (number of r-balls holding s) / k
    coverage  = share of r whose ball(r, NN_k(r)) holds some s       do the generated images reach all of the real ones?

Sources: Kynkaanniemi et al., NeurIPS 2019 (precision, recall); Naeem et al., ICML 2020 (density, coverage).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from handful.metrics._features import as_count, as_pair
from handful.metrics._screen import Frame, direct, frame_of, lower_bounds, screened
from handful.metrics.neighbours import BLOCK, nearest, neighbour_radii, require_neighbours, squared_radii

__all__ = ["PRDC", "Members", "members", "nearest", "neighbour_radii", "prdc"]


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage, with what they depend on: k and both sets' sizes."""

    precision: float  # in [0, 1]
    recall: float  # in [0, 1]
    density: float  # >= 0; expected 1 when both sets come from one distribution
    coverage: float  # in [0, 1]
    f1: float = field(init=False)  # harmonic mean of precision and coverage, in [0, 1]; 0 when both are 0
    k: int
    n_real: int
    n_generated: int

    def __post_init__(self) -> None:
        total = self.precision + self.coverage
        f1 = 2 * self.precision * self.coverage / total if total else 0.0
        object.__setattr__(self, "f1", f1)

    # As a mapping too, since the package `prdc`, which this stands in for, answers with a dict.
    def keys(self) -> list[str]:
        return [entry.name for entry in fields(self)]

    def __getitem__(self, name: str) -> float:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def expected_coverage(n_real: int, n_generated: int, k: int) -> float:
    """The coverage that is expected where both sets come from one distribution, in [0, 1].

    1 - C(m - 1, k) / C(m + n - 1, k): each of the k nearest of all m + n - 1 others is as likely a generated image as a real
    one. (Naeem et al. 2020, section 3.3, where it is a sum.)
    """
    m, n = n_real, n_generated
    return 1 - math.prod((m - 1 - place) / (m + n - 1 - place) for place in range(k))


@dataclass(frozen=True, eq=False)
class Members:
    """Who is inside whose ball: all that precision, recall, density and coverage are made of."""

    k: int
    held: np.ndarray  # how many real balls hold each generated image, (n,) int64
    holds: np.ndarray  # how many generated images each real ball holds, (m,) int64
    one: np.ndarray  # one of those images, (m,) int64; -1 where there is none
    recalled: np.ndarray  # whether each real image is in some generated one's ball, (m,) bool

    def prdc(self) -> PRDC:
        return PRDC(
            precision=float(np.mean(self.held > 0)),
            recall=float(np.mean(self.recalled)),
            density=float(self.held.sum() / (self.k * len(self.held))),
            coverage=float(np.mean(self.holds > 0)),
            k=self.k,
            n_real=len(self.holds),
            n_generated=len(self.held),
        )


def prdc(real: Any, generated: Any, k: int = 5, *, block: int = BLOCK) -> PRDC:
    """Precision, recall, density and coverage; exact, and in memory that does not grow with n squared.

    Balls are closed (distance <= radius), as in Kynkaanniemi et al.; Naeem et al.'s package `prdc` takes them open (<).
    On features without ties the two agree. With ties, open balls call exact copies unrealistic: an image that occurs
    more than k times has radius 0, and an open ball of radius 0 does not even hold its own centre. With closed balls
    any set measured against itself has precision, recall and coverage 1. Its density is then 1 + 1/k, not 1 (each image
    also touches the ball whose radius it sets); that happens for copies only, never for fresh samples.

    The four values equal those of all differences taken in float64, for float32 features too, whatever their offset.

    Args:
        real: features of the real images, (m, D); numpy array or torch tensor.
        generated: features of the generated images, (n, D). Swapping the roles swaps precision and recall.
        k: which neighbour sets a ball's radius; 1 <= k < min(m, n). Values at different k or n do not compare.
        block: rows compared at once; memory grows with its square, the answer does not depend on it.

    Returns:
        PRDC. Mode collapse onto realistic images shows as high precision with low recall and coverage.

    Raises:
        RequestError: features not (n, D), empty, NaN or infinite; different D; k < 1; a set with fewer than k + 1 images.
    """
    return members(real, generated, k, block=block).prdc()


def members(real: Any, generated: Any, k: int = 5, *, block: int = BLOCK, real_radii: np.ndarray | None = None) -> Members:
    """Who is inside whose ball, as exactly as `prdc`.

    Args:
        real, generated, k, block: as for `prdc`.
        real_radii: of the real images, squared, (m,), where they are known already (`neighbours.squared_radii`).

    Raises:
        RequestError: as `prdc`.
    """
    real, generated = as_pair(real, generated)
    k, block = as_count(k, "k"), as_count(block, "block")
    require_neighbours(len(real), k, "real")
    require_neighbours(len(generated), k, "generated")
    if real_radii is None:
        real_radii = squared_radii(real, k, block, "real")
    generated_radii = squared_radii(generated, k, block, "generated")
    frame = frame_of(real, generated)
    held = np.zeros(len(generated), np.int64)
    holds, one, recalled = np.zeros(len(real), np.int64), np.full(len(real), -1, np.int64), np.zeros(len(real), bool)
    out = np.empty(min(block, len(real)) * min(block, len(generated)), np.float32)
    for i in range(0, len(real), block):
        rows = slice(i, i + block)
        a = screened(real[rows], frame, np.float32)
        for j in range(0, len(generated), block):
            columns = slice(j, j + block)
            b = screened(generated[columns], frame, np.float32)
            bounds = lower_bounds(a, b, out)

            scaled = real_radii[rows] * frame.squared
            row, column = np.nonzero(bounds <= _rounded_up(scaled)[:, None])
            inside = bounds[row, column] + a.slack[row] + b.slack[column] <= scaled[row]
            doubtful = np.flatnonzero(~inside)
            inside[doubtful] = _decide(
                real[rows], generated[columns], row[doubtful], column[doubtful], real_radii[rows][row[doubtful]], frame
            )
            held[columns] += np.bincount(column[inside], minlength=len(b.values))
            holds[rows] += np.bincount(row[inside], minlength=len(a.values))
            one[i + row[inside]] = j + column[inside]

            # Recall asks only whether any ball holds a real image: those already held need no more looking.
            waiting = np.flatnonzero(~recalled[rows])
            scaled = generated_radii[columns] * frame.squared
            row, column = np.nonzero(bounds[waiting] <= _rounded_up(scaled))
            row = waiting[row]
            inside = bounds[row, column] + a.slack[row] + b.slack[column] <= scaled[column]
            recalled[i + row[inside]] = True
            doubtful = np.flatnonzero(~recalled[i + row])
            row, column = row[doubtful], column[doubtful]
            inside = _decide(real[rows], generated[columns], row, column, generated_radii[columns][column], frame)
            recalled[i + row[inside]] = True
    return Members(k, held, holds, one, recalled)


def _decide(
    real: np.ndarray, generated: np.ndarray, row: np.ndarray, column: np.ndarray, limit: np.ndarray, frame: Frame
) -> np.ndarray:
    """Whether the squared distances of the pairs (real[row], generated[column]) are at most `limit`, exactly; (p,)."""
    inside = np.zeros(len(row), bool)
    if len(row) * 64 <= len(real) * len(generated):
        left = np.arange(len(row))
    else:  # more doubt than features of one scale leave: let float64 screen before comparing pair by pair
        a, b = screened(real, frame, np.float64), screened(generated, frame, np.float64)
        bounds = lower_bounds(a, b, np.empty(len(real) * len(generated)))[row, column]
        inside = bounds + a.slack[row] + b.slack[column] <= limit * frame.squared
        left = np.flatnonzero(~inside & (bounds <= limit * frame.squared))
    inside[left] = direct(real, row[left], generated, column[left]) <= limit[left]
    return inside


def _rounded_up(values: np.ndarray) -> np.ndarray:
    """Float32 values that are at least the float64 ones: a comparison with them lets no pair slip through."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))
