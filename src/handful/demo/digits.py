"""`handful demo`: the main job on the embedded default, end to end, with the numbers that say whether it was worth it.

Exemplars are drawn from the real training digits; 64 images of each class are generated without guidance, with
classifier-free guidance and with Chamfer guidance; each set is judged by the packaged judge, which no guide knows, on the
held-out digits; and a small classifier trained on each set alone is tested on them. Every set is an ordinary run directory
that `handful generate` could have written, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from handful import __version__
from handful.runs.contact_sheet import contact_sheet
from handful.errors import RequestError, RunError
from handful.data.exemplars import Exemplars
from handful.features.registry import load_extractor
from handful.generate import generate
from handful.guidance.cfg import CFGRequest
from handful.guidance.chamfer import ChamferRequest
from handful.guidance.energy import EnergyRequest
from handful.recipe.schema import ExemplarsRequest, GuidanceRequest, ModelRequest, Recipe, SamplerRequest, for_model
from handful.data.images import LabelledImages, encode_png, read_folder, write_atomically
from handful.judge.measure import Referee, Training, train_on
from handful.zoo.digits import CLASSES, load_digits_split

CFG_SCALES = (0.5, 1.0, 2.0)
EXEMPLARS = (2, 4, 8, 16, 32)  # k, a class
MARGIN = 0.75
HEADLINE, HEADLINE_K = "chamfer", 32  # what the picture shows
COLUMNS = (
    "precision", "recall", "density", "coverage", "f1", "frechet", "vendi", "judge_accuracy",
    "robust_precision", "robust_coverage", "copied", "utility", "seconds",
)

SIZE = (8, 8)
# without augmentation: what the classifier learns of the digits' variety is then in the set, or nowhere
TRAINING = Training(steps=200, augment=False)

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One line of the demo's table: a method at a scale, with k exemplars a class (0: none)."""

    method: str
    scale: float
    k: int
    guidance: tuple[GuidanceRequest, ...]

    @property
    def folder(self) -> str:
        parts = [self.method] + ([f"w{self.scale:g}"] if self.method == "cfg" else []) + ([f"k{self.k}"] if self.k else [])
        return "-".join(parts)


def entries() -> list[Entry]:
    """The methods that the demo compares, at the defaults that `handful generate` has."""
    chamfer = for_model(ChamferRequest(), "digits", SamplerRequest().steps)
    margin = for_model(ChamferRequest(margin=MARGIN), "digits", SamplerRequest().steps)
    energy = for_model(EnergyRequest(), "digits", SamplerRequest().steps)
    return [
        Entry("none", 0.0, 0, ()),
        *(Entry("cfg", scale, 0, (CFGRequest(scale=scale),)) for scale in CFG_SCALES),
        *(Entry("chamfer", chamfer.scale, k, (chamfer,)) for k in EXEMPLARS),
        Entry("chamfer-margin", margin.scale, HEADLINE_K, (margin,)),
        *(Entry("energy", energy.scale, k, (energy,)) for k in EXEMPLARS),
    ]


