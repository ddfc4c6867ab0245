"""The papers' tables on the packaged CIFAR-10 model, three seeds, with two judges: what stands in RESULTS.md and the README.

    python benchmarks/tables.py chamfer  --out DIR      (a) Chamfer guidance over k against CFG, limited interval and c-VSG
    python benchmarks/tables.py useful   --out DIR      (b) a classifier trained on 5,000 synthetic images, on shifted sets too
    python benchmarks/tables.py steps    --out DIR      (c) off-the-shelf classifier guidance at 10, 18 and 36 steps
    python benchmarks/tables.py together --out DIR      (d) synthetic images and the exemplars; needs the sets of (b)

Judges: `cifar10-judge` (ResNet-56, of the guide's family) and `cifar10-simclr` (a transformer trained without labels), against
the first 100 real test images of each class; robust: mean over the audit's transforms. downstream: accuracy on the 10,000 real
test images of a classifier trained on the set alone. Start the same command twice to use two cores: every set is made and
measured by one process, and an interrupted benchmark goes on. Whichever finishes last prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import cifar10
import torch
from shifts import SHIFTS, shifted
from table_sets import GUIDE, Setting, claimed, exemplars_of, make, write_pool
from torch import Tensor

from handful.data.augmentation import random_view
from handful.data.images import LabelledImages, write_atomically
from handful.data.parquet import read_labelled
from handful.features.registry import load_extractor
from handful.judge.measure import Referee
from handful.judge.utility import accuracy, train_classifier
from handful.zoo.cifar10 import CLASSES, SIZE

DATA = cifar10.SHARED / "data" / "cifar10"
JUDGES = {"": "cifar10-judge", "simclr_": "cifar10-simclr"}  # prefix of the columns -> judge
USEFUL_STEPS = 10  # of the sampler, for the large sets of (b) and (d)
WIDTH = 16  # channels of the downstream classifiers' first stage
JUDGED = 100  # images a class of a large set that the judges see
REAL = 100  # real test images a class that judges compare with
TRAINING_IMAGES = None  # of each class, that real sets are drawn from; None: all

# Written out, so that a later default of the package does not change what a table compares.
PIXELS = {"method": "chamfer", "features": "pixels", "scale": 0.2, "jacobian": "gaussian", "every": 1, "margin": 0.5}
ENERGY = {
    "method": "energy",
    "features": GUIDE,
    "softplus": 3.0,
    "jacobian": "gaussian",
    "scale": 0.3,
    "every": 3,
    "smoothing": {"shift": 2},
}
HALF = {**ENERGY, "reduce": 2}
SMOOTH = {"method": "classifier", "classifier": GUIDE, "softplus": 3.0, "every": 3}
SPARSE_CFG = {"method": "cfg", "scale": 5.0, "every": 2}


Terms = tuple[dict[str, Any], ...]


def cfg(scale: float, **timing: Any) -> dict[str, Any]:
    return {"method": "cfg", "scale": scale, **timing}


def guided(method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "features": GUIDE, **options}


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        setting: How its set is made; None: real images.
        kind: How a classifier is trained on it, in tables of classifiers.
    """

    setting: Setting | None
    kind: str = ""


Columns = Mapping[str, str]
QUALITY = {
    "precision": "P",
    "coverage": "C",
    "f1": "F1",
    "frechet": "Frechet",
    "vendi": "Vendi",
    "robust_precision": "rob. P",
    "robust_coverage": "rob. C",
    "robust_f1": "rob. F1",
    "robust_frechet": "rob. Frechet",
    "simclr_robust_coverage": "SimCLR C",
    "simclr_robust_f1": "SimCLR F1",
    "simclr_robust_frechet": "SimCLR Frechet",
    "copied": "copied",
    "downstream": "downstream",
    "operations": "operations",
    "seconds": "seconds",
}
ACCURACIES = {"as is": "in distribution", **{name: name for name in SHIFTS}, "shifted": "mean shifted"}


