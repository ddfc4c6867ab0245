"""A sweep's rows: one for each set and half of the real images, tidy, with what they gain over the baseline."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from handful.errors import RequestError
from handful.runs.manifest import parquet_bytes
from handful.sweep.columns import KEYS, SPLITS, gained, improvement, numbers
from handful.sweep.planned import PlannedSet, Setting

Row = dict[str, Any]
Record = dict[str, Any]


def rows_of(sets: Sequence[PlannedSet], records: Mapping[str, Record], baseline: str) -> list[Row]:
    """The rows of all sets that are measured, in the plan's order.

    Args:
        records: By the set's name; see `handful.sweep.store`. Others' are passed over.
        baseline: The method that gains and cost ratios are against, at the same seed.
    """
    measured = [each for each in sets if records.get(each.name, {}).get("measured")]
    against = {each.seed: records[each.name] for each in measured if each.setting.method == baseline}
    rows = []
    for each in measured:
        record, base = records[each.name], against.get(each.seed)
        for split in SPLITS:
            found = record["measured"][split]
            rows.append(
                {
                    "method": each.setting.method,
                    "scale": each.setting.scale,
                    "k": each.setting.k,
                    "seed": each.seed,
                    "split": split,
                    "images": record["images"],
                    **found,
                    "seconds": record["seconds"],
                    "cost_ratio": _ratio(record["seconds"], base["seconds"] if base else None),
                    "flops_ratio": record["flops_ratio"],
                    **against_baseline(found, base["measured"][split] if base else {}),
                }
            )
    return rows


def against_baseline(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> Row:
    """What a row gains over the baseline's, by column, positive where it is better; and the Frechet distances' ratios.

    None where either was not measured.
    """
    found: Row = {
        name: _ratio(row.get(name.removesuffix("_ratio")), baseline.get(name.removesuffix("_ratio")))
        for name in ("frechet_ratio", "robust_frechet_ratio")
    }
    for column in gained():
        value, other = row.get(column), baseline.get(column)
        found[f"gain_{column}"] = None if value is None or other is None else improvement(column, value, other)
    return found


def parquet_of(rows: Sequence[Row]) -> bytes:
    """The rows as a parquet file's bytes, the same for the same rows; numbers that were not measured are null."""
    known = {name for row in rows for name in row}
    columns = [name for name in numbers() if name in known] + sorted(known - {*KEYS, *numbers()})
    schema = pa.schema(
        [
            ("method", pa.string()),
            ("scale", pa.float64()),
            ("k", pa.int64()),
            ("seed", pa.int64()),
            ("split", pa.string()),
            ("images", pa.int64()),
            *((name, pa.float64()) for name in columns),
        ]
    )
    return parquet_bytes(rows, schema)


def read_results(path: str | Path) -> list[Row]:
    """The rows of a sweep's results.parquet.

    Raises:
        RequestError: If there is no such file, or it is no parquet file.
    """
    try:
        # not pq.read_table, whose threads abort the process at exit beside torch's
        return pq.ParquetFile(io.BytesIO(Path(path).read_bytes())).read(use_threads=False).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RequestError("results", str(path), f"it can't be read ({error})", "Give a sweep's results.parquet.") from None


@dataclass(frozen=True)
class Mean:
    """A setting's numbers on one half of the real images, over the seeds.

    Attributes:
        mean: By column; None where a number is missing.
        spread: Standard deviations between seeds; None for a single seed.
        values: Each column's values, in the order of the seeds.
    """

    setting: Setting
    seeds: tuple[int, ...]
    mean: dict[str, float | None]
    spread: dict[str, float | None]
    values: dict[str, list[float | None]]


def means(rows: Sequence[Row], split: str) -> dict[Setting, Mean]:
    """Each setting's means over the seeds, in the rows' order."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        if row["split"] == split:
            groups.setdefault(Setting(row["method"], row["scale"], row["k"]), []).append(row)
    found = {}
    for setting, members in groups.items():
        names = dict.fromkeys(name for row in members for name in row if name not in KEYS)
        values = {name: [row.get(name) for row in members] for name in names}
        found[setting] = Mean(
            setting,
            tuple(row["seed"] for row in members),
            {name: _finite_mean(each) for name, each in values.items()},
            {name: _spread(each) for name, each in values.items()},
            values,
        )
    return found


def _finite_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) == len(values) > 1 and all(map(math.isfinite, known)) else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None
