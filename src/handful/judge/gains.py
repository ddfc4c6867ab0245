"""What a set gains over a baseline, and how much of that gain survives mild transforms of all images.

    gain = value - baseline's value              with the sign that makes positive better
    surviving gain = the mean over the transforms of the gain after each
    robust gain = surviving gain / gain          1: all of it survives; 0: only the judge saw it

A gain is separated from chance by the spread of its bootstrap draws (`metrics/reference.py`): both sets' images are drawn anew,
each from its own set and within its class, and one draw serves all views of a set. The real images stay: the interval says
what other images of the same two generators would change, not what another real set would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from handful.metrics import catalogue

AS_IS = ""  # the view before any transform
DRAWS = 200
LEVEL = 0.9  # of the intervals
SURVIVES, ADVERSARIAL = 3 / 4, 1 / 4  # shares of a gain

RULE = (
    f"verdict: may be chance if the {LEVEL:.0%} interval of the gain reaches 0; worse if all of the interval lies below 0."
    "  adversarial: less than a quarter of the gain is left after the small changes, so only the judge sees it.  survives:"
    " three quarters are left, this rest is above chance, and no single change takes more than three quarters away.  partly:"
    " between these two."
).replace("%", " %")

Values = Mapping[str, float | None]
Draws = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Measured:
    """A set's metrics, by view (`AS_IS`, then the transforms' names) and metric.

    Attributes:
        images: How many.
        values: None, or left out, where a metric can't be had.
        draws: The metrics of each bootstrap draw, (draws,); left out where a metric can't be drawn.
    """

    images: int
    values: Mapping[str, Values]
    draws: Mapping[str, Draws] = field(default_factory=dict)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Around each metric's value as is, the spread of its draws, at `LEVEL`."""
        values = {name: self.values[AS_IS].get(name) for name in self.draws.get(AS_IS, {})}
        return {name: interval_of(value, self.draws[AS_IS][name]) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Gain:
    """What a set gains in one metric; positive is better whatever the metric.

    Attributes:
        value, baseline: The metric of the set and of the baseline, as is.
        gain: The difference, signed.
        interval: Of the gain, at `LEVEL`; None where the metric can't be drawn.
        after: The gain after each transform.
        surviving: The mean of those; None without transforms.
        surviving_interval: Of that mean.
        robust_gain: surviving / gain; None where the gain may be chance (its interval reaches 0 or is unknown).
        verdict: `survives`, `partly`, `adversarial` or `no gain`, by `RULE`; None where interval or transforms are missing.
    """

    value: float | None
    baseline: float | None
    gain: float | None = None
    interval: tuple[float, float] | None = None
    after: dict[str, float] = field(default_factory=dict)
    surviving: float | None = None
    surviving_interval: tuple[float, float] | None = None
    robust_gain: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A set beside one baseline: each metric's `Gain`, the two numbers of images, and how the noise was estimated."""

    images: int
    baseline_images: int
    metrics: dict[str, Gain]
    draws: int = DRAWS
    level: float = LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare(made: Measured, baseline: Measured) -> Comparison:
    """The gain of one set over another in every metric that either has a value for, as is."""
    known = [
        metric.name
        for metric in catalogue.METRICS
        if metric.compared and any(each.values[AS_IS].get(metric.name) is not None for each in (made, baseline))
    ]
    draws = max((len(drawn) for drawn in made.draws.get(AS_IS, {}).values()), default=0)
    return Comparison(made.images, baseline.images, {name: gain_of(name, made, baseline) for name in known}, draws)


def gain_of(metric: str, made: Measured, baseline: Measured) -> Gain:
    """The gain in one metric."""
    value, other = made.values[AS_IS].get(metric), baseline.values[AS_IS].get(metric)
    gains = {view: gain for view in made.values if (gain := _difference(metric, view, made, baseline)) is not None}
    if AS_IS not in gains:
        return Gain(value, other)
    gain, after = gains[AS_IS], {view: found for view, found in gains.items() if view != AS_IS}
    drawn = {view: found for view in gains if (found := _drawn(metric, view, made, baseline)) is not None}
    interval = interval_of(gain, drawn[AS_IS]) if AS_IS in drawn else None
    surviving, surviving_interval = None, None
    if after:
        surviving = float(np.mean(list(after.values())))
        if all(view in drawn for view in after):
            surviving_interval = interval_of(surviving, np.mean([drawn[view] for view in after], axis=0))
    told_from_none = interval is not None and min(gain, interval[0]) > 0
    return Gain(
        value,
        other,
        gain,
        interval,
        after,
        surviving,
        surviving_interval,
        robust_gain=surviving / gain if told_from_none and surviving is not None else None,
        verdict=_verdict(gain, interval, after, surviving, surviving_interval),
    )


def _verdict(
    gain: float,
    interval: tuple[float, float] | None,
    after: Mapping[str, float],
    surviving: float | None,
    surviving_interval: tuple[float, float] | None,
) -> str | None:
    """`RULE`."""
    if interval is None or surviving is None or surviving_interval is None:
        return None
    if min(gain, interval[0]) <= 0:
        return "no gain"
    if surviving < ADVERSARIAL * gain:
        return "adversarial"
    lasting = min(after.values()) >= ADVERSARIAL * gain and surviving_interval[0] > 0
    return "survives" if lasting and surviving >= SURVIVES * gain else "partly"


def _difference(metric: str, view: str, made: Measured, baseline: Measured) -> float | None:
    value, other = made.values[view].get(metric), baseline.values.get(view, {}).get(metric)
    if value is None or other is None:
        return None
    return catalogue.improvement(metric, value, other)


def _drawn(metric: str, view: str, made: Measured, baseline: Measured) -> np.ndarray | None:
    value, other = made.draws.get(view, {}).get(metric), baseline.draws.get(view, {}).get(metric)
    if value is None or other is None:
        return None
    return other - value if catalogue.lower_is_better(metric) else value - other


def interval_of(centre: float, draws: np.ndarray) -> tuple[float, float]:
    """The draws' spread around their own mean, put around the value itself."""
    low, high = np.quantile(draws - draws.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return centre + float(low), centre + float(high)
