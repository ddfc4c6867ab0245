"""Every distribution metric at once, pooled and per class, with a real-against-real ceiling beside each."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from handful.errors import RequestError, counted
from handful.metrics._features import as_features, require_same_width
from handful.metrics.catalogue import Metric, chosen, is_metric, measure
from handful.metrics.neighbours import require_neighbours
from handful.metrics.reference import Reference, Sets


@dataclass(frozen=True)
class Scores:
    """Metrics of one generated set against one real set. Each is an attribute too, such as `scores.precision`.

    Attributes:
        n_real, n_generated: The numbers of images.
        values: By the metric's name (`metrics/catalogue.py`); None where it can't be had, `note` saying why.
        note: In words; "" where there is nothing to say.
    """

    n_real: int
    n_generated: int
    values: Mapping[str, float | None] = field(default_factory=dict)
    note: str = ""

    def __getattr__(self, name: str) -> float | None:
        values = self.__dict__.get("values", {})  # before __init__, when copied or unpickled, there is none
        if name in values:
            return values[name]
        if is_metric(name):
            return None
        raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        return {"n_real": self.n_real, "n_generated": self.n_generated, **self.values, "note": self.note}


@dataclass(frozen=True)
class Group:
    """Scores of the generated images, and of real images in their place."""

    generated: Scores
    ceiling: Scores | None  # one half of the real images against the other; None where it was not asked for

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"generated": self.generated.to_dict(), "ceiling": self.ceiling and self.ceiling.to_dict()}


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
        return plain(
            {
                "k": self.k,
                "dimensions": self.dimensions,
                "seed": self.seed,
                "pooled": self.pooled.to_dict(),
                "per_class": {name: group.to_dict() for name, group in self.per_class.items()},
                "mean_over_classes": self.mean_over_classes.to_dict(),
            }
        )


def summarize(
    real: Any,
    generated: Any,
    real_labels: Iterable[Any],
    generated_labels: Iterable[Any],
    k: int = 5,
    ceiling: bool = True,
    seed: int = 0,
    *,
    metrics: Sequence[Metric] | None = None,
    per_image: Mapping[str, np.ndarray] | None = None,
    real_per_image: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] | None = None,
) -> Summary:
    """Every metric (`metrics/catalogue.py`): pooled, per class, and as means over classes.

    The ceiling splits the real images of each class at random into halves and measures one half, as if it were
    generated, against the other. Its n is therefore **half** of the real set's: precision and coverage depend mildly on
    n, the Frechet distance and Vendi score strongly, so those are to be read with the ceiling's own `n_real`.

    A class too small for k has None for precision, recall, density, coverage and F1, and a note; the rest goes on.

    Args:
        real: features of real images, (m, D); numpy array, torch tensor, or a `Reference`, whose k counts then.
        generated: features of generated images, (n, D).
        real_labels: a label for each real image, m of them: strings or numbers; compared as strings.
        generated_labels: a label for each generated image, n of them.
        k: neighbour of precision, recall, density and coverage; at least 1.
        ceiling: measure real against real too (about half the time again).
        seed: of the split; a class's split depends on nothing but its name, its size and this.
        metrics: which; None: the usual ones.
        per_image: by name, values of the generated images, (n,); see `Sets`.
        real_per_image: the same of the real images, (m,), for the ceiling.
        names: what each generated image is called, for notes.

    Returns:
        Summary; per_class is in the order of the sorted names.

    Raises:
        RequestError: bad features (see `prdc`), labels that do not match them in number, a class on one side only, or
            fewer than k + 1 images in all.
    """
    reference = real if isinstance(real, Reference) else Reference(real, k)
    real, k, generated = reference.features, reference.k, as_features(generated, "generated")
    require_same_width(real, generated, "real", "generated")
    real_rows = rows_by_label(real_labels, len(real), "real_labels")
    generated_rows = rows_by_label(generated_labels, len(generated), "generated_labels")
    _require_same_classes(real_rows, generated_rows)
    require_neighbours(len(real), k, "real")
    require_neighbours(len(generated), k, "generated")
    asked = chosen() if metrics is None else list(metrics)

    def ceiling_of(first: np.ndarray, second: np.ndarray) -> Scores | None:
        if not ceiling:
            return None
        if len(second) == 0:
            return Scores(len(first), 0, note=f"with only {len(first)} real image there are no two halves to compare")
        values = {name: each[second] for name, each in (real_per_image or {}).items()}
        return scores(Sets(Reference(real[first], k), real[second], values), asked)

    whole = Sets(reference, generated, per_image, names)
    halves = {name: _halves(rows, name, seed) for name, rows in real_rows.items()}
    per_class = {
        name: Group(scores(whole.of(real_rows[name], generated_rows[name]), asked), ceiling_of(*halves[name]))
        for name in sorted(real_rows)
    }
    first, second = (np.concatenate([halves[name][side] for name in sorted(halves)]) for side in (0, 1))
    means = Group(
        mean_scores([group.generated for group in per_class.values()]),
        mean_scores([group.ceiling for group in per_class.values() if group.ceiling]) if ceiling else None,
    )
    return Summary(k, real.shape[1], seed, Group(scores(whole, asked), ceiling_of(first, second)), per_class, means)


def scores(sets: Sets, metrics: Sequence[Metric]) -> Scores:
    """What the metrics say of two sets."""
    return Scores(len(sets.real.features), len(sets.generated), *measure(sets, metrics))


def rows_by_label(labels: Iterable[Any], n: int, name: str) -> dict[str, np.ndarray]:
    """The rows of each label, which is compared as text; `name` is what errors call the labels."""
    values = getattr(labels, "tolist", lambda: list(labels))()  # numpy and torch: plain Python values
    if len(values) != n:
        raise RequestError(
            name, len(values), f"this is the number of labels, for {counted(n, 'image')}", "Give one per row of the features."
        )
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


def mean_scores(found: Sequence[Scores], of: str = "classes") -> Scores:
    """The plain mean of each metric over those that have it."""
    means: dict[str, float | None] = {}
    partial = []
    for name in dict.fromkeys(name for each in found for name in each.values):
        values = [value for each in found if (value := each.values.get(name)) is not None]
        means[name] = math.fsum(values) / len(values) if values else None
        if 0 < len(values) < len(found):
            partial.append(f"{name} over {len(values)}")
    note = f"of {len(found)} {of}, only: {', '.join(partial)}" if partial else ""
    return Scores(sum(each.n_real for each in found), sum(each.n_generated for each in found), means, note)


def plain(value: Any) -> Any:
    """Data safe for JSON: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
