"""Which setting a stated objective prefers: chosen on one half of the real images, reported on the other.

The best of many settings looks better than it is on the images it was chosen by; on images that had no say it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from handful.sweep.columns import TEST, VALIDATION, improvement, lower_is_better
from handful.sweep.planned import Setting
from handful.sweep.request import SweepRequest
from handful.sweep.results import Mean, Row, means


@dataclass(frozen=True)
class Lead:
    """How far a setting is ahead of the next one, seed by seed (both have the same noise and exemplars).

    Attributes:
        gap: Mean of the differences in the objective; positive.
        spread: Their standard deviation; None for fewer than two common seeds.
    """

    runner_up: Setting
    gap: float
    spread: float | None

    @property
    def within_spread(self) -> bool | None:
        """Whether the lead is no larger than what another seed may change; None where the spread is unknown."""
        return None if self.spread is None else self.gap <= self.spread

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**_named(self.runner_up), "gap": self.gap, "spread": self.spread, "within_spread": self.within_spread}


@dataclass(frozen=True)
class Pick:
    """A chosen setting.

    Attributes:
        validation, test: Its numbers where it was chosen, and where it had no say; None where that is not measured.
        lead: Over the next best of the settings that it was chosen among; None where it stood alone.
    """

    setting: Setting
    validation: Mean
    test: Mean | None
    lead: Lead | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = _named(self.setting)
        for split, numbers in ((VALIDATION, self.validation), (TEST, self.test)):
            found[split] = numbers and {"mean": numbers.mean, "spread": numbers.spread, "seeds": list(numbers.seeds)}
        return {**found, "runner_up": self.lead and self.lead.as_dict()}


@dataclass(frozen=True)
class Choice:
    """What the objective prefers.

    Attributes:
        best: Of all settings; None where none can be chosen.
        over_methods: How far it is ahead of the best setting of any other method; None where no other can be chosen.
        passed_over: Settings that could not be chosen, and why.
    """

    objective: str
    best: Pick | None
    over_methods: Lead | None
    methods: dict[str, Pick]
    passed_over: dict[Setting, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "objective": self.objective,
            "best": self.best and self.best.as_dict(),
            "over_methods": self.over_methods and self.over_methods.as_dict(),
            "methods": {name: pick.as_dict() for name, pick in self.methods.items()},
            "passed_over": [{**_named(setting), "why": why} for setting, why in self.passed_over.items()],
        }


def choose(rows: Sequence[Row], request: SweepRequest) -> Choice:
    """Chooses by the objective's mean over the seeds, among the settings within the request's bounds.

    A setting whose seeds are not all measured is compared by those it has. Of equals the first in the plan is taken.
    """
    seen, reported = means(rows, VALIDATION), means(rows, TEST)
    passed_over = {setting: why for setting, found in seen.items() if (why := _why_not(found, request))}
    fitting = [found for setting, found in seen.items() if setting not in passed_over]
    methods = {
        name: pick
        for name in dict.fromkeys(found.setting.method for found in seen.values())
        if (pick := _pick([each for each in fitting if each.setting.method == name], reported, request.objective))
    }
    best, over_methods = _pick(fitting, reported, request.objective), None
    if best is not None:
        others = [pick.validation for name, pick in methods.items() if name != best.setting.method]
        over_methods = lead_over(best.validation, ranked(others, request.objective)[0], request.objective) if others else None
    return Choice(request.objective, best, over_methods, methods, passed_over)


def best_at_each_k(rows: Sequence[Row], request: SweepRequest) -> dict[str, dict[int, Setting]]:
    """For each method and k, the setting that the objective prefers on the validation half, bounds or not."""
    found: dict[str, dict[int, list[Mean]]] = {}
    for setting, mean in means(rows, VALIDATION).items():
        if mean.mean.get(request.objective) is not None:
            found.setdefault(setting.method, {}).setdefault(setting.k, []).append(mean)
    return {
        method: {k: ranked(each, request.objective)[0].setting for k, each in sorted(by_k.items())}
        for method, by_k in found.items()
    }


def ranked(candidates: Sequence[Mean], objective: str) -> list[Mean]:
    """The best first; equals stay in their order."""
    sign = 1 if lower_is_better(objective) else -1
    return sorted(candidates, key=lambda found: sign * (found.mean[objective] or 0.0))


def lead_over(one: Mean, other: Mean, objective: str) -> Lead:
    """How far one setting is ahead of another, by the seeds that both have; by the means where they share none."""
    values = [dict(zip(found.seeds, found.values[objective], strict=True)) for found in (one, other)]
    common = [seed for seed in one.seeds if seed in values[1]]
    differences = [improvement(objective, values[0][seed] or 0.0, values[1][seed] or 0.0) for seed in common]
    if not differences:
        gap = improvement(objective, one.mean[objective] or 0.0, other.mean[objective] or 0.0)
        return Lead(other.setting, gap, None)
    return Lead(other.setting, fmean(differences), stdev(differences) if len(differences) > 1 else None)


def _why_not(found: Mean, request: SweepRequest) -> str | None:
    if found.mean.get(request.objective) is None:
        return f"{request.objective} is not known"
    for column, most in request.within.items():
        value = found.mean.get(column)
        if value is None:
            return f"{column} is not known"
        if value > most:
            return f"{column} is {value:.3g}, above {most:g}"
    return None


def _pick(candidates: Sequence[Mean], reported: Mapping[Setting, Mean], objective: str) -> Pick | None:
    if not candidates:
        return None
    best, *others = ranked(candidates, objective)
    return Pick(best.setting, best, reported.get(best.setting), lead_over(best, others[0], objective) if others else None)


def _named(setting: Setting) -> dict[str, Any]:
    return {"method": setting.method, "scale": setting.scale, "k": setting.k}
