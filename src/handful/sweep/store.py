"""A sweep's directory: what was asked for, what each set came to, and the results.

DIR/sweep.yaml                                the whole request, with versions and digests
DIR/sets/METHOD/scale-0.2-k-32/seed-0/        a run directory, as `handful generate` writes it
DIR/sets/METHOD/scale-0.2-k-32/seed-0.json    its record: recipe, seconds, operations, and what was measured of it
DIR/results.parquet, pareto.png, over_k.png, chosen.yaml    made from the records
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from handful.errors import counted
from handful.recipe.file import PROVENANCE
from handful.recipe.schema import with_new_fields
from handful.runs.comparison import Comparison, compared
from handful.runs.job_directory import OwnedDirectory
from handful.sweep.columns import SPLITS
from handful.sweep.planned import PlannedSet
from handful.sweep.request import SweepRequest
from handful.sweep.results import Record

MARK, RESULTS, CHOSEN, PARETO, OVER_K = "sweep.yaml", "results.parquet", "chosen.yaml", "pareto.png", "over_k.png"
# What decides a row beyond its set's own recipe. All else may change: a sweep grows by methods, scales, k and seeds.
_DECIDING = ("recipe", "real", "judge", "judge_class", "neighbours", "audit", "utility", "validation")
_CONTENTS = ("model_sha256", "exemplars_sha256", "real_sha256", "test_sha256", "judge_sha256")
_ASK_OTHERWISE = (
    "Choose another --out, or use the same settings as then. Methods, scales, k and seeds may be added; objective, within and "
    "baseline may change."
)


def sweep_directory(out: str | Path) -> OwnedDirectory:
    """The directory that a sweep writes into."""
    return OwnedDirectory(out, MARK, job="sweep", request="request", doing="sweeping")


def record_file(planned: PlannedSet) -> str:
    """Where a set's record lies, relative to the sweep's directory."""
    return f"{planned.name}.json"


def read_records(directory: OwnedDirectory, sets: Sequence[PlannedSet]) -> dict[str, Record]:
    """What is known of the sets, by name; a damaged record is none."""
    found: dict[str, Record] = {}
    for planned in sets:
        try:
            record = json.loads((directory.path / record_file(planned)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        measured = record.get("measured") if isinstance(record, dict) else ()
        if measured is None or (isinstance(measured, dict) and set(measured) == set(SPLITS)):
            found[planned.name] = record
    return found


def record_bytes(record: Record) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def sweep_yaml(request: SweepRequest, provenance: Mapping[str, Any]) -> bytes:
    """The request as YAML, always the same text for the same request."""
    data = {**request.as_dict(), PROVENANCE: dict(provenance)}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120).encode()


def check_same_sweep(
    directory: OwnedDirectory,
    stored: Mapping[str, Any],
    request: SweepRequest,
    provenance: Mapping[str, Any],
    sets: Sequence[PlannedSet],
    records: Mapping[str, Record],
) -> None:
    """Compares what lies there with what is asked for now.

    Args:
        provenance: Of now; what it does not say is not compared.

    Raises:
        RequestError: If rows that lie there would be others now; naming each difference.
    """
    before = stored[PROVENANCE]
    guides, now = before.get("features_sha256") or {}, provenance.get("features_sha256") or {}
    there, here = (
        {key: data.get(key, {} if key == "judge_class" else None) for key in _DECIDING}
        for data in (_renewed(stored), request.as_dict())
    )
    unlike = compared(there, here, before, provenance, _CONTENTS).unlike + [
        f"features {name}: {guides[name]} there, {now[name]} now" for name in now if guides.get(name, now[name]) != now[name]
    ]
    by_sets: dict[str, list[str]] = {}
    for planned in sets:
        if (record := records.get(planned.name)) is not None:
            of_set = compared(_renewed({"recipe": record["recipe"]}), {"recipe": planned.recipe.as_dict()}, before, provenance)
            for each in of_set.unlike:
                by_sets.setdefault(each, []).append(planned.name)
    for each, names in by_sets.items():
        if each not in unlike:  # else it differs for the whole sweep
            more = f" (and {counted(len(names) - 1, 'more set')})" if len(names) > 1 else ""
            unlike.append(f"{names[0]}{more}: {each.removeprefix('recipe.')}")
    Comparison(unlike, []).refuse(directory.path, "it holds a sweep with other settings", _ASK_OTHERWISE)


def _renewed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What was stored, its recipe as this version writes it."""
    return {**stored, "recipe": with_new_fields(stored["recipe"])} if "recipe" in stored else dict(stored)
