"""Somebody else's model, your handful: how many real images is a synthetic set worth?

    python benchmarks/foreign.py run --data uci --k 2 4 --draws 100 101 102 --out /tmp/foreign.jsonl     (it goes on there)
    python benchmarks/foreign.py table /tmp/foreign.jsonl --plot docs/foreign.png    (foreign-uci.png)

The zoo's `mnist` draws, exemplars of another data set guide: UCI digits (of scikit-learn), or USPS (of ../shared). A small
classifier learns from the exemplars alone, and from a synthetic set beside them (half of each batch exemplars, more from
k = 7 on), all
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
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from handful.core.denoiser import Clamped
from handful.core.noise import noised
from handful.core.samplers import dpmpp_2m, start
from handful.data.augmentation import stroke_view
from handful.features.extractor import pixels
from handful.generate.invert import scaled_interval
from handful.guidance import CFG, CVSG, Auto, Chamfer, Energy, Guidance, Guided, Pull, Timing
from handful.guidance.apg import adaptive_projected
from handful.guidance.inversion import Inversion
from handful.guidance.inversion_fit import fit
from handful.judge.utility import LightClassifier, SmallClassifier, accuracy, train_classifier
from handful.metrics.copying import copied_share
from handful.models import load
from handful.zoo.mnist import at_mnist_size, load_uci_split

SHARED = Path(os.environ.get("HANDFUL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DIGITS, SIDE, SAMPLER_STEPS = 10, 28, 18
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
    """One way to make a set.

    Attributes:
        terms: Given a class's exemplars.
        depth: The share of the path that noised exemplars walk (1: from noise).
        others: The exemplars that are noised are those of all other classes.
        fit: Whether each exemplar's embeddings are fitted first (CRDI), and guide.
        steps: Of the whole path.
    """

    terms: Terms = lambda exemplars: []
    depth: float = 1.0
    others: bool = False
    fit: bool = False
    steps: int = SAMPLER_STEPS


def _by(term: Callable[..., Guidance], scale: float, pull: Pull = CHEAP, **options: float) -> Way:
    return Way(lambda exemplars: [term(PIXELS, PIXELS(exemplars), scale, pull=pull, **options)])


PLAIN, SDEDIT, AUTO, ENERGY = Way(), Way(depth=0.5), _by(Auto, 0.1), _by(Energy, 0.05)
OTHERS = Way(depth=0.67, others=True)
WITH_CFG = tuple(replace(way, terms=lambda exemplars: [CFG(1.0)], steps=14) for way in (SDEDIT, OTHERS))
INSIDE = Timing(noise=(0.2, 2.0))  # as in recipes/digits-cfg-interval.yaml
UNGUIDED: dict[str, tuple[Way, ...]] = {  # by exemplars: one set serves every k
    "none": (PLAIN,),
    "cfg 1": (Way(lambda exemplars: [CFG(1.0)]),),
    "cfg 1, sigma / alpha .2 to 2": (Way(lambda exemplars: [CFG(1.0, INSIDE)]),),
    "apg 1": (Way(lambda exemplars: [adaptive_projected(1.0)]),),
}
METHODS: dict[str, tuple[Way, ...]] = {  # several: a mixture in equal shares
    **UNGUIDED,
    "sdedit .33": (Way(depth=0.33),),
    "sdedit .5": (SDEDIT,),
    "sdedit .67": (Way(depth=0.67),),
    "others .67": (OTHERS,),
    "crdi": (Way(depth=0.8, fit=True),),
    "chamfer .2": (_by(Chamfer, 0.2, coverage_weight=4.0),),
    "chamfer .2, margin 1": (_by(Chamfer, 0.2, coverage_weight=4.0, margin=1.0),),
    "cvsg .05": (_by(CVSG, 0.05),),
    "energy .05": (ENERGY,),
    "auto": (AUTO,),
    "sdedit .5, energy .05": (Way(ENERGY.terms, depth=0.5),),
    "sdedit + auto": (SDEDIT, AUTO),
    "sdedit + others": (SDEDIT, OTHERS),
    "others + auto": (OTHERS, AUTO),
    "sdedit + others, cfg 1, 14 steps": WITH_CFG,
    "plain + sdedit + others, cfg 1, 14 steps": (PLAIN, *WITH_CFG),
}


@torch.no_grad()
def _walked(way: Way, exemplars: Sequence[Tensor], label: int, noise: Tensor, seed: int) -> Tensor:
    """A cohort of a class by one way, from noise (n, c, h, w) of unit variance."""
    denoiser, real, n = load_once(), exemplars[label], len(noise)
    terms, path = way.terms(real), denoiser.levels.spacing(way.steps)
    walk, order = path.last(round(way.depth * way.steps)), torch.arange(n)
    if way.others:
        real = torch.cat([images for other, images in enumerate(exemplars) if other != label])
        order = torch.cat([torch.randperm(len(real), generator=torch.Generator().manual_seed(seed)) for _ in range(n)])[:n]
    if way.fit:
        low, high = scaled_interval(SAMPLER_STEPS)
        embeddings = fit(
            Clamped(denoiser),
            real,
            path,
            segments=high - low,
            interval=(low, high),
            condition=denoiser.condition([label] * len(real)),
        )
        walk = path.last(high)
        terms = [Inversion(embeddings, list(range(seed, seed + n)), own=(order % len(real)).tolist())]
    # embeddings shift the clamped estimate, as at their fit
    guided = Guided(Clamped(denoiser), terms) if way.fit else Clamped(Guided(denoiser, terms) if terms else denoiser)
    x = start(noise, walk) if way.depth == 1 else noised(real[order % len(real)], noise, walk[0])
    return dpmpp_2m(guided, x, walk, denoiser.condition([label] * n))


def made(ways: Sequence[Way], exemplars: Sequence[Tensor], per_class: int, seed: int) -> list[Tensor]:
    """A set, by class; each way's share is one cohort of each class."""
    out = []
    for label in range(len(exemplars)):
        parts = []
        for place, way in enumerate(ways):
            n, key = per_class // len(ways) + (place < per_class % len(ways)), 100_003 * seed + 10 * place + label
            noise = torch.randn(n, *load_once().shape, generator=torch.Generator().manual_seed(key))
            parts.append(_walked(way, exemplars, label, noise, key))
        out.append(torch.cat(parts))
    return out