class Bench:
    """What all tables share: real images, referees, sets.

    Args:
        out: Where everything goes.
        steps: Of each downstream classifier.
        trainings: Classifiers trained on each set, in tables of classifiers.
    """

    def __init__(self, out: Path, steps: int, trainings: int = 1) -> None:
        self.out, self.steps, self.trainings = out, steps, trainings
        out.mkdir(parents=True, exist_ok=True)
        self.pool = write_pool(out)

    @cached_property
    def test(self) -> LabelledImages:
        return read_labelled(DATA / "test.parquet", channels=3, size=SIZE)[0]

    @cached_property
    def views(self) -> dict[str, Tensor]:
        return shifted(self.test.images)

    @cached_property
    def referees(self) -> dict[str, Referee]:
        real = read_labelled(DATA / "test.parquet", channels=3, size=SIZE, limit=REAL)[0]
        return {prefix: Referee(real, load_extractor(name), classes=CLASSES) for prefix, name in JUDGES.items()}

    def set_of(self, name: str, setting: Setting, per_class: int, seed: int) -> tuple[LabelledImages, dict[str, float]]:
        return make(setting, self.pool, self.out / f"sets-{per_class}" / file_name(name) / f"seed-{seed}", per_class, seed)

    def quality(self, made: LabelledImages, setting: Setting, seed: int) -> dict[str, Any]:
        """What both judges find of the first images of each class, and copies."""
        near = exemplars_of(self.pool, setting.k or 32, seed)
        by_class = {name: images[:JUDGED] for name, images in made.by_class().items()}
        labels = [name for name, images in by_class.items() for _ in images]
        files = [Path(f"{label}/{place}") for place, label in enumerate(labels)]
        made = LabelledImages(torch.cat(list(by_class.values())), labels, files)
        found: dict[str, Any] = {}
        for prefix, referee in self.referees.items():
            row = referee.row(made, None if prefix else near)  # copies are counted in pixels: by one is enough
            found |= {prefix + column: value for column, value in row.items()}
        return found

    def train(self, images: Tensor, labels: Tensor, seed: int, strong: bool = False) -> torch.nn.Module:
        """A downstream classifier; `strong` augments as one would who has few images."""
        augment = partial(random_view, area=0.4, gray=0.1) if strong else True
        return train_classifier(
            images, labels, len(CLASSES), steps=self.steps, augment=augment, flip=not strong, width=WIDTH, seed=seed
        )

    def accuracies(self, images: Tensor, labels: Tensor, seed: int, strong: bool = False) -> dict[str, list[float]]:
        """On the real test images, as they are and shifted, of `self.trainings` classifiers trained on these."""
        wanted = numbers(self.test)
        found: dict[str, list[float]] = {name: [] for name in (*self.views, "shifted")}
        for training in range(self.trainings):
            network = self.train(images, labels, seed + 100 * training, strong)
            for name, view in self.views.items():
                found[name].append(accuracy(network, view, wanted))
            found["shifted"].append(fmean(found[name][-1] for name in SHIFTS))
        return found


def numbers(images: LabelledImages) -> Tensor:
    return torch.tensor([CLASSES.index(name) for name in images.labels])


# --- the tables -------------------------------------------------------------------------------------------------------------


def chamfer_rows() -> dict[str, Row]:
    settings = {
        "none": Setting(),
        **{f"CFG {scale:g}": Setting((cfg(scale),)) for scale in (1.0, 2.5, 4.0)},
        "CFG 2.5, interval": Setting((cfg(2.5, noise=[0.2, 2.0]),)),
        "c-VSG, k = 32": Setting((guided("cvsg"),), 32),
        "Chamfer in ResNet-20, k = 32": Setting((guided("chamfer"),), 32),
        **{f"Chamfer, k = {k}": Setting((PIXELS,), k) for k in (2, 32)},
        "energy, k = 32": Setting((ENERGY,), 32),
        **{f"Chamfer + energy, k = {k}": Setting((PIXELS, ENERGY), k) for k in (2, 4, 8, 16, 32)},
        "Chamfer + energy/2, k = 32": Setting((PIXELS, HALF), 32),
    }
    return {name: Row(setting) for name, setting in settings.items()}


