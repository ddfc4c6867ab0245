"""What a run directory holds, for its report: the request, the images made so far, and what was found about them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from handful.errors import RequestError, counted, some_of
from handful.judge.worth import KIND, Worth
from handful.runs.kept import all_kept
from handful.runs.metadata import exemplars_of
from handful.runs.run_directory import RunDirectory
from handful.zoo import judge_of

_A_RUN = "Name a directory that handful generate has written."
NO_GUIDANCE = "without guidance"


@dataclass
class Shown:
    """A run as its report shows it.

    Attributes:
        path, name: Where it is, and what it is called.
        recipe, provenance: From recipe.yaml.
        rows: Of the manifest: the images that are there, class by class.
        classes: Of the rows, in order.
        planned: How many images were asked for.
        exemplars: The folder of the exemplars, where it is there and holds images.
        evaluations: What `handful evaluate` kept, the newest last.
        worth: The newest that `handful utility` kept.
        notes: What is missing, in words.
    """

    path: Path
    name: str
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]
    classes: list[str]
    planned: int
    exemplars: Path | None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    worth: Worth | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def found(self) -> dict[str, Any] | None:
        """The newest evaluation's result."""
        return self.evaluations[-1]["result"] if self.evaluations else None

    @property
    def judging(self) -> str:
        """The command that judges it."""
        guides = [term.get("features") for term in self.recipe.get("guidance") or []]
        judge = judge_of(str(_part(self.recipe, "model").get("name")), guides)
        return shlex.join(
            ["handful", "evaluate", str(self.path), "--judge", judge, *([] if self.exemplars else ["--real", "DIR"])]
        )

    def in_words(self) -> str:
        """What was asked for, in a sentence or two."""
        model, sampler = _part(self.recipe, "model"), _part(self.recipe, "sampler")
        mix = self.recipe.get("mix") or []
        guided = "; ".join(f"{part['share']:g} share{'s' * (part['share'] != 1)} {_way(part)}" for part in mix)
        guided = f"a mixture: {guided}" if mix else _way(self.recipe)
        k, source = _part(self.recipe, "exemplars").get("k", _part(self.recipe, "exemplars").get("per_class")), ""
        if _part(self.recipe, "exemplars").get("path") and guided != NO_GUIDANCE:
            of = counted(k, "exemplar") if k else "all exemplars"
            source = f", with {of} per class from {_part(self.recipe, 'exemplars')['path']}"
        return (
            f"{counted(self.planned, 'image')} of {counted(len(self.recipe.get('classes') or self.classes), 'class')} from the "
            f"model {model.get('name')}, {guided}{source}. Sampler {sampler.get('name')}, steps: {sampler.get('steps')}, seed "
            f"{self.recipe.get('seed')}."
        )


def _way(part: Mapping[str, Any]) -> str:
    """What a recipe, or a setting of a mixture, says of guidance and start."""
    terms = [
        f"{each.get('method')} at scale {each['scale']:g}"
        for each in part.get("guidance") or []
        if each.get("scale") is not None
    ]
    said = [f"guided by {' and '.join(terms)}"] if terms else []
    if start := part.get("start"):
        whose = " of other classes" if start.get("of") == "others" else ""
        said.append(f"from noised exemplars{whose} (depth {start['depth']:g})")
    return " ".join(said) or NO_GUIDANCE


def gather(path: str | Path, name: str | None = None) -> Shown:
    """Reads what a report of a run needs; no image.

    Raises:
        RequestError: It is no run directory, or nothing has been generated in it yet.
    """
    root = Path(path).expanduser()
    root = root.parent if root.name == "images" else root
    recipe = _recipe(root)
    provenance, notes = recipe.pop("provenance"), list[str]()
    rows = [row for row in _rows(root) if row.get("status") == "done" and row.get("file")]
    if not rows:
        raise RequestError("OUT", root, "nothing has been generated in it yet", "Repeat its handful generate command first.")
    classes, plan = list(dict.fromkeys(row["class"] for row in rows)), RunDirectory(root).plan()
    planned = sum(map(sum, plan.sizes.values())) or int(recipe.get("per_class") or 0) * len(recipe.get("classes") or classes)
    if len(rows) < planned:
        missing = [name for name in plan.sizes if name not in set(classes)]
        lacks = f" It has no image of {some_of(missing)}." if missing else ""
        notes.append(f"This run is unfinished: it has {len(rows):,} of {counted(planned, 'image')}.{lacks} Repeat its command.")
    drawn = exemplars_of(root)
    folder = drawn.folder if drawn else None
    if folder is not None and not folder.is_dir():
        kind = "are a file of features, without images" if folder.is_file() else f"are missing: there is no folder {folder}"
        notes.append(f"The exemplars {kind}. So they are not shown.")
        folder = None
    evaluations = [each for each in all_kept(root, "evaluation") if isinstance(each.get("result"), dict)]
    found = None
    for each in all_kept(root, KIND):
        try:
            found = Worth.from_dict(each["result"])
        except (KeyError, ValueError):
            notes.append("A result of handful utility was written by another version and is left out.")
    name, planned = name or root.resolve().name, planned or len(rows)
    return Shown(root, name, recipe, provenance, rows, classes, planned, folder, evaluations, found, notes)


def _recipe(root: Path) -> dict[str, Any]:
    """recipe.yaml with its provenance."""
    if not root.exists():
        raise RequestError("OUT", root, "there is no such directory", "Check the path.")
    if not root.is_dir():
        raise RequestError("OUT", root, "this is a file", _A_RUN)
    file = root / "recipe.yaml"
    if not file.is_file():
        empty = next(root.iterdir(), None) is None
        raise RequestError("OUT", root, "the directory is empty" if empty else "it holds no run of handful", _A_RUN)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError) as error:
        raise RequestError("OUT", file, f"it can't be read ({error})".splitlines()[0], _A_RUN) from error
    if not isinstance(data, dict) or not isinstance(data.get("provenance"), dict) or not isinstance(data.get("model"), dict):
        raise RequestError("OUT", file, "it was not written by a run of handful", _A_RUN)
    return data


def _rows(root: Path) -> list[dict[str, Any]]:
    """The manifest, or what the finished cohorts' markers hold where the run is unfinished."""
    files = [root / "manifest.parquet"]
    if not files[0].is_file():
        files = sorted((root / ".handful" / "cohorts").glob("*.parquet"))
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            rows += pq.ParquetFile(file).read(use_threads=False).to_pylist()  # without threads: see runs/manifest.py
        except (OSError, pa.ArrowException) as error:
            raise RequestError(
                "OUT", file, "it is damaged", "Repeat the handful generate command, which repairs it."
            ) from error
    return rows


def _part(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def compared_with(first: Shown, others: Sequence[str | Path]) -> list[Shown]:
    """The other runs of a report: those named, then the baselines of the first one's evaluations that are still there."""
    shown = [gather(other) for other in others]
    there = {each.path.resolve() for each in (first, *shown)}
    for evaluation in reversed(first.evaluations):
        for name, path in _part(_part(evaluation, "asked"), "baselines").items():
            if Path(path).resolve() not in there and (Path(path) / "recipe.yaml").is_file():
                there.add(Path(path).resolve())
                try:
                    shown.append(gather(path, name))
                except RequestError as error:
                    first.notes.append(f"The baseline {name} is left out: {error}")
    return shown
