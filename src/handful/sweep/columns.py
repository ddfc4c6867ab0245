"""What a sweep's rows hold: the columns by name, which way is better, and how tables call them.

The metrics' columns come from the one table of metrics (`metrics/catalogue.py`): `NAME`, `robust_NAME`, `gain_NAME`.
"""

from __future__ import annotations

from handful.metrics import catalogue

# What names a row.
KEYS = ("method", "scale", "k", "seed", "split", "images")
VALIDATION, TEST = "validation", "test"
SPLITS = (VALIDATION, TEST)
# What a sweep measures beyond the judge's metrics, and how tables call it; "" where they leave it out.
_UTILITY = {"utility": "utility", "utility_spread": ""}
_COSTS = {"seconds": "", "cost_ratio": "x time", "flops_ratio": "x FLOPs", "frechet_ratio": "", "robust_frechet_ratio": ""}
_LOWER = frozenset(("utility_spread", *_COSTS))


def judged() -> list[str]:
    """What a judge finds of images as they are."""
    return [metric.name for metric in catalogue.chosen() if metric.compared]


def robust() -> list[str]:
    """The mean over mild transforms of real and generated images alike."""
    return [f"robust_{metric.name}" for metric in catalogue.chosen() if metric.compared and metric.audited]


def gained() -> list[str]:
    """What has a gain over the baseline of the same seed: the difference, positive where it is better (as in `judge.gains`)."""
    return [*judged(), *robust(), "utility"]


def numbers() -> list[str]:
    """All columns but those that name a row."""
    return [*judged(), *robust(), *_UTILITY, *_COSTS, *(f"gain_{name}" for name in gained())]


def headings() -> dict[str, str]:
    """What tables show, and what they call it."""
    brief = [metric for metric in catalogue.chosen() if metric.compared and metric.brief]
    known = set(robust())
    return {
        **{metric.name: metric.heading for metric in brief},
        **{f"robust_{metric.name}": f"rob.{metric.heading}" for metric in brief if f"robust_{metric.name}" in known},
        **{name: heading for name, heading in {**_UTILITY, **_COSTS}.items() if heading},
    }


def lower_is_better(column: str) -> bool:
    """Which direction of a column is better."""
    return column in _LOWER or catalogue.lower_is_better(column)


def improvement(column: str, value: float, other: float) -> float:
    """How much better `value` is than `other`, in the column's own units; negative if it is worse."""
    return other - value if lower_is_better(column) else value - other
