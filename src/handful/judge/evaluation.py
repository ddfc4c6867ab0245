"""What a judge found of a generated set: every metric, pooled and per class, after mild transforms, and over baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from handful.data.notebook import html_table
from handful.judge.gains import AS_IS, Comparison
from handful.judge.groups import Groups
from handful.judge.verdict import verdict
from handful.metrics import catalogue
from handful.metrics.summary import Summary, plain

Row = dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """What a judge found.

    Attributes:
        judge: The extractor's name, and `judge_digest` its weights and preprocessing.
        summary: Every metric, pooled and per class, with the real-against-real ceiling.
        transformed: The audited metrics, pooled, after each mild transform of both sets; empty where the audit was left out.
        gains: By the baseline's name, what this set gains over it.
        intervals: By metric, where its value may lie for other images of the same generator (`gains.LEVEL`); see `gains`.
        groups: What was found by group; None where there are none.
        copies: The files of the images that count as `copied`.
        notes: What the user should know.
    """

    judge: str
    judge_digest: str
    summary: Summary
    transformed: Mapping[str, Row] = field(default_factory=dict)
    gains: Mapping[str, Comparison] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    groups: Groups | None = None
    copies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def judge_accuracy(self) -> float | None:
        """Share of generated images that the judge names as asked; None if it is no classifier of these classes."""
        return self.summary.pooled.generated.judge_accuracy

    @property
    def copied(self) -> float | None:
        """Share of generated images nearer (in pixels) to an exemplar of their class than 99 % of the real images are.

        None where no exemplars were given.
        """
        return self.summary.pooled.generated.copied

    def robust(self, metric: str) -> float | None:
        """The mean of a metric over the transforms; None where the audit was left out, or the metric has no value there."""
        values = [value for row in self.transformed.values() if (value := row.get(metric)) is not None]
        return float(np.mean(values)) if values else None

    def row(self) -> Row:
        """The pooled numbers, flat: a row of a table."""
        own = self._plain()
        robust = [metric.name for metric in catalogue.METRICS if metric.audited and metric.name in own]
        return {**own, **{f"robust_{name}": self.robust(name) for name in robust}}

    def by_view(self) -> dict[str, Row]:
        """The pooled metrics as is (`gains.AS_IS`) and after each transform."""
        return {AS_IS: self._plain(), **{name: dict(row) for name, row in self.transformed.items()}}

    def _repr_html_(self) -> str:
        robust = {name: self.robust(name) for name in self._plain()}
        rows = [[name, value, robust[name]] for name, value in self._plain().items()]
        return html_table(
            f"judged by {self.judge}", ["metric", "value", "after transforms"], rows, [*self.notes, *self.verdict]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, safe for JSON."""
        pooled = self.summary.pooled.generated
        sizes = {"k": self.summary.k, "n_real": pooled.n_real, "n_generated": pooled.n_generated}
        found = plain(
            {
                "judge": self.judge,
                "judge_digest": self.judge_digest,
                "neighbours": self.summary.k,  # `k` is its former name
                **self.row(),
                **self.summary.to_dict(),
                "transformed": {name: {**row, **sizes} for name, row in self.transformed.items()},
                "gains": {name: found.to_dict() for name, found in self.gains.items()},
                "intervals": dict(self.intervals),
                "groups": self.groups and self.groups.to_dict(),
                "copies": self.copies,
                "notes": list(self.notes),
            }
        )
        return {**found, "verdict": verdict(found)}

    @property
    def verdict(self) -> list[str]:
        """The result in plain sentences, the first beginning with Good, Fair or Bad (`judge/verdict.py`)."""
        return self.to_dict()["verdict"]

    def _plain(self) -> Row:
        values = self.summary.pooled.generated.values
        return {each.name: values[each.name] for each in catalogue.METRICS if each.compared and each.name in values}
