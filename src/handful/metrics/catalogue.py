"""The one table of metrics. `summary`, `evaluate`, its gains, `sweep`, `calibrate` and the reports read it.

A metric is a row here and its function; nothing else names it. The column `NAME` is the metric of images as they are;
`robust_NAME` its mean over mild transforms of real and generated images alike; `gain_NAME` how much better than a baseline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from handful.errors import RequestError, did_you_mean
from handful.metrics.kernel import authenticity, cmmd, frechet_at_infinity, kernel_distance
from handful.metrics.reference import Sets, TooFew, redrawn_frechet, redrawn_mean, redrawn_members
from handful.metrics.vendi import vendi

Redraw = Callable[[Sets, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One row.

    Attributes:
        name: In Python, JSON, and the columns of a sweep.
        measure: Its value of two sets; None where there is nothing to measure. It may raise `RequestError`: the value is then
            None, and the error a note.
        meaning: In a few words, for the notes below a table; "" where the heading says all.
        audited: Whether it is judged again after the transforms.
        redraw: Its values in bootstrap draws, (draws,), given how often each generated image is drawn, (draws, n); None where
            a draw would falsify it. Only the spread of the draws is used.
        compared: Whether it says how good a set is: then it has gains, and a place in tables and rows.
        usual: Whether it is measured without being asked for.
    """

    name: str
    heading: str
    measure: Callable[[Sets], float | None]
    meaning: str = ""
    lower_is_better: bool = False
    audited: bool = True
    redraw: Redraw | None = None
    compared: bool = True
    brief: bool = True
    usual: bool = True


def _near(name: str, heading: str, meaning: str = "", redrawn: bool = True, brief: bool = True) -> Metric:
    """One of precision, recall, density, coverage and F1 (`metrics/prdc.py`)."""
    redraw: Redraw = lambda sets, counts: redrawn_members(sets.members, counts)[name]  # noqa: E731
    return Metric(
        name, heading, lambda sets: getattr(sets.prdc, name), meaning, redraw=redraw if redrawn else None, brief=brief
    )


def per_image(name: str, heading: str, meaning: str, **others: bool) -> Metric:
    """The mean of a value that each generated image has (`Sets.per_image`); None where it was not taken."""

    def measure(sets: Sets) -> float | None:
        values = sets.per_image.get(name)
        return None if values is None else float(np.mean(values))

    def redraw(sets: Sets, counts: np.ndarray) -> np.ndarray:
        return redrawn_mean(sets.per_image[name], counts)

    return Metric(name, heading, measure, meaning, redraw=redraw, **others)


def _frechet(sets: Sets) -> float:
    if sets.smaller < 2:
        raise TooFew("the Frechet distance needs 2 of each")
    return sets.real.frechet(sets.generated)


# fmt: off
METRICS: tuple[Metric, ...] = (
    _near("precision", "precision", "share of the generated images that look like real ones"),
    _near("recall", "recall", "share of the real images among the generated ones; typical images, close together, get less",
          redrawn=False),
    _near("density", "density", "how many real images lie around each generated one; above 1 where images are typical",
          brief=False),
    _near("coverage", "coverage", "share of the real images that have a generated one beside them: the variety"),
    _near("f1", "F1", "harmonic mean of precision and coverage (of the images, not of a classifier)"),
    Metric("frechet", "Frechet", _frechet, "distance of the two sets' means and covariances, 0 at best; less with more images",
           lower_is_better=True, redraw=lambda sets, counts: redrawn_frechet(sets.real.features, sets.generated, counts)),
    Metric("vendi", "Vendi", lambda sets: vendi(sets.generated), "how many entirely different images the set is worth",
           audited=False, brief=False),
    Metric("vendi_real", "Vendi of real", lambda sets: vendi(sets.real.features), audited=False, compared=False),
    per_image("judge_accuracy", "accuracy", "share of the generated images in which the judge sees the class that was asked "
    "for"),
    per_image("copied", "copied", "share of the generated images that are nearer to an exemplar of their class than 99 % of the"
              " real images are (in pixels); 0.01 is expected", lower_is_better=True, audited=False),
    per_image("clip_score", "CLIPScore", "100 times the cosine of image and prompt in CLIP, not below 0", audited=False,
              usual=False),
    Metric("kernel_distance", "KD", lambda sets: kernel_distance(sets.real.features, sets.generated),
           "unbiased kernel distance (KID, KD), mean of 100 subsets of up to 1,000", lower_is_better=True, usual=False),
    Metric("frechet_infinity", "Frechet inf.", lambda sets: frechet_at_infinity(sets.real.features, sets.generated),
           "Frechet distance of infinitely many images, by extrapolation", lower_is_better=True, audited=False, usual=False),
    Metric("authenticity", "authenticity", lambda sets: authenticity(sets.real.features, sets.generated),
           "share whose nearest real image is nearer to another real image than to it", audited=False, usual=False),
    Metric("cmmd", "CMMD", lambda sets: cmmd(sets.real.features, sets.generated),
           "1,000 times the squared MMD of unit features (meant for CLIP's)", lower_is_better=True, usual=False),
)
# fmt: on


def is_metric(name: str) -> bool:
    """Whether a metric has this name."""
    return any(metric.name == name for metric in METRICS)


def headings() -> dict[str, str]:
    """What tables call each metric that says how good a set is, by name."""
    return {metric.name: metric.heading for metric in METRICS if metric.compared}


PER_IMAGE = ("judge_accuracy", "copied", "clip_score")  # means of what each image has: features alone do not give them


def chosen(extra: Iterable[str] = ()) -> list[Metric]:
    """The usual metrics, and those that are asked for by name, in the table's order.

    Raises:
        RequestError: If there is no such metric.
    """
    asked = set(extra)
    known = [metric.name for metric in METRICS]
    for name in sorted(asked - set(known)):
        raise RequestError("metrics", name, "there is no such metric", did_you_mean(name, known, "Metrics"))
    return [metric for metric in METRICS if metric.usual or metric.name in asked]


def measure(sets: Sets, metrics: Iterable[Metric]) -> tuple[dict[str, float | None], str]:
    """Each metric's value by name; and, where one can't be had, why."""
    values: dict[str, float | None] = {}
    notes: dict[str, None] = {}
    for metric in metrics:
        values[metric.name] = None
        try:
            values[metric.name] = metric.measure(sets)
        except TooFew as error:
            notes[error.problem] = None
        except RequestError as error:
            which = _named(str(error.value), sets.names if metric.compared else None)
            notes[f"no {metric.heading}: {which}: {error.problem}"] = None
    return values, "; ".join(notes)


def _named(value: str, names: Sequence[str] | None) -> str:
    """`row 3` as that image's name, where it has one."""
    row = re.fullmatch(r"row (\d+)", value)
    return names[int(row[1])] if row and names is not None else value


def lower_is_better(column: str) -> bool:
    """Which direction is better of a metric or its robust column. A gain is better when higher."""
    return any(metric.lower_is_better for metric in METRICS if column.removeprefix("robust_") == metric.name)


def improvement(column: str, value: float, other: float) -> float:
    """How much better `value` is than `other`, in the column's own units; negative if it is worse."""
    return other - value if lower_is_better(column) else value - other
