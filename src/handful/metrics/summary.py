"""Every distribution metric at once, pooled and per class, with a real-against-real ceiling beside each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from handful.errors import RequestError
from handful.metrics._features import as_count, as_pair
from handful.metrics.frechet import frechet
from handful.metrics.neighbours import require_neighbours
from handful.metrics.prdc import prdc
from handful.metrics.vendi import vendi

METRICS = ("precision", "recall", "density", "coverage", "f1", "frechet", "vendi", "vendi_real")


@dataclass(frozen=True)
class Scores:
    """Metrics of one generated set against one real set; None where a set is too small, `note` saying why."""

    n_real: int
    n_generated: int
    precision: float | None = None  # see PRDC for these five
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    f1: float | None = None
    frechet: float | None = None  # >= 0, lower is better; biased upwards at small n
    vendi: float | None = None  # of the generated set, in [1, n_generated]
    vendi_real: float | None = None  # of the real set, in [1, n_real]
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Scores of the generated images, and of real images in their place."""

    generated: Scores
    ceiling: Scores | None  # one half of the real images against the other; None where it was not asked for


@dataclass(frozen=True)
class Summary:
    """What `summarize` found, with what the numbers depend on."""

    k: int
    dimensions: int  # D of the features
    seed: int  # of the ceiling's split
    pooled: Group  # all images together, whatever their class
    per_class: dict[str, Group]
    mean_over_classes: Group  # n_real and n_generated are those of the whole; None values are left out of a mean

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values for JSON: no NaN or infinity, None instead."""
        return _plain(asdict(self))


def summarize(
    real: Any,
    generated: Any,
    real_labels: Iterable[Any],
    generated_labels: Iterable[Any],
    k: int = 5,
    ceiling: bool = True,
    seed: int = 0,
) -> Summary:
    """Every distribution metric (`METRICS`): pooled, per class, and as means over classes.

    The ceiling splits the real images of each class at random into halves and measures one half, as if it were
    generated, against the other. Its n is therefore **half** of the real set's: precision and coverage depend mildly on
    n, the Frechet distance and Vendi score strongly, so those are to be read with the ceiling's own `n_real`.

    A class too small for k has None for precision, recall, density, coverage and F1, and a note; the rest goes on.

    Args:
        real: features of real images, (m, D); numpy array or torch tensor.
        generated: features of generated images, (n, D).
        real_labels: a label for each real image, m of them: strings or numbers; compared as strings.
        generated_labels: a label for each generated image, n of them.
        k: neighbour of precision, recall, density and coverage; at least 1.
        ceiling: measure real against real too (about half the time again).
        seed: of the split; a class's split depends on nothing but its name, its size and this.

    Returns:
        Summary; per_class is in the order of the sorted names.

    Raises:
        RequestError: bad features (see `prdc`), labels that do not match them in number, a class on one side only,
            fewer than k + 1 images in all, or a zero feature row.
    """
    real, generated = as_pair(real, generated)
    k = as_count(k, "k")
    real_rows = _rows_by_class(real_labels, len(real), "real_labels")
    generated_rows = _rows_by_class(generated_labels, len(generated), "generated_labels")
    _require_same_classes(real_rows, generated_rows)
    require_neighbours(len(real), k, "real")
    require_neighbours(len(generated), k, "generated")

    halves = {name: _halves(rows, name, seed) for name, rows in real_rows.items()}
    per_class = {
        name: Group(
            _scores(real[real_rows[name]], generated[generated_rows[name]], k),
            _ceiling(real, *halves[name], k) if ceiling else None,
        )
        for name in sorted(real_rows)
    }
    first, second = (np.concatenate([halves[name][side] for name in sorted(halves)]) for side in (0, 1))
    pooled = Group(_scores(real, generated, k), _ceiling(real, first, second, k) if ceiling else None)
    means = Group(
        _mean([group.generated for group in per_class.values()]),
        _mean([group.ceiling for group in per_class.values() if group.ceiling]) if ceiling else None,
    )
    return Summary(k, real.shape[1], seed, pooled, per_class, means)


def _rows_by_class(labels: Iterable[Any], n: int, name: str) -> dict[str, np.ndarray]:
    values = getattr(labels, "tolist", lambda: list(labels))()  # numpy and torch: plain Python values
    if len(values) != n:
        raise RequestError(name, len(values), f"so many labels for {n} images", "Give one per row of the features.")
    names, positions = np.unique(np.array([str(value) for value in values]), return_inverse=True)
    ends = np.cumsum(np.bincount(positions))[:-1]
    return dict(zip(names.tolist(), np.split(np.argsort(positions, kind="stable"), ends), strict=True))


def _require_same_classes(real: dict[str, np.ndarray], generated: dict[str, np.ndarray]) -> None:
    for name, extra, other in (
        ("real_labels", sorted(real.keys() - generated.keys()), "generated"),
        ("generated_labels", sorted(generated.keys() - real.keys()), "real"),
    ):
        if extra:
            more = f" (the first 8 of {len(extra)})" if len(extra) > 8 else ""
            problem = f"no {other} image has these classes{more}"
            raise RequestError(name, extra[:8], problem, "Add such images, or drop the classes here.")


def _halves(rows: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A class's rows in two random halves; the reference half takes the odd one."""
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(rows)
    middle = (len(rows) + 1) // 2
    return np.sort(order[:middle]), np.sort(order[middle:])


def _ceiling(real: np.ndarray, first: np.ndarray, second: np.ndarray, k: int) -> Scores:
    if len(second) == 0:
        return Scores(len(first), 0, note=f"{len(first)} real image: no two halves to compare")
    return _scores(real[first], real[second], k)


def _scores(real: np.ndarray, generated: np.ndarray, k: int) -> Scores:
    smaller, notes = min(len(real), len(generated)), []
    near = None
    if smaller > k:
        near = prdc(real, generated, k)
    else:
        remedy = f"; k = {smaller - 1} would work" if smaller > 1 else ""
        notes.append(
            f"{len(real)} real and {len(generated)} generated images: precision, recall, density and coverage at "
            f"k = {k} need {k + 1} of each{remedy}"
        )
    distance = None
    if smaller > 1:
        distance = frechet(real, generated)
    else:
        notes.append("the Frechet distance needs 2 of each")
    return Scores(
        n_real=len(real),
        n_generated=len(generated),
        precision=near and near.precision,
        recall=near and near.recall,
        density=near and near.density,
        coverage=near and near.coverage,
        f1=near and near.f1,
        frechet=distance,
        vendi=vendi(generated),
        vendi_real=vendi(real),
        note="; ".join(notes),
    )


def _mean(scores: list[Scores]) -> Scores:
    means: dict[str, float | None] = {}
    partial = []
    for metric in METRICS:
        values = [value for each in scores if (value := getattr(each, metric)) is not None]
        means[metric] = math.fsum(values) / len(values) if values else None
        if len(values) < len(scores):
            partial.append(f"{metric} over {len(values)}")
    note = f"of {len(scores)} classes, only: {', '.join(partial)}" if partial else ""
    return Scores(
        n_real=sum(each.n_real for each in scores), n_generated=sum(each.n_generated for each in scores), note=note, **means
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
