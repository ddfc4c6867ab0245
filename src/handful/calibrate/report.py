"""What a calibration shows: a table for people, the guidance block, a row for each candidate and step."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import yaml

from handful.calibrate.analysis import Found
from handful.calibrate.shortlist import Choice
from handful.errors import counted
from handful.guidance.classifier import ClassifierRequest
from handful.report.tables import Table, number
from handful.runs.manifest import parquet_bytes
from handful.sweep.columns import TEST, VALIDATION, lower_is_better

# Always written, whatever the defaults of a later handful; the rest of a term only where it is not the default.
_ALWAYS = ("method", "classifier", "classes", "scale", "jacobian", "input", "tau1", "tau2", "softplus", "reduce")
_MOST_ROWS = 14

_SCHEMA = pa.schema(
    [
        ("candidate", pa.string()),
        ("softplus", pa.float64()),
        ("input", pa.string()),
        ("tau1", pa.float64()),
        ("tau2", pa.float64()),
        ("fitted", pa.bool_()),
        ("step", pa.int64()),
        ("sigma_over_alpha", pa.float64()),
        ("temperature", pa.float64()),
        ("ece", pa.float64()),
        ("chance", pa.float64()),
        ("accuracy", pa.float64()),
        ("confidence", pa.float64()),
        ("nll", pa.float64()),
        ("roughness", pa.float64()),
        ("n", pa.int64()),
    ]
)


def rows_parquet(found: Mapping[str, Found]) -> bytes:
    """calibration.parquet: tidy, a row for each candidate and step; null where nothing was measured."""
    rows = []
    for each in found.values():
        about = each.candidate.facts
        for at in each.steps:
            numbers = {name: getattr(at, name) for name in _SCHEMA.names if name not in about}
            rows.append({**about, **numbers, "roughness": None if math.isnan(at.roughness) else at.roughness})
    return parquet_bytes(rows, _SCHEMA)


def guidance_block(term: ClassifierRequest) -> list[dict[str, Any]]:
    """The term as a recipe has it, a list of one: what differs from the defaults, and what decides most."""
    told = term.model_dump(mode="json")
    plain = term.model_dump(mode="json", exclude_defaults=True)
    return [{key: told[key] for key in told if key in plain or key in _ALWAYS}]


def guidance_yaml(term: ClassifierRequest, choice: Choice) -> bytes:
    """guidance.yaml: the block, and above it what it rests on."""
    name = choice.candidate.name
    by = "the integral calibration error" if choice.by == "calibration" else choice.by
    lines = [f"Written by handful calibrate: {name}; chosen by {by}. Put it below `guidance:` in a recipe.", *choice.notes]
    comments = [line for text in lines for line in textwrap.wrap(text, 120)]
    block = yaml.safe_dump(guidance_block(term), sort_keys=False, allow_unicode=True, width=120)
    return ("".join(f"# {line}\n" for line in comments) + block).encode()


def calibration_table(result: Mapping[str, Any]) -> Table:
    """The best calibrated candidates, the plain one and the chosen one, from what calibration.json holds."""
    chosen, plain = _key(result["chosen"]), _key(result["candidates"][0])
    table = Table(
        f"{result['classifier']}, {counted(result['images'], 'image')} at each step; integral calibration error",
        ["candidate", "ECE", "chance", "linear", "sine", "accuracy", "confidence", "NLL", "roughness"],
    )
    ordered = sorted(result["candidates"], key=lambda each: each["integral_ece"])
    shown = list({_key(each): each for each in reversed(ordered)}.values())[::-1]
    for place, each in enumerate(shown):
        marked = {plain: " (plain)", chosen: " <- chosen"}.get(_key(each), "")
        if place < _MOST_ROWS or marked:
            numbers = (
                each[name]
                for name in ("chance", "integral_ece_linear", "integral_ece_sine", "accuracy", "confidence", "nll", "roughness")
            )
            table.rows.append(
                [
                    each["candidate"] + marked,
                    f"{each['integral_ece']:.3f} ±{each['integral_ece_error']:.3f}",
                    *map(number, numbers),
                ]
            )
    table.notes = [
        f"{counted(len(ordered), 'candidate')}, {len(shown)} with different probabilities (tau2 alone changes none); the best "
        "are shown.",
        "ECE: mean over the steps ± standard error; chance: what a perfectly calibrated classifier of the same confidence "
        "shows with",
        "so few images; linear, sine: weighted by that gain. Roughness: share of the gradient in the upper half of",
        "frequencies; white noise has about 0.75, and a rough gradient is nearer to an adversarial one.",
        *(f"note: {note}" for note in result["notes"]),
    ]
    return table


def trials_table(trials: Mapping[str, Any]) -> Table:
    """What was tried on real images, on their half that was chosen by, the best first; then the confirmation."""
    objective = trials["objective"]
    always = ("robust_frechet", "robust_f1", "frechet", "f1", "judge_accuracy", "cost_ratio")
    columns = list(dict.fromkeys((objective, *always)))
    table = Table(f"tried on real images, by {objective}", ["method", "scale", "seed", *columns])
    rows = [row for row in trials["rows"] if row["split"] == VALIDATION and row[objective] is not None]
    known = sorted(rows, key=lambda row: row[objective], reverse=not lower_is_better(objective))
    shown = [*known[:8], *(row for row in known[8:] if row["method"] == "none")]
    shown += [row for row in trials["confirmed"] if row["split"] == TEST]
    for row in shown:
        again = "again: " if row in trials["confirmed"] else ""
        table.rows.append([again + row["method"], f"{row['scale']:g}", str(row["seed"]), *(number(row[c]) for c in columns)])
    table.notes = [
        f"{counted(len(known), 'set')}; again: made with other noise, judged on the half of the real images that was not used "
        "to choose"
    ]
    return table


def _key(candidate: Mapping[str, Any]) -> tuple[Any, ...]:
    """What its probabilities depend on."""
    return tuple(candidate[name] for name in ("softplus", "input", "tau1", "fitted"))