def chamfer_measure(bench: Bench, name: str, row: Row, seed: int, per_class: int) -> dict[str, Any]:
    assert row.setting is not None
    made, cost = bench.set_of(name, row.setting, per_class, seed)
    network = bench.train(made.images, numbers(made), seed)
    downstream = accuracy(network, bench.test.images, numbers(bench.test))
    return {**bench.quality(made, row.setting, seed), **cost, "downstream": downstream}


def useful_rows() -> dict[str, Row]:
    guidance: dict[str, Terms] = {
        "none": (),
        "CFG 2.5": (cfg(2.5),),
        "energy": (ENERGY,),
        "Chamfer": (PIXELS,),
        "Chamfer + energy": (PIXELS, ENERGY),
        "Chamfer + energy/2": (PIXELS, HALF),
        "Chamfer + energy + CFG/2": (PIXELS, ENERGY, SPARSE_CFG),
        "Chamfer + energy/2 + CFG/2": (PIXELS, HALF, SPARSE_CFG),
    }
    by_exemplars = {name for name, terms in guidance.items() if PIXELS in terms or ENERGY in terms}
    settings = {name: Setting(terms, 32 * (name in by_exemplars), USEFUL_STEPS) for name, terms in guidance.items()}
    return {"real": Row(None), **{name: Row(setting) for name, setting in settings.items()}}


def useful_measure(bench: Bench, name: str, row: Row, seed: int, per_class: int) -> dict[str, Any]:
    """A classifier of the set alone; "real": of as many real training images, others for each seed."""
    if row.setting is None:
        made, extra = real_training_images(per_class, seed), {}
    else:
        made, cost = bench.set_of(name, row.setting, per_class, seed)
        extra = {**bench.quality(made, row.setting, seed), **cost}
    return {**bench.accuracies(made.images, numbers(made), seed), **extra}


def real_training_images(per_class: int, seed: int) -> LabelledImages:
    every = read_labelled(DATA / "train.parquet", channels=3, size=SIZE, limit=TRAINING_IMAGES)[0]
    draw, labels = torch.Generator().manual_seed(seed), numbers(every)
    kept = torch.cat(
        [
            (of_class := torch.nonzero(labels == label)[:, 0])[torch.randperm(len(of_class), generator=draw)[:per_class]]
            for label in range(len(CLASSES))
        ]
    )
    return LabelledImages(every.images[kept], [every.labels[i] for i in kept], [every.files[i] for i in kept])


def steps_rows() -> dict[str, Row]:
    return {
        f"{name}, {steps} steps": Row(Setting(guidance, 0, steps))
        for steps in (10, 18, 36)
        for name, guidance in (("none", ()), ("classifier", (SMOOTH,)))
    }


def together_rows() -> dict[str, Row]:
    known = useful_rows()
    return {
        "32 exemplars": Row(None, "plain"),
        "32 exemplars, strong augmentation": Row(None, "strong"),
        **{f"32 exemplars + {name}": Row(row.setting, name) for name, row in known.items() if row.setting is not None},
    }


def together_measure(bench: Bench, name: str, row: Row, seed: int, per_class: int) -> dict[str, Any]:
    """A classifier of the exemplars, alone or with a set of table (b): then every fourth image of a batch is an exemplar."""
    near = exemplars_of(bench.pool, 32, seed)
    images, labels = torch.cat(list(near.values())), torch.arange(len(CLASSES)).repeat_interleave(32)
    if row.setting is not None:
        made, _ = bench.set_of(row.kind, row.setting, per_class, seed)
        times = max(1, round(len(made.images) / 3 / len(images)))
        images, labels = (
            torch.cat([new, old.repeat(times, *[1] * (old.dim() - 1))])
            for new, old in ((made.images, images), (numbers(made), labels))
        )
    return bench.accuracies(images, labels, seed, strong=row.kind != "plain")


@dataclass(frozen=True)
class Table:
    """What a table compares, and how."""

    rows: Callable[[], dict[str, Row]]
    measure: Callable[[Bench, str, Row, int, int], dict[str, Any]]
    columns: Columns
    per_class: int
    steps: int  # of the downstream classifiers