@cache
def unguided(method: str, per_class: int, seed: int) -> tuple[list[Tensor], float]:
    return timed(METHODS[method], [torch.empty(0)] * DIGITS, per_class, seed)


def timed(ways: Sequence[Way], exemplars: Sequence[Tensor], per_class: int, seed: int) -> tuple[list[Tensor], float]:
    """A set, and the seconds of processor time that it took."""
    begun = time.process_time()
    found = made(ways, exemplars, per_class, seed)
    return found, time.process_time() - begun


load_once = cache(lambda: load("mnist"))


def linear(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * SIDE * SIDE, classes))


NETWORKS = {"light": LightClassifier, "small": partial(SmallClassifier, width=16, groups=4), "linear": linear}


def share_of(k: int) -> float:
    """The exemplars' part of each batch: half, and more from k = 7 on, where they teach more than synthetic images."""
    return max(0.5, k / (k + 6))


def utility(test: Data, sets: Sequence[Sequence[Tensor]], args: argparse.Namespace, seed: int) -> list[float]:
    """Accuracy after training on a set, `args.trainings` times; of two sets the second holds the exemplars (`share_of`)."""
    images = torch.cat([x for one in sets for x in one])
    labels = torch.cat([torch.full((len(x),), label) for one in sets for label, x in enumerate(one)])
    if args.classifier == "knn":  # the nearest of all, in pixels
        nearest = torch.cdist(test.images.flatten(1), images.flatten(1)).argmin(1)
        return [float((labels[nearest] == test.labels).double().mean())]
    weights = None
    if len(sets) == 2:
        share = share_of(len(sets[1][0]))
        first, second = (sum(map(len, one)) for one in sets)
        weights = torch.cat([torch.full((first,), (1 - share) / first), torch.full((second,), share / second)])
    view = False if args.plain_views else stroke_view
    words = {"steps": args.steps, "augment": view, "network": NETWORKS[args.classifier], "weights": weights}
    trained = (train_classifier(images, labels, DIGITS, **words, seed=1000 * t + seed) for t in range(args.trainings))
    return [accuracy(network, test.images, test.labels) for network in trained]


