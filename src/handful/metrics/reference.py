"""A real set, prepared once to measure many generated ones, and how far chance alone would move what it measures.

Noise is estimated by the bootstrap over the generated images: each draw takes as many images of each class again as there
are, with repetition, and measures them. The real images and the radii of their balls stay as they are, so a draw costs no
distances. Only the draws' spread around their own mean says anything: a draw repeats images, which by itself makes a larger
Frechet distance.

Coverage can't be measured on a draw: an image drawn twice covers nothing twice, and one not drawn is missed only where no
other covers the same; measured so, the spread was little over half of the true one where images are few. Instead the draws
weigh what each image covers alone (the jackknife's influences), whose variance is on average not too small (Efron & Stein,
Annals of Statistics 1981). Recall and the Vendi score are left out: images drawn twice shrink recall's own balls to
radius 0 and look like less variety, and new radii in every draw would be dear.

Source: Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", SIAM 1982, chapters 3, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from handful.errors import RequestError
from handful.metrics._features import as_count, as_features, mean, require_same_width
from handful.metrics.frechet import Gaussian, frechet_between, gaussian
from handful.metrics.neighbours import BLOCK, require_neighbours, squared_radii
from handful.metrics.prdc import PRDC, Members, members

# The Frechet distance of a draw is taken in so many leading directions: the others hold little of its spread, and all of
# 768 would take a hundred times as long.
DIRECTIONS = 128
FEWEST = 8  # images of a class to draw within it: the spread is then too small by a sixteenth at most


class Reference:
    """Features of real images, with their balls and their Gaussian.

    Args:
        features: (m, D); numpy array or torch tensor.
        k: neighbour of precision, recall, density and coverage.

    Raises:
        RequestError: as `prdc` and `frechet`.
    """

    def __init__(self, features: Any, k: int = 5) -> None:
        self.features, self.k = as_features(features, "real"), as_count(k, "k")

    @cached_property
    def _radii(self) -> np.ndarray:
        require_neighbours(len(self.features), self.k, "real")
        return squared_radii(self.features, self.k, BLOCK, "real")

    @cached_property
    def _gaussian(self) -> Gaussian:
        return gaussian(self.features, "real")

    def members(self, generated: Any) -> Members:
        """Who is inside whose ball; see `members`."""
        return members(self.features, generated, self.k, real_radii=self._radii)

    def prdc(self, generated: Any) -> PRDC:
        """Precision, recall, density and coverage of generated features (n, D)."""
        return self.members(generated).prdc()

    def frechet(self, generated: Any) -> float:
        """The Frechet distance to generated features (n, D)."""
        generated = as_features(generated, "generated")
        require_same_width(self.features, generated, "real", "generated")
        return frechet_between(self._gaussian, gaussian(generated, "generated"))


class Sets:
    """A real and a generated set as one judge sees them: what every metric of the catalogue is given.

    Args:
        generated: features, (n, D).
        per_image: by name, a value for each generated image, (n,): whether the judge names it rightly, whether it is a copy.
        names: what each generated image is called, for notes.
    """

    def __init__(
        self,
        real: Reference,
        generated: Any,
        per_image: Mapping[str, np.ndarray] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.real, self.generated = real, as_features(generated, "generated")
        require_same_width(real.features, self.generated, "real", "generated")
        self.per_image = dict(per_image or {})
        self.names: list[str] | None = None if names is None else list(names)

    def of(self, real_rows: np.ndarray, generated_rows: np.ndarray) -> Sets:
        """Some images of both: a class, or a group."""
        real = Reference(self.real.features[real_rows], self.real.k)
        values = {name: of_all[generated_rows] for name, of_all in self.per_image.items()}
        names = None if self.names is None else [self.names[row] for row in generated_rows.tolist()]
        return Sets(real, self.generated[generated_rows], values, names)

    @property
    def smaller(self) -> int:
        """The number of images of the smaller set."""
        return min(len(self.real.features), len(self.generated))

    @cached_property
    def members(self) -> Members:
        """Who is inside whose ball.

        Raises:
            TooFew: a set has no more than k images.
        """
        m, n, k = len(self.real.features), len(self.generated), self.real.k
        if self.smaller <= k:
            remedy = f"; k = {self.smaller - 1} would work (--neighbours)" if self.smaller > 1 else ""
            raise TooFew(
                f"{m} real and {n} generated images: precision, recall, density and coverage at k = {k} need {k + 1} of "
                f"each{remedy}"
            )
        return self.real.members(self.generated)

    @cached_property
    def prdc(self) -> PRDC:
        """Precision, recall, density and coverage."""
        return self.members.prdc()


class TooFew(RequestError):
    """A set is too small for a metric; the problem says it in a whole sentence."""

    def __init__(self, problem: str) -> None:
        super().__init__("images", None, problem, "Add images.")


def draw_counts(labels: Sequence[Any], draws: int, seed: int | list[int]) -> np.ndarray:
    """How often each image is in each draw, with repetition; (draws, n) int32.

    How many images a class has is the recipe's choice and no chance, so images are drawn within their class: a draw has as
    many of each class as the set. Where a class has fewer than `FEWEST` they are drawn from all (within a class of one
    image nothing would vary).

    Args:
        labels: The images' classes, n of them.
    """
    random = np.random.default_rng(seed)
    classes = np.unique(np.array([str(label) for label in labels]), return_inverse=True)[1]
    if np.bincount(classes).min() < FEWEST:
        classes[:] = 0
    counts = np.zeros((draws, len(classes)), np.int32)
    for name in np.unique(classes):
        rows = np.flatnonzero(classes == name)
        drawn = rows[random.integers(0, len(rows), (draws, len(rows)))]
        np.add.at(counts, (np.arange(draws)[:, None], drawn), 1)
    return counts


def redrawn_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean of one value an image, (n,), in every draw; (draws,)."""
    return counts @ np.asarray(values, np.float64) / counts.sum(axis=1)


