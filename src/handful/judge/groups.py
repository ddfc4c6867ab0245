"""Every metric by group (a region, a domain): each group's generated images against its own real ones, mean, worst and gap."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from handful.data.archives import read_table
from handful.data.sources import LabelledFiles
from handful.errors import RequestError, counted, did_you_mean, first_line
from handful.judge.gains import DRAWS, interval_of
from handful.metrics.catalogue import Metric, lower_is_better
from handful.metrics.reference import Sets, draw_counts
from handful.metrics.summary import Scores, mean_scores, rows_by_label, scores

_NAMES = ("file_name", "file", "path", "file_path", "image")  # columns that name an image


@dataclass(frozen=True)
class Groups:
    """What was found by group.

    Attributes:
        per_group: Each group's scores.
        intervals: Of each group's metrics, by the bootstrap over its generated images.
        mean: Over the groups.
        worst: By metric, the group with the worst value; left out where fewer than two groups have one.
        gap: By metric, how much better the best group is than the worst; 0 or more. Left out likewise.
    """

    per_group: Mapping[str, Scores]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    mean: Scores
    worst: Mapping[str, str]
    gap: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        per_group = {
            name: {**found.to_dict(), "intervals": dict(self.intervals[name])} for name, found in self.per_group.items()
        }
        return {"per_group": per_group, "mean": self.mean.to_dict(), "worst": dict(self.worst), "gap": dict(self.gap)}


def by_group(
    sets: Sets, real: Sequence[str | None], made: Sequence[str | None], metrics: Sequence[Metric], seed: int
) -> Groups:
    """Measures each group that both sets have; images without a group are left out.

    Args:
        sets: All images.
        real, made: The group of each real and generated image.
        metrics: Which.
        seed: Of the bootstrap.
    """
    rows = [rows_by_label((name or "" for name in names), len(names), "groups") for names in (real, made)]
    per_group, intervals = {}, {}
    for name in sorted((rows[0].keys() & rows[1].keys()) - {""}):
        of_group = sets.of(rows[0][name], rows[1][name])
        found = per_group[name] = scores(of_group, metrics)
        counts = draw_counts(["all"] * found.n_generated, DRAWS, seed)
        intervals[name] = {
            each.name: interval_of(value, each.redraw(of_group, counts))
            for each in metrics
            if each.redraw is not None and (value := found.values[each.name]) is not None
        }
    worst, gap = {}, {}
    for metric in metrics:
        values = {name: value for name, found in per_group.items() if (value := found.values[metric.name]) is not None}
        if metric.compared and len(values) > 1:
            choose = max if lower_is_better(metric.name) else min
            worst[metric.name] = choose(values, key=lambda name, of=values: of[name])
            gap[metric.name] = max(values.values()) - min(values.values())
    return Groups(per_group, intervals, mean_scores(list(per_group.values()), "groups"), worst, gap)


def read_groups(
    files: LabelledFiles, asked: str, tell: Callable[[str], None], role: str, real: LabelledFiles | None = None
) -> list[str | None]:
    """The group of each image of a set; None where it has none, which is reported.

    Args:
        files: The set.
        asked: A CSV file of image and `group`; a regular expression with one group in brackets, of class names, such as
            `.* in (.*)`; or a column that lies with the set (metadata.jsonl, parquet, its own CSV; `region` of GeoDE).
        tell: Is called with a text if images have no group.
        role: What errors call the set.
        real: Where it has this column, a class that lies in one group there has that group here too.

    Raises:
        RequestError: There is no such table or column, or no image has a group.
    """
    if asked in files.columns:
        found: list[str | None] = list(files.columns[asked])
    elif real is not None and asked in real.columns:
        of_class: dict[str, set[str]] = {}
        for label, group in zip(real.labels, real.columns[asked], strict=True):
            of_class.setdefault(label, set()).add(group)
        found = [next(iter(groups)) if len(groups := of_class.get(label, set())) == 1 else None for label in files.labels]
    elif asked.lower().endswith(".csv"):
        found = _by_name(read_table(Path(asked).expanduser(), "groups"), "group", asked, files)
    elif "(" in asked:
        try:
            pattern = re.compile(asked)
        except re.error as error:
            raise RequestError("groups", asked, f"this is not a regular expression ({error})", "Write '.* in (.*)'.") from None
        if pattern.groups != 1:
            problem = f"it has {counted(pattern.groups, 'group')} in brackets"
            raise RequestError("groups", asked, problem, "Write exactly one pair of brackets, as in '.* in (.*)'.")
        matches = {label: pattern.fullmatch(label) for label in files.classes}
        found = [match[1] if (match := matches[label]) else None for label in files.labels]
    else:
        found = _by_name(_beside(files.root, role), asked, str(files.root), files)
    if missing := found.count(None):
        if missing == len(found):
            problem = f"none of the {len(found)} {role} images has a group"
            raise RequestError("groups", asked, problem, "Name a column, a CSV file of image and group, or a pattern.")
        tell(f"left out of the results by group, as they have no group: {missing} of {len(found)} {role} images")
    return found


def _by_name(rows: Sequence[Mapping[str, Any]], column: str, where: str, files: LabelledFiles) -> list[str | None]:
    """The column of each file: by the path that a row states, as it ends; else by its name, where no other file has that."""
    columns = list(rows[0]) if rows else []
    name = next((each for each in _NAMES if each in columns), None)
    if column not in columns or name is None:
        lacks = f"column '{column}'" if column not in columns else f"column that names the image ({', '.join(_NAMES)})"
        raise RequestError("groups", where, f"it has no {lacks}", did_you_mean(column, columns, "Its columns"))
    stated: dict[str, set[str]] = {}
    short: dict[str, set[str]] = {}
    for row in rows:
        if row.get(column) not in (None, "") and row.get(name):
            text = str(row[name].get("path") if isinstance(row[name], Mapping) else row[name])
            stated.setdefault(text, set()).add(str(row[column]))
            short.setdefault(Path(text).name, set()).add(str(row[column]))
    paths = [Path(each) for each in files.names]
    same = Counter(path.name for path in paths)  # 000.png of another class is another image

    def group(path: Path) -> str | None:
        ends = ["/".join(path.parts[-length:]) for length in range(len(path.parts), 0, -1)]
        found = next((stated[end] for end in (str(path), *ends) if end in stated), set())
        found = found or (short.get(path.name, set()) if same[path.name] == 1 else set())
        return next(iter(found)) if len(found) == 1 else None

    return [group(path) for path in paths]


def _placed(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """A row of a folder's own metadata.jsonl, with the folder before its file's name."""
    return {**row, "file_name": folder + row["file_name"]} if isinstance(row.get("file_name"), str) else row


def _beside(root: Path, role: str) -> list[dict[str, Any]]:
    """The table that lies with a set."""
    if root.suffix == ".csv":
        return read_table(root, "groups")
    try:
        if root.suffix == ".parquet":
            file = pq.ParquetFile(root)
            columns = [name for name in file.schema_arrow.names if name != "image"] + ["image.path"]
            return file.read(columns=columns, use_threads=False).to_pylist()
        tables = [*root.glob("metadata.jsonl"), *root.glob("*/metadata.jsonl")]
        rows = [
            _placed(json.loads(line), "" if table.parent == root else f"{table.parent.name}/")
            for table in tables
            for line in table.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RequestError("groups", root, f"its table can't be read ({first_line(error)})", "Write it again.") from None
    if not rows:
        problem = f"the {role} images have no metadata.jsonl, so they have no columns"
        raise RequestError("groups", root, problem, "Give a CSV file of image and group, or a pattern of class names.")
    return rows
