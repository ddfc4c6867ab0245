"""The main job on CIFAR-10: Chamfer and energy guidance against no guidance and classifier-free guidance.

    python benchmarks/cifar10.py --out /tmp/cifar --per-class 32                      the wide table (many settings)
    python benchmarks/cifar10.py --out /tmp/cifar-40 --per-class 32 --cohort 32 --sampler-steps 40 --only levers   (cheaper?)
    python benchmarks/cifar10.py --out /tmp/cifar-200 --per-class 200 --only cfg-2.5,pixels-margin+cfg-k32 --utility

resnet20 guides, resnet56 judges (both off the shelf, trained on the clean original: ../shared/models), real test images are the
reference. Exemplars are drawn from the real training images. Every set is made by `handful.generate`, so an interrupted
benchmark goes on. Prints a Markdown table: precision, coverage and F1 are means over classes, as they are and as means
over three mild transforms of real and generated images alike; `acc` is the share that the judge names as asked.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

import handful
from handful.data.images import read_folder, write_atomically
from handful.features.registry import load_extractor
from handful.judge.audit import TRANSFORMS
from handful.judge.utility import accuracy, train_classifier
from handful.metrics import frechet, prdc
from handful.metrics.copying import copied_share
from handful.recipe.schema import recipe_from

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("HANDFUL_SHARED", HERE.parents[1] / "shared"))
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
GUIDE, JUDGE = f"{HERE / 'cifar_networks.py'}:resnet20", f"{HERE / 'cifar_networks.py'}:resnet56"


def methods() -> dict[str, tuple[int, list[dict]]]:
    """Name -> (k, guidance)."""

    def by_exemplars(method: str, **options: object) -> list[dict]:
        return [{"method": method, "features": GUIDE, "every": 2, "hold": False, **options}]

    pixels = {"method": "chamfer", "features": "pixels", "scale": 0.2, "jacobian": "gaussian", "every": 1}
    margin = {**pixels, "margin": 0.5}
    sparse_cfg = {"method": "cfg", "scale": 5.0, "every": 2}  # half of the second evaluations, at twice the scale
    return {
        "none": (0, []),
        **{f"cfg-{w:g}": (0, [{"method": "cfg", "scale": w}]) for w in (1.0, 2.5, 4.0)},
        "cfg-5-every2": (0, [sparse_cfg]),
        **{f"chamfer-k{k}": (k, by_exemplars("chamfer", coverage_weight=1.0)) for k in (2, 4, 32)},
        "chamfer-k32-gaussian": (32, by_exemplars("chamfer", coverage_weight=1.0, scale=0.2, jacobian="gaussian", every=1)),
        "chamfer-k32-image": (32, by_exemplars("chamfer", coverage_weight=1.0, normalize="rms-image")),
        **{f"energy-k{k}": (k, by_exemplars("energy")) for k in (2, 4, 32)},
        "energy-k32-0.8": (32, by_exemplars("energy", scale=0.8)),
        **levers(),
        "pixels-k32": (32, [pixels]),
        "pixels-margin-k32": (32, [margin]),
        **{f"pixels-margin+cfg-k{k}": (k, [margin, sparse_cfg]) for k in (4, 32)},
    }


def levers() -> dict[str, tuple[int, list[dict]]]:
    """What makes guidance cheaper, one thing at a time: Chamfer at k = 32 in resnet20's features, weights 1 : 1.

    A name says jacobian, every, scale, "hold" (the direction is used again between guided steps), "half" (at half size).
    """
    rows: list[tuple[str, int, float, bool, int]] = [
        ("exact", 2, 0.4, False, 1),
        ("exact", 2, 0.4, True, 1),
        ("exact", 4, 0.4, False, 1),
        ("exact", 4, 0.8, False, 1),
        ("exact", 4, 0.2, True, 1),
        ("exact", 4, 0.4, True, 1),
        ("exact", 4, 0.4, True, 2),
        ("exact", 5, 0.4, True, 1),
        ("exact", 6, 0.4, True, 1),
        ("exact", 10, 0.4, True, 1),
        ("exact", 10, 0.4, True, 2),
        ("gaussian", 1, 0.2, False, 1),
        ("gaussian", 4, 0.8, False, 1),
        ("gaussian", 4, 0.2, True, 1),
        ("gaussian", 4, 0.4, True, 1),
        ("gaussian", 10, 0.4, True, 1),
    ]
    return {
        f"lever-{jacobian}-every{every}-{scale:g}" + "-hold" * hold + "-half" * (reduce == 2): (
            32,
            [
                {
                    "method": "chamfer",
                    "features": GUIDE,
                    "coverage_weight": 1.0,
                    "scale": scale,
                    "jacobian": jacobian,
                    "every": every,
                    "hold": hold,
                    "reduce": reduce,
                }
            ],
        )
        for jacobian, every, scale, hold, reduce in rows
    }


def write_images(split: str, folder: Path, per_class: int) -> None:
    """The first `per_class` images of each class as PNG, a folder per class."""
    if folder.exists():
        return
    table = pq.ParquetFile(SHARED / "data/cifar10" / f"{split}.parquet").read(use_threads=False)
    counts = [0] * 10
    unfinished = folder.with_suffix(".tmp")
    for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
        if counts[label] < per_class:
            file = unfinished / CLASSES[label] / f"{counts[label]:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.open(io.BytesIO(image["bytes"])).convert("RGB").save(file)
            counts[label] += 1
    unfinished.rename(folder)


class Referee:
    """Judges sets by one classifier against the same real images, class by class."""

    def __init__(self, real: Path) -> None:
        self.judge = load_extractor(JUDGE)
        self.real = read_folder(real, channels=3, size=(32, 32)).by_class()
        self.views = {"plain": lambda images: images, **TRANSFORMS}
        self.features = {view: self._features(self.real, view) for view in self.views}

    @torch.no_grad()
    def _features(self, images: dict[str, torch.Tensor], view: str) -> dict[str, np.ndarray]:
        return {name: self.judge(self.views[view](part)).numpy() for name, part in images.items()}

    @torch.no_grad()
    def row(self, folder: Path) -> dict[str, float]:
        made = read_folder(folder, channels=3, size=(32, 32)).by_class()
        row: dict[str, float] = {}
        seen: dict[str, list[float]] = {"precision": [], "coverage": [], "acc": []}
        for view, transform in self.views.items():
            features, real = self._features(made, view), self.features[view]
            each = [prdc(real[name], features[name]) for name in CLASSES]
            found = {
                "precision": float(np.mean([e.precision for e in each])),
                "coverage": float(np.mean([e.coverage for e in each])),
                "acc": float(
                    np.mean(
                        [
                            float((self.judge.logits(transform(made[name])).argmax(1) == label).double().mean())
                            for label, name in enumerate(CLASSES)
                        ]
                    )
                ),
            }
            if view == "plain":
                row |= found | {"frechet": frechet(*(np.concatenate(list(f.values())) for f in (real, features)))}
                row["f1"] = harmonic(row["precision"], row["coverage"])
            else:
                for name, value in found.items():
                    seen[name].append(value)
        row |= {f"robust_{name}": float(np.mean(values)) for name, values in seen.items()}
        row["robust_f1"] = harmonic(row["robust_precision"], row["robust_coverage"])
        return row

    def utility(self, folder: Path, test: Path, steps: int, seeds: int) -> list[float]:
        made, real = (read_folder(f, channels=3, size=(32, 32)) for f in (folder, test))
        labels = [torch.tensor([CLASSES.index(name) for name in images.labels]) for images in (made, real)]
        networks = [train_classifier(made.images, labels[0], 10, steps=steps, flip=True, seed=seed) for seed in range(seeds)]
        return [accuracy(network, real.images, labels[1]) for network in networks]


def harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=32)
    parser.add_argument("--cohort", type=int, default=40, help="images guided together")
    parser.add_argument("--only", help="names of methods, with commas; default: all")
    parser.add_argument("--real", type=int, default=100, help="real test images a class to judge against")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler-steps", type=int, default=18, help="of the sampler")
    parser.add_argument("--utility", action="store_true", help="train a classifier on each set, test it on 10,000 real images")
    parser.add_argument("--steps", type=int, default=800, help="of that classifier")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pool, real, test = args.out / "exemplars", args.out / f"real-{args.real}", args.out / "test"
    write_images("train", pool, 64)
    write_images("test", real, args.real)
    if args.utility:
        write_images("test", test, 1000)
    results = args.out / "results.json"
    rows: dict[str, dict] = json.loads(results.read_text()) if results.is_file() else {}
    referee = Referee(real)
    wanted = methods()
    asked_for = args.only.split(",") if args.only else list(wanted)
    if asked_for == ["levers"]:
        asked_for = ["none", "cfg-2.5", *levers()]
    for name in asked_for:
        k, guidance = wanted[name]
        key = f"{name} seed {args.seed}"
        asked = {
            "model": {"name": str(SHARED / "models/cifar10-unet"), "null_class": 10, "classes": CLASSES},
            "exemplars": {"path": str(pool.resolve()), "k": k, "seed": args.seed} if k else {},
            "sampler": {"steps": args.sampler_steps},
            "guidance": guidance,
            "per_class": args.per_class,
            "cohort": args.cohort,
            "seed": args.seed,
        }
        folder = args.out / f"seed-{args.seed}" / name
        if key not in rows:
            summary = handful.generate(recipe_from(asked), folder)
            rows[key] = {"seconds": summary.seconds, "images": summary.images, **referee.row(folder)}
            exemplars = handful.Exemplars.from_folder(pool, channels=3, size=(32, 32), k=k or 32, seed=args.seed).images
            made = read_folder(folder, channels=3, size=(32, 32)).by_class()
            flat = [{n: images.flatten(1).numpy() for n, images in part.items()} for part in (made, exemplars, referee.real)]
            rows[key]["copied"] = copied_share(flat[0], flat[1], flat[2])
        if args.utility and "utility" not in rows[key]:
            rows[key]["utility"] = referee.utility(folder, test, args.steps, seeds=2)
        write_atomically(results, json.dumps(rows, indent=1).encode())
        print(line(key, rows[key]), flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(
        "| | precision | coverage | F1 | acc | Frechet | robust P | robust C | robust F1 | robust acc "
        "| copied | utility | seconds |"
    )
    print("|---|" + "---|" * 12)
    for key, row in rows.items():
        print(line(key, row))


def line(key: str, row: dict) -> str:
    columns = (
        "precision",
        "coverage",
        "f1",
        "acc",
        "frechet",
        "robust_precision",
        "robust_coverage",
        "robust_f1",
        "robust_acc",
        "copied",
    )
    cells = [f"{row[column]:.3f}" for column in columns]
    utility = row.get("utility")
    cells += [f"{np.mean(utility):.3f} ± {np.ptp(utility) / 2:.3f}" if utility else "", f"{row['seconds']:.0f}"]
    return f"| {key} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