def redrawn_members(found: Members, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, density, coverage and F1 of every draw, (draws,) each; the radii of the real balls stay.

    Of coverage, what each image covers alone is added as often as the image was drawn beyond once.
    """
    n, m = len(found.held), len(found.holds)
    alone = np.bincount(found.one[found.holds == 1], minlength=n) / m
    precision, density = redrawn_mean(found.held > 0, counts), redrawn_mean(found.held / found.k, counts)
    coverage = np.mean(found.holds > 0) + (counts - 1) @ alone
    total = precision + coverage
    f1 = np.divide(2 * precision * coverage, total, out=np.zeros(len(total)), where=total > 0)
    return {"precision": precision, "density": density, "coverage": coverage, "f1": f1}


def redrawn_frechet(real: np.ndarray, generated: np.ndarray, counts: np.ndarray, directions: int = DIRECTIONS) -> np.ndarray:
    """The Frechet distance of every draw, (draws,), in the leading directions of both sets together.

    Up to `directions` features it is the whole distance.
    """
    width, centre = real.shape[1], (mean(real) + mean(generated)) / 2
    real, generated = (features - centre for features in (real, generated))
    if width > directions:
        basis = _leading(np.concatenate([real, generated]), directions)
        real, generated = real @ basis, generated @ basis
    of_real, n = gaussian(real, "real"), len(generated)
    spread = float(np.sum(of_real.factor**2))
    distances = np.empty(len(counts))
    for draw, count in enumerate(counts):
        moved = count @ generated / n
        centred = generated - moved
        cov = centred.T @ (centred * count[:, None]) / (n - 1)
        # tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of F1 S2 F1', symmetric
        shared = np.linalg.eigvalsh(of_real.factor @ cov @ of_real.factor.T)
        overlap = float(np.sqrt(shared.clip(min=0)).sum())
        distances[draw] = np.sum((moved - of_real.mean) ** 2) + spread + np.trace(cov) - 2 * overlap
    return distances


def _leading(points: np.ndarray, directions: int, rounds: int = 3) -> np.ndarray:
    """An orthonormal basis, (D, directions), of nearly the leading directions of points (N, D): subspace iteration.

    Source: Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4. That it is a little off costs nothing here: any
    directions that hold most of both sets will do.
    """
    basis = np.random.default_rng(0).normal(size=(points.shape[1], directions))
    for _ in range(rounds):
        basis = np.linalg.qr(points.T @ (points @ basis))[0]
    return basis
