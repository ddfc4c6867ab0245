"""Somebody else's model, your handful: how many real images is a synthetic set worth?

    python benchmarks/foreign.py run --data uci --k 2 4 --draws 100 101 102 --out /tmp/foreign.jsonl     (it goes on there)
    python benchmarks/foreign.py table /tmp/foreign.jsonl --plot docs/foreign.png

The zoo's `mnist` draws, exemplars of another data set guide: UCI digits (of scikit-learn), or USPS (of ../shared). A small
classifier learns from the exemplars alone, and from a synthetic set beside them (a quarter of each batch exemplars), all
augmented alike, and is tested on real images that nothing else saw. Each draw has other exemplars, other noise and another
classifier. Methods were found on draws 0 to 9; tables are of draws 100 and up.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from handful.core.denoiser import Clamped
from handful.core.noise import noised
from handful.core.samplers import dpmpp_2m, start
from handful.data.augmentation import stroke_view
from handful.features.extractor import pixels
from handful.guidance import CFG, Auto, Chamfer, Energy, Guidance, Guided, Pull
from handful.judge.utility import LightClassifier, accuracy, train_classifier
from handful.metrics.copying import copied_share
from handful.models import load
from handful.zoo.mnist import at_mnist_size, load_uci_split

SHARED = Path(os.environ.get("HANDFUL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DIGITS, SAMPLER_STEPS, SHARE = 10, 18, 0.25
PIXELS, CHEAP = pixels(), Pull(jacobian="gaussian")


@dataclass(frozen=True)
class Data:
    """Real images at MNIST's size: by class a pool to draw exemplars from, and a test."""

    pool: list[Tensor]
    images: Tensor
    labels: Tensor

    def exemplars(self, k: int, draw: int) -> list[Tensor]:
        """The first k of a random order of each class: k = 4 holds those of k = 2."""
        order = torch.Generator().manual_seed(draw)
        return [images[torch.randperm(len(images), generator=order)[:k]] for images in self.pool]


@cache
def data(name: str) -> Data:
    if name == "uci":
        split = load_uci_split()
        pool, labels, *test = split
    else:
        (pool, labels), test = _usps("train"), _usps("test")
    return Data([pool[labels == label] for label in range(DIGITS)], *test)


def _usps(name: str) -> tuple[Tensor, Tensor]:
    rows = pq.read_table(SHARED / "data" / "usps" / f"{name}.parquet").to_pydict()
    arrays = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("L")) for image in rows["image"]]
    return at_mnist_size(torch.from_numpy(np.stack(arrays)).float()[:, None] / 127.5 - 1), torch.tensor(rows["label"])


Terms = Callable[[Tensor], list[Guidance]]


@dataclass(frozen=True)
class Way:
    """One way to make a set: its terms, given a class's exemplars; and `depth`, the share of the path that noised exemplars
    walk (1: from noise)."""

    terms: Terms = lambda exemplars: []
    depth: float = 1.0


def _by(term: Callable[..., Guidance], scale: float, **options: float) -> Way:
    return Way(lambda exemplars: [term(PIXELS, PIXELS(exemplars), scale, pull=CHEAP, **options)])


PLAIN, SDEDIT, AUTO, ENERGY = Way(), Way(depth=0.5), _by(Auto, 0.1), _by(Energy, 0.05)
METHODS: dict[str, tuple[Way, ...]] = {  # several: a mixture in equal shares
    "none": (PLAIN,),
    "cfg 1": (Way(lambda exemplars: [CFG(1.0)]),),
    "sdedit .5": (SDEDIT,),
    "chamfer .2": (_by(Chamfer, 0.2, coverage_weight=4.0),),
    "energy .05": (ENERGY,),
    "auto": (AUTO,),
    "sdedit + energy": (SDEDIT, ENERGY),
    "sdedit + auto": (SDEDIT, AUTO),
    "sdedit + auto + none": (SDEDIT, AUTO, PLAIN),
}


def made(ways: Sequence[Way], exemplars: Sequence[Tensor], per_class: int, seed: int) -> list[Tensor]:
    """A set, by class; each way's share is one cohort of each class."""
    denoiser, out = load_once(), []
    for label, real in enumerate(exemplars):
        parts, path = [], denoiser.levels.spacing(SAMPLER_STEPS)
        for place, way in enumerate(ways):
            n = per_class // len(ways) + (place < per_class % len(ways))
            noise = torch.randn(
                n, *denoiser.shape, generator=torch.Generator().manual_seed(100_003 * seed + 10 * place + label)
            )
            terms = way.terms(real)
            guided = Clamped(Guided(denoiser, terms) if terms else denoiser)
            walk = path.last(round(way.depth * SAMPLER_STEPS))
            x = start(noise, walk) if way.depth == 1 else noised(real[torch.arange(n) % len(real)], noise, walk[0])
            with torch.no_grad():
                parts.append(dpmpp_2m(guided, x, walk, denoiser.condition([label] * n)))
        out.append(torch.cat(parts))
    return out


load_once = cache(lambda: load("mnist"))


