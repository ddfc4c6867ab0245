"""What the demos share: methods compared by run directories, a row for each, and a loop that goes on where it was interrupted.

Every set is an ordinary run directory that `handful generate` could have written.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from handful import __version__
from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages, encode_png, read_folder, write_png
from handful.errors import RequestError, RunError
from handful.files.atomic import write_atomically
from handful.generate import generate
from handful.generate.invert import InvertRequest, invert, prepare
from handful.recipe.schema import recipe_from
from handful.report.tables import Table
from handful.runs.processes import Processes

Row = dict[str, Any]
FEWEST = 8  # images of a class: fewer are too few for precision and coverage
Say = Callable[[str], None]
SECONDS = "seconds.json"  # beside results.json: how long each set's sampling took, so that a resumed demo knows it


@dataclass(frozen=True)
class Entry:
    """One line of a demo's table.

    Attributes:
        k: Exemplars of each class; 0: none.
        scale: Of classifier-free guidance; 0 where the method's default acts.
        says: What the recipe says of it, as YAML has it.
        guided: Whether exemplars guide it; else one set serves every k.
        fitted: Embeddings are fitted to each class's exemplars first (CRDI), which then guide: a run directory for each class.
    """

    method: str
    k: int = 0
    scale: float = 0.0
    says: Mapping[str, Any] = field(default_factory=lambda: {"guidance": []})
    guided: bool = True
    fitted: bool = False

    @property
    def name(self) -> str:
        return self.method + (f" w={self.scale:g}" if self.scale else "") + (f" k={self.k}" if self.k else "")

    @property
    def folder(self) -> str:
        return (self if self.guided else replace(self, k=0, guided=True)).name.replace("=", "").replace(" ", "-")


Measure = Callable[[Entry, int, LabelledImages], Row]
"""(entry, seed, its images) -> what its row says beside method, k, scale, seed, seconds and images."""


@dataclass(frozen=True)
class Demo:
    """What is compared, and how.

    Attributes:
        recipe: What all recipes share, as YAML has it.
        measure: See `Measure`.
        shown: Columns that the line of progress shows.
        exemplars: Of the recipes: a folder to draw from anew for each seed, or packaged exemplars, which are always the same.
        shape: (c, h, w) of the images.
        ready: A function and its arguments that make `measure` in a process of its own: where there is another processor, it
            measures a set while this one makes the next. Empty: this process does all.
    """

    name: str
    entries: Sequence[Entry]
    recipe: Row
    measure: Measure
    shown: Sequence[str]
    exemplars: str
    shape: tuple[int, int, int]
    ready: tuple[Any, ...] = ()

    def run(self, out: Path, rows: list[Row], seeds: int, say: Say) -> list[Row]:
        """Makes and measures what `rows` lacks; `results.json` is written after every row."""
        there = {(row["method"], row["scale"], row["k"], row["seed"]) for row in rows}
        asked = [(entry, seed) for seed in range(seeds) for entry in self.entries]
        asked = [(entry, seed) for entry, seed in asked if (entry.method, entry.scale, entry.k, seed) not in there]
        taken = json.loads((out / SECONDS).read_text()) if (out / SECONDS).is_file() else {}

        def sets() -> Iterator[tuple[Entry, int, Path, tuple[int, int, int]]]:
            for entry, seed in asked:
                self._make(entry, seed, out, taken)
                yield entry, seed, _folder(out, entry, seed), self.shape

        beside = bool(self.ready) and (os.cpu_count() or 1) > 1
        with closing(Processes(1, *(self.ready or (_nothing,)), note=say, beside=beside)) as processes:
            for (entry, seed), found in zip(asked, processes.map(_measured, sets(), self.measure), strict=True):
                seconds = taken[f"{seed}/{entry.folder}"]  # a set that serves every k is made once
                named = {"method": entry.method, "scale": entry.scale, "k": entry.k, "seed": seed}
                rows.append({**named, **found, "seconds": seconds})
                write_atomically(out / "results.json", (json.dumps(rows, indent=1) + "\n").encode())
                told = (f"{column} {rows[-1][column]:.3f}" for column in self.shown)
                say("  ".join([f"seed {seed}  {entry.name:16}", *told]))
        return rows

    def made(self, out: Path, entry: Entry, seed: int = 0) -> LabelledImages:
        """The images of a set."""
        return _read(_folder(out, entry, seed), self.shape)

    def _make(self, entry: Entry, seed: int, out: Path, taken: dict[str, float]) -> None:
        """Makes what a set lacks, and adds the time to `taken`."""
        drawn: Row = {}
        if entry.k and entry.guided:
            folder = Path(self.exemplars).is_dir()
            path = str(Path(self.exemplars).resolve()) if folder else self.exemplars
            drawn = {"exemplars": {"path": path, "k": entry.k, **({"seed": seed} if folder else {})}}
        recipe = {**self.recipe, **drawn, **entry.says, "model": {"name": self.name}, "seed": seed}
        folder, key = _folder(out, entry, seed), f"{seed}/{entry.folder}"
        for asked, where, before in self._fitted(recipe, folder) if entry.fitted else [(recipe, folder, 0.0)]:
            summary = generate(recipe_from(asked), where)
            if summary.failures:
                raise RunError(summary.failures[0])
            taken[key] = taken.get(key, 0.0) + before + summary.seconds
            write_atomically(out / SECONDS, (json.dumps(taken, indent=1) + "\n").encode())

    def _fitted(self, recipe: Row, folder: Path) -> Iterator[tuple[Row, Path, float]]:
        """Fits embeddings to each class's exemplars: the recipe of its run then, where that goes, and the fit's seconds."""
        given = recipe["exemplars"]
        drawn = Exemplars.from_folder(
            given["path"], channels=self.shape[0], size=self.shape[1:], k=given["k"], seed=given["seed"]
        )
        for name, images in drawn.images.items():
            targets, file = folder / "targets" / name, folder / f"{name}.safetensors"
            targets.mkdir(parents=True, exist_ok=True)
            for place, image in enumerate(images):
                write_png(targets / f"{place:02d}.png", image)
            asked = InvertRequest(recipe["model"], condition=name, steps=recipe["sampler"]["steps"])
            done = invert(prepare(asked, targets, file))
            inversion = {"method": "inversion", "embeddings": str(file.absolute())}
            parts = {key: value for key, value in recipe.items() if key != "exemplars"}
            yield {**parts, "classes": [name], "guidance": [inversion]}, folder / name, done.seconds


def _measured(measure: Measure, task: tuple[Entry, int, Path, tuple[int, int, int]]) -> Row:
    entry, seed, folder, shape = task
    made = _read(folder, shape)
    return {**measure(entry, seed, made), "images": len(made)}


def _folder(out: Path, entry: Entry, seed: int) -> Path:
    return out / f"seed-{seed}" / entry.folder


def _read(folder: Path, shape: tuple[int, int, int]) -> LabelledImages:
    """The images of a run directory, or of one for each class."""
    runs = sorted(file.parent for file in folder.glob("*/recipe.yaml")) or [folder]
    parts = [read_folder(run, channels=shape[0], size=shape[1:]) for run in runs]
    labels, files = ([each for part in parts for each in getattr(part, name)] for name in ("labels", "files"))
    return LabelledImages(torch.cat([part.images for part in parts]), labels, files)


def _nothing(*arguments: Any) -> Row:
    return {}


def check_size(seeds: int, per_class: int) -> None:
    """Refuses a demo that shows nothing."""
    if seeds < 1:
        raise RequestError(
            "seeds", seeds, "the demo needs at least one seed", "Give 1 or more; 3 are enough to see the spread."
        )
    if per_class < FEWEST:
        raise RequestError(
            "per_class", per_class, "too few images to measure precision and coverage", f"Give {FEWEST} or more."
        )


def begin(out: Path, settings: Row) -> list[Row]:
    """Claims the directory; returns the rows that an earlier, interrupted demo left.

    Raises:
        RequestError: If it holds something else.
    """
    mark, results = out / "demo.json", out / "results.json"
    settings = {"handful": __version__, **settings, "machine": platform.machine()}
    if mark.is_file():
        if json.loads(mark.read_text()) != settings:
            problem = f"it holds a demo with other settings ({mark.read_text().strip()})"
            raise RequestError("out", str(out), problem, "Choose another directory, or remove this one.")
        return json.loads(results.read_text()) if results.is_file() else []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("out", str(out), "it is not empty, and holds no demo", "Choose a new or empty directory.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, (json.dumps(settings) + "\n").encode())
    return []


def write_real(folder: Path, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> None:
    """Writes real images (n, c, h, w) as any user has them, a folder per class; what is there stays."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}.tmp")
    names = [classes[int(label)] for label in labels]
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        file = unfinished / name / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(image))
    unfinished.rename(folder)