TABLES = {
    "chamfer": Table(chamfer_rows, chamfer_measure, QUALITY, 40, 300),
    "useful": Table(useful_rows, useful_measure, ACCURACIES | QUALITY, 500, 1000),
    "steps": Table(steps_rows, chamfer_measure, QUALITY, 30, 300),
    "together": Table(together_rows, together_measure, ACCURACIES, 500, 1000),
}


# --- running and printing ---------------------------------------------------------------------------------------------------


def file_name(row: str) -> str:
    return re.sub(r"[^\w.+]+", "-", row)


def tasks(table: Table, seeds: Sequence[int], only: Sequence[str]) -> Iterator[tuple[str, Row, int]]:
    for seed in seeds:
        for name, row in table.rows().items():
            if not only or name in only:
                yield name, row, seed


def record(out: Path, table: str, per_class: int, name: str, seed: int) -> Path:
    return out / "rows" / f"{table}-{per_class}" / f"{file_name(name)}-seed-{seed}.json"


def markdown(out: Path, name: str, per_class: int, seeds: Sequence[int]) -> str:
    """The table of what is measured: mean ± standard deviation over the seeds, and the trainings of each."""
    shown = dict(TABLES[name].columns)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in TABLES[name].rows():
        files = [file for seed in seeds if (file := record(out, name, per_class, row, seed)).is_file()]
        if files:
            found[row] = [json.loads(file.read_text()) for file in files]
    shown = {column: title for column, title in shown.items() if any(column in each[0] for each in found.values())}
    lines = ["| | " + " | ".join(shown.values()) + " | seeds |", "|---" * (len(shown) + 2) + "|"]
    for row, each in found.items():
        cells = [cell([one.get(column) for one in each], column) for column in shown]
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {len(each)} |")
    return "\n".join(lines)


def cell(values: Sequence[float | list[float] | None], column: str) -> str:
    known = [one for value in values if value is not None for one in (value if isinstance(value, list) else [value])]
    if not known:
        return ""
    digits = 0 if column == "seconds" else 2 if "frechet" in column or column in ("operations", "vendi") else 3
    mean = f"{fmean(known):.{digits}f}"
    return mean if len(known) == 1 or column == "operations" else f"{mean} ± {stdev(known):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--out", type=Path, required=True)
    add("--seeds", default="0,1,2", help="with commas (default: %(default)s)")
    add("--only", default="", help="names of rows, with semicolons (default: all)")
    add("--trainings", type=int, default=1, help="classifiers trained on each set of (b) and (d) (default: %(default)s)")
    add("--per-class", type=int, help="images of each class in a set (default: the table's own)")
    add("--print", action="store_true", help="print what is measured and make nothing")
    given = parser.parse_args()
    table, seeds = TABLES[given.table], [int(seed) for seed in given.seeds.split(",")]
    per_class, only = given.per_class or table.per_class, given.only.split(";") if given.only else []
    if unknown := set(only) - set(table.rows()):
        parser.error(f"--only: there is no row {sorted(unknown)[0]!r}; the rows are {'; '.join(table.rows())}")
    bench = Bench(given.out, table.steps, given.trainings)
    for name, row, seed in () if given.print else tasks(table, seeds, only):
        file = record(given.out, given.table, per_class, name, seed)
        with claimed(given.out / ".locks" / f"{file.parent.name} {file.stem}") as mine:
            if mine and not file.is_file():
                found = table.measure(bench, name, row, seed, per_class)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
                shown = [each for each in ("robust_f1", "simclr_robust_f1", "downstream", "as is") if each in found]
                told = ", ".join(f"{each} {cell([found[each]], each)}" for each in shown)
                print(f"{name}, seed {seed}: {told}", flush=True)
    if given.print or all(
        record(given.out, given.table, per_class, name, seed).is_file() for name, _, seed in tasks(table, seeds, ())
    ):
        print(markdown(given.out, given.table, per_class, seeds))


if __name__ == "__main__":
    main()