def run(args: argparse.Namespace) -> None:
    done = {key(row) for row in rows_of(args.out)} if args.out.exists() else set()
    how = {name: getattr(args, name) for name in ("per_class", "steps", "trainings", "classifier", "plain_views")}
    asked = [(name, k, draw, method) for draw in args.draws for k in args.k for name in args.data for method in args.methods]
    for name, k, draw, method in asked:
        row: dict = {"data": name, "k": k, "draw": draw, "method": method, **how}
        if key(row) in done:
            continue
        test = data(name)
        exemplars = test.exemplars(k, draw)
        if method == "real":
            row["both"] = utility(test, [exemplars], args, draw)
        else:
            if method in UNGUIDED:
                synthetic, row["seconds"] = unguided(method, args.per_class, draw)
            else:
                synthetic, row["seconds"] = timed(METHODS[method], exemplars, args.per_class, draw)
            row["both"] = utility(test, [synthetic, exemplars], args, draw)
            real = {str(label): test.images[test.labels == label].flatten(1) for label in range(DIGITS)}
            flat = [{str(label): x.flatten(1) for label, x in enumerate(each)} for each in (synthetic, exemplars)]
            row["copied"] = copied_share(*flat, real)
            if args.alone:
                row["alone"] = utility(test, [synthetic], args, draw)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def key(row: dict) -> tuple:
    names = ("data", "k", "draw", "method", "per_class", "steps", "trainings", "classifier", "plain_views")
    return tuple(row[name] for name in names)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def table(args: argparse.Namespace) -> None:
    """Prints a table for each data set and classifier: mean and spread of the draws (each the mean of its trainings)."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows_of(args.file):
        row["both"] = fmean(row["both"])
        groups.setdefault((row["data"], row["classifier"], row["plain_views"]), []).append(row)
    for (name, classifier, plain_views), rows in groups.items():
        of: dict[tuple[str, int], list[dict]] = {}
        for row in rows:
            of.setdefault((row["method"], row["k"]), []).append(row)
        ks = sorted({k for _, k in of})
        curve = {k: fmean(row["both"] for row in of["real", k]) for k in ks if ("real", k) in of}
        size = ", ".join(f"{rows[0][word]} {said}" for word, said in SIZES.items())
        print(f"\n{name}, {classifier}{', no augmentation' if plain_views else ''}: {size}\n")
        print(
            "| | "
            + " | ".join(f"k = {k} | worth" for k in ks)
            + " | copied | seconds |\n|---"
            + "|---" * (2 * len(ks) + 2)
            + "|"
        )
        for method in dict.fromkeys(method for method, _ in of):
            cells, mine = [], [row for (each, _), group in of.items() if each == method for row in group]
            for k in ks:
                values = [row["both"] for row in of.get((method, k), [])]
                spread = f" ±{stdev(values):.3f}" if len(values) > 1 else ""
                few = f" ({len(values)})" if len(values) < max(len(group) for group in of.values()) else ""
                cells += [f"{fmean(values):.3f}{spread}{few}", worth(curve, fmean(values))] if values else ["-", "-"]
            last = ["-", "-"]
            if method != "real":
                last = [f"{max(row['copied'] for row in mine):.3f}", f"{fmean(row['seconds'] for row in mine):.1f}"]
            print(f"| {method} | " + " | ".join(cells + last) + " |")
        if args.plot and classifier == "light" and not plain_views:
            whole = [method for method, k in of if k == ks[0]]
            lines = {method: [(k, fmean(r["both"] for r in g)) for (m, k), g in of.items() if m == method] for method in whole}
            plot(args.plot, name, curve, lines)


SIZES = {"per_class": "images of each class", "steps": "steps of a training", "trainings": "trainings"}


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
    asked.add_argument("--trainings", type=int, default=3)
    asked.add_argument("--classifier", choices=[*NETWORKS, "knn"], default="light")
    asked.add_argument("--plain-views", action="store_true", help="no augmentation")
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