def means(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """One row for each method, scale and k: each number's mean over the seeds, and its spread as `NAME_spread`.

    The spread is the standard deviation between seeds; None for a single seed. What was not measured stays None.
    """
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["scale"], row["k"]), []).append(row)
    out = []
    for (method, scale, k), members in groups.items():
        mean: Row = {"method": method, "scale": scale, "k": k, "seeds": len(members)}
        for column in columns:
            values = [member[column] for member in members if member.get(column) is not None]
            mean[column] = fmean(values) if values else None
            mean[f"{column}_spread"] = stdev(values) if len(values) > 1 else None
        out.append(mean)
    return out


def table_of(title: str, means: Sequence[Row], columns: Mapping[str, str], notes: Sequence[str]) -> Table:
    """A line for each method: mean, and spread over the seeds; of the columns (name -> heading) that were measured."""
    shown = {column: heading for column, heading in columns.items() if any(mean[column] is not None for mean in means)}
    seeds = max(mean["seeds"] for mean in means)
    of = f"mean of {seeds} seed{'s' * (seeds > 1)}" + (" ± standard deviation" if seeds > 1 else "")
    table = Table(f"{title}; {of}", ["method", *shown.values()], notes=list(notes))
    for mean in means:
        cells = (_cell(mean[column], mean[f"{column}_spread"]) for column in shown)
        table.rows.append([Entry(mean["method"], mean["k"], mean["scale"]).name, *cells])
    return table


def _cell(value: float | None, spread: float | None) -> str:
    if value is None:
        return "-"
    digits = 3 if abs(value) < 100 else 1
    return f"{value:.{digits}f}" + ("" if spread is None else f" ±{spread:.{digits}f}")