def demo(out: str | Path, *, seeds: int = 3, per_class: int = 64, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Runs the demo, or goes on with one that was interrupted.

    Args:
        out: A new or empty directory, or one with a demo of the same settings.
        seeds: How often everything is repeated, exemplars drawn anew each time.
        per_class: Images generated of each class, and guided together.
        say: Told, in a line, what is done.

    Returns:
        A row for each method, scale, k and seed, as in `results.json`.

    Raises:
        RequestError: If `out` holds something else, or the settings make no sense.
        RunError: If a set can't be generated.
    """
    if seeds < 1:
        raise RequestError("seeds", seeds, "the demo needs at least one", "Give 1 or more; 3 tell the spread.")
    if per_class < 8:
        raise RequestError("per_class", per_class, "too few to measure precision and coverage of",
                           "Give 8 or more; 64 is the default.")
    with _one_thread():
        return _demo(Path(out), seeds, per_class, say)


@contextmanager
def _one_thread() -> Iterator[None]:
    """8x8 images are so little work that a second thread costs more in waking up than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _demo(out: Path, seeds: int, per_class: int, say: Callable[[str], None]) -> list[Row]:
    rows = begin(out, {"handful": __version__, "demo": "digits", "per_class": per_class})
    exemplars, real = _real_images(out)
    referee = Referee(real, load_extractor("digits-judge"), classes=CLASSES)
    for seed in range(seeds):
        for entry in entries():
            known = (entry.method, entry.scale, entry.k, seed)
            if any((r["method"], r["scale"], r["k"], r["seed"]) == known for r in rows):
                continue
            rows.append(_row(entry, seed, per_class, out, exemplars, referee))
            write_atomically(out / "results.json", (json.dumps(rows, indent=1) + "\n").encode())
            say(
                "  ".join([f"seed {seed}  {entry.folder:14}", *(f"{c} {rows[-1][c]:.3f}" for c in COLUMNS[3:4] + COLUMNS[-2:])])
            )
    _picture(out, seed=0)
    return rows


def begin(out: Path, settings: Row) -> list[Row]:
    """Claims the directory; returns the rows that an earlier, interrupted demo left."""
    mark, results = out / "demo.json", out / "results.json"
    settings = {**settings, "machine": platform.machine()}
    if mark.is_file():
        if json.loads(mark.read_text()) != settings:
            raise RequestError("out", str(out), f"it holds a demo of other settings ({mark.read_text().strip()})",
                               "Choose another directory, or remove this one.")
        return json.loads(results.read_text()) if results.is_file() else []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("out", str(out), "it is not empty and holds no demo", "Choose a new or empty directory.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, (json.dumps(settings) + "\n").encode())
    return []


def _real_images(out: Path) -> tuple[Path, LabelledImages]:
    """Writes the real digits as any user has them, a folder per class: those to draw exemplars from, and those held out."""
    split = load_digits_split()
    parts = {"real-train": (split.train_images, split.train_labels), "real-held-out": (split.test_images, split.test_labels)}
    for name, (images, labels) in parts.items():
        folder, unfinished = out / name, out / f".{name}.tmp"
        if folder.exists():
            continue
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = unfinished / CLASSES[label] / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(image))
        unfinished.rename(folder)
    return out / "real-train", read_folder(out / "real-held-out", channels=1, size=SIZE)


def _row(entry: Entry, seed: int, per_class: int, out: Path, pool: Path, referee: Referee) -> Row:
    asked = ExemplarsRequest(path=str(pool.resolve()), k=entry.k, seed=seed) if entry.k else ExemplarsRequest()
    recipe = Recipe(
        model=ModelRequest(name="digits"), seed=seed, per_class=per_class, cohort=per_class, guidance=entry.guidance,
        exemplars=asked,
    )
    folder = out / f"seed-{seed}" / entry.folder
    summary = generate(recipe, folder)
    if summary.failures:
        raise RunError(summary.failures[0])
    made = read_folder(folder, channels=1, size=SIZE)
    drawn = Exemplars.from_folder(pool, channels=1, size=SIZE, k=entry.k or HEADLINE_K, seed=seed).images
    measured = referee.row(made, drawn, train_on(made, CLASSES, TRAINING, seed))
    del measured["utility_spread"]  # of one classifier there is none
    return {
        "method": entry.method, "scale": entry.scale, "k": entry.k, "seed": seed, **measured, "seconds": summary.seconds,
        "images": len(made),
    }


def _picture(out: Path, seed: int) -> None:
    """Exemplars above generated images, class by class."""
    made = read_folder(out / f"seed-{seed}" / f"{HEADLINE}-k{HEADLINE_K}", channels=1, size=SIZE)
    exemplars = Exemplars.from_folder(out / "real-train", channels=1, size=SIZE, k=HEADLINE_K, seed=seed)
    contact_sheet(exemplars.images, made.by_class(), out / "contact_sheet.png")


def means(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> list[Row]:
    """One row a method, scale and k: each number's mean over the seeds, and its spread as `NAME_spread`.

    The spread is the standard deviation between seeds; None for a single seed. What was not measured stays None.
    """
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["scale"], row["k"]), []).append(row)
    out = []
    for (method, scale, k), members in groups.items():
        mean: Row = {"method": method, "scale": scale, "k": k, "seeds": len(members)}
        for column in columns:
            values = [member[column] for member in members if member[column] is not None]
            mean[column] = fmean(values) if values else None
            mean[f"{column}_spread"] = stdev(values) if len(values) > 1 else None
        out.append(mean)
    return out