def utility(test: Data, sets: Sequence[Sequence[Tensor]], steps: int, seed: int) -> float:
    """Accuracy after training on a set; of two the second, the exemplars, makes `SHARE` of each batch."""
    images = torch.cat([x for one in sets for x in one])
    labels = torch.cat([torch.full((len(x),), label) for one in sets for label, x in enumerate(one)])
    weights = None
    if len(sets) == 2:
        first, second = (sum(map(len, one)) for one in sets)
        weights = torch.cat([torch.full((first,), (1 - SHARE) / first), torch.full((second,), SHARE / second)])
    words = {"steps": steps, "augment": stroke_view, "network": LightClassifier, "seed": seed, "weights": weights}
    return accuracy(train_classifier(images, labels, DIGITS, **words), test.images, test.labels)


def run(args: argparse.Namespace) -> None:
    done = {key(row) for row in rows_of(args.out)} if args.out.exists() else set()
    asked = [(name, k, draw, method) for draw in args.draws for name in args.data for k in args.k for method in args.methods]
    for name, k, draw, method in asked:
        row: dict = {"data": name, "k": k, "draw": draw, "method": method, "per_class": args.per_class, "steps": args.steps}
        if key(row) in done:
            continue
        test = data(name)
        exemplars = test.exemplars(k, draw)
        if method == "real":
            row["both"] = utility(test, [exemplars], args.steps, draw)
        else:
            begun = time.process_time()
            synthetic = made(METHODS[method], exemplars, args.per_class, draw)
            row["seconds"] = time.process_time() - begun
            row["both"] = utility(test, [synthetic, exemplars], args.steps, draw)
            real = {str(label): test.images[test.labels == label].flatten(1) for label in range(DIGITS)}
            flat = [{str(label): x.flatten(1) for label, x in enumerate(each)} for each in (synthetic, exemplars)]
            row["copied"] = copied_share(*flat, real)
            if args.alone:
                row["alone"] = utility(test, [synthetic], args.steps, draw)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("data", "k", "draw", "method", "per_class", "steps"))


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(args: argparse.Namespace) -> None:
    rows = rows_of(args.file)
    for name in dict.fromkeys(row["data"] for row in rows):
        of: dict[tuple[str, int], list[dict]] = {}
        for row in rows:
            if row["data"] == name:
                of.setdefault((row["method"], row["k"]), []).append(row)
        ks = sorted({k for method, k in of if method != "real"})
        curve = {k: fmean(row["both"] for row in group) for (method, k), group in sorted(of.items()) if method == "real"}
        draws = max(len(group) for group in of.values())
        print(f"\n{name}, {draws} draws, {rows[0]['per_class']} images of each class, {rows[0]['steps']} training steps\n")
        print("| | " + " | ".join(f"k = {k} | worth | copied" for k in ks) + " |\n|---" * 1 + "|---" * 3 * len(ks) + "|")
        for method in dict.fromkeys(method for method, _ in of):
            cells = []
            for k in ks:
                group = of.get((method, k), [])
                values = [row["both"] for row in group]
                spread = f" ±{stdev(values):.3f}" if len(values) > 1 else ""
                copied = [row["copied"] for row in group if "copied" in row]
                cells += (
                    [f"{fmean(values):.3f}{spread}", worth(curve, fmean(values)) if method != "real" else str(k)]
                    if values
                    else ["-"] * 2
                )
                cells.append(f"{fmean(copied):.3f}" if copied else "-")
            print(f"| {method} | " + " | ".join(cells) + " |")
        if args.plot:
            plot(
                args.plot,
                name,
                curve,
                {method: [(k, fmean(r["both"] for r in g)) for (m, k), g in of.items() if m == method] for method, _ in of},
            )


def worth(curve: dict[int, float], reached: float) -> str:
    """The number of real images of each class that alone reach an accuracy: between two of the curve, by log k."""
    ks = list(curve)
    for low, high in itertools.pairwise(ks):
        if curve[low] <= reached <= curve[high]:
            share = (reached - curve[low]) / (curve[high] - curve[low])
            return f"{low * (high / low) ** share:.1f}"
    return "-" if not ks else f"< {ks[0]}" if reached < curve[ks[0]] else f"> {ks[-1]}"


def plot(file: Path, name: str, curve: dict[int, float], methods: dict[str, list[tuple[int, float]]]) -> None:
    figure = Figure((7, 4.4), layout="constrained")
    axis = figure.add_subplot()
    axis.semilogx(list(curve), list(curve.values()), "k", linewidth=3, label="the real images alone")
    for method, points in methods.items():
        if method != "real":
            axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=f"and {method}")
    axis.set_xlabel("real images of each class")
    axis.set_ylabel(f"accuracy on {name}'s test")
    axis.set_xticks(list(curve), [str(k) for k in curve])
    axis.minorticks_off()
    axis.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(file.with_stem(f"{file.stem}-{name}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    asked = commands.add_parser("run")
    asked.add_argument("--data", nargs="+", default=["uci"], choices=["uci", "usps"])
    asked.add_argument("--k", nargs="+", type=int, default=[2, 4])
    asked.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    asked.add_argument("--methods", nargs="+", default=["real", *METHODS], choices=["real", *METHODS])
    asked.add_argument("--per-class", type=int, default=500)
    asked.add_argument("--steps", type=int, default=900, help="of each training")
    asked.add_argument("--alone", action="store_true", help="train on the synthetic set alone, too")
    asked.add_argument("--out", type=Path, required=True)
    asked.set_defaults(work=run)
    shown = commands.add_parser("table")
    shown.add_argument("file", type=Path)
    shown.add_argument("--plot", type=Path)
    shown.set_defaults(work=table)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
