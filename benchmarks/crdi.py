"""Few-shot generation with CRDI: ten images of a kind that the model never saw, against SDEdit and Chamfer guidance.

    python benchmarks/crdi.py --out DIR                             both cases, about 8 minutes on one free thread
    python benchmarks/crdi.py --out DIR --case digits --levers      more settings of the digits, about 7 minutes

digits    the packaged model; ten held-out digits, one of each class, written with a pen of 2 x 2 pixels. A neighbouring kind:
          the judge still reads 94 % of them, and their Frechet distance to the digits as they are is 14.3 (halves of
          them: 2.4). Of inverted digits it reads 10 %, so it would measure nothing; and of the least typical digits as
          they are 99 % lie inside the source, so there would be nothing to learn.
cifar10   ../shared/models/cifar10-unet; ten test photographs of cars at night (dark, and blue). resnet56 judges.

Other real images of the kind are parted in two: one half is the reference, the other stands for "as good as real". Models get
the null class. What starts from targets starts from those noised to step hi of 25 and walks down by DDIM; SDEdit is
that without guidance. Finished rows are kept in DIR/results.json, so an interrupted benchmark goes on. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from crdi_cases import CASES, Case
from torch import Tensor

from handful.core.denoiser import Clamped, Denoiser
from handful.core.samplers import ddim, start
from handful.data.images import write_atomically
from handful.features.registry import pixels
from handful.guidance import Guided
from handful.guidance.base import Guidance, Pull
from handful.guidance.chamfer import Chamfer
from handful.guidance.inversion import (
    Embeddings,
    Exchange,
    Inversion,
    no_condition,
    noised_start,
    normal,
    own_targets,
    reconstruct,
    score_factor,
    target_keys,
)
from handful.guidance.inversion_fit import Method, fit
from handful.judge.audit import TRANSFORMS
from handful.metrics import frechet, prdc, vendi
from handful.metrics.few_shot import copied, intra_distance, mc_ssim, nearest_targets, reconstruction
from handful.metrics.perceptual import feature_distance
from handful.recipe.plan import ImageNoise, image_seed
from handful.report.few_shot_figure import few_shot_figure_png

STEPS = 25
SPARED = 5  # the clean steps that guidance leaves alone, as in the paper


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        hi: The step to start at, counted from the clean end, from noised targets; None: from pure noise.
        eta: Segments; 0: no embeddings.
        lo, s: Of the embeddings.
        a: Perturbation.
        exchange: As for `Inversion`.
        strength: Of the embeddings when sampling; 1 is that of the fit.
        chamfer: Scale of Chamfer guidance with the targets as exemplars; 0: none.
        method: Of the fit.
        clamped: Whether the model's estimates are, to [-1, 1].
    """

    hi: int | None = 20
    eta: int = 0
    lo: int = SPARED
    s: float = 2.0
    a: float = 0.05
    exchange: Exchange = "step"
    strength: float = 1.0
    chamfer: float = 0.0
    method: Method = "difference"
    clamped: bool = False


# --- generating ---


def model(case: Case, way: Way) -> Denoiser:
    return Clamped(case.denoiser) if way.clamped else case.denoiser


class Fits:
    """Embeddings of a case's targets, each kind fitted once."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed, self.made = case, seed, {}

    def __call__(self, way: Way) -> Embeddings:
        key = (way.eta, way.lo, way.hi, way.s, way.method, way.clamped)
        if key not in self.made:
            assert way.hi is not None
            self.made[key] = fit(
                model(self.case, way),
                self.case.targets,
                segments=way.eta,
                interval=(way.lo, way.hi),
                scale=way.s,
                seed=self.seed,
                method=way.method,
            )
        return self.made[key]


@torch.no_grad()
def generated(case: Case, way: Way, fits: Fits, seed: int) -> tuple[Tensor, list[int]]:
    """Images (n, c, h, w), and the place of the target that each starts from."""
    levels = case.denoiser.levels.spacing(STEPS)
    seeds = [image_seed(seed, case.name, index) for index in range(case.n)]
    own, made, compared = own_targets(seeds, len(case.targets)), [], pixels()
    for first in range(0, case.n, case.cohort):
        part = slice(first, first + case.cohort)
        terms: list[Guidance] = []
        if way.eta:
            terms.append(
                Inversion(fits(way), seeds[part], way.strength, exchange=way.exchange, own=own[part], perturbation=way.a)
            )
        if way.chamfer:
            terms.append(
                Chamfer(
                    compared,
                    compared(case.targets),
                    way.chamfer,
                    coverage_weight=4.0,
                    margin=0.5,
                    pull=Pull(jacobian="gaussian"),
                )
            )
        noise = ImageNoise(seeds[part], case.denoiser.shape)()
        if way.hi is None:
            x, path = start(noise, levels), levels
        else:
            x, path = noised_start(case.targets, own[part], noise, levels, way.hi)
        made.append(ddim(Guided(model(case, way), terms), x, path, no_condition(case.denoiser, len(x))))
    return torch.cat(made).clamp(-1, 1), own


def reconstructed(case: Case, way: Way, fits: Fits, seed: int) -> Tensor:
    """Each target from its own noised self with its own embeddings and no perturbation; of SDEdit, without any."""
    if way.eta:
        told = fits(way)
    else:
        assert way.hi is not None
        told = Embeddings(
            torch.zeros_like(case.targets)[:, None], case.targets, case.denoiser.levels.spacing(STEPS), (0, way.hi)
        )
    return reconstruct(model(case, way), told, seed).clamp(-1, 1)


# --- measuring ---


class Referee:
    """Measures images of a case."""

    def __init__(self, case: Case) -> None:
        self.case, self.looks, self.rms = case, feature_distance(case.judge), feature_distance(pixels(), unit=False)
        self.views = {"": lambda images: images, **TRANSFORMS}
        self.reference = {name: self.features(view(case.reference)) for name, view in self.views.items()}

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        return torch.cat([self.case.judge(part) for part in images.split(256)]).numpy()

    def row(self, images: Tensor) -> dict[str, float]:
        case, found = self.case, {name: self.features(view(images)) for name, view in self.views.items()}
        distances = {name: frechet(self.reference[name], found[name]) for name in self.views}
        near = prdc(self.reference[""], found[""])
        side = images[0].numel() ** 0.5
        spread = self.rms.pairs(images)
        return {
            "frechet": distances.pop(""),
            "robust_frechet": float(np.mean(list(distances.values()))),
            "precision": near.precision,
            "coverage": near.coverage,
            "intra": intra_distance(images, case.targets, self.looks).mean,
            "mc_ssim": mc_ssim(case.reference[:100], images).mean,
            "vendi": vendi(found[""] - self.reference[""].mean(0)),
            "spread": float(spread.sum() / (len(images) * (len(images) - 1)) / side),
            "copied": copied(images, case.targets, torch.cat([case.reference, case.others]), self.rms),
            "nearest": float(np.median(nearest_targets(images, case.targets, self.rms)[0]) / side),
        }

    def reconstruction(self, way: Way, fits: Fits) -> dict[str, float]:
        found = [
            reconstruction(self.case.targets, reconstructed(self.case, way, fits, seed), self.looks)
            for seed in range(self.case.noises)
        ]
        return {
            "mse": float(np.mean([f.mse.mean for f in found])),
            "ssim": float(np.mean([f.ssim.mean for f in found])),
            "perceptual": float(np.mean([f.perceptual.mean for f in found if f.perceptual])),
        }


def real_rows(case: Case) -> dict[str, Tensor]:
    copies = case.targets.repeat(-(-case.n // len(case.targets)), 1, 1, 1)[: case.n]
    return {
        "other real images of the kind": case.others,
        "real images without the look": case.source,
        "copies of the ten targets": copies,
    }


def ways(case: str, levers: bool) -> dict[str, Way]:
    """The ways to compare; with the levers, what changes one thing of eta = 8, lo = 5, hi = 20, s = 2, a = 0.05."""
    few, digits_ = Way(eta=8), case == "digits"
    found = {
        "plain model": Way(None),
        **{f"SDEdit, hi {hi}": Way(hi) for hi in ((4, 8, 12, 16, 20, 24) if digits_ else (8, 12, 16, 20))},
        **{f"CRDI, eta {eta}": Way(eta=eta) for eta in (1, 3, 8, 15)},
        "CRDI, eta 8, a 0.2": replace(few, a=0.2),
        "Chamfer": Way(None, chamfer=0.2),
        "SDEdit + Chamfer": Way(chamfer=0.2),
        "CRDI + Chamfer": replace(few, chamfer=0.2),
    }
    if not levers:
        return found
    tops = (12, 16, 24) if digits_ else (12, 16)
    more = {f"eta {min(8, hi - few.lo)}, hi {hi}": replace(few, hi=hi, eta=min(8, hi - few.lo)) for hi in tops}
    more |= {"eta 8, lo 0": replace(few, lo=0), "eta 8, clamped": replace(few, clamped=True)}
    if digits_:
        more |= {f"eta 8, s {s:g}": replace(few, s=s) for s in (1.0, 4.0)}
        more |= {"eta 8, strength 0.5": replace(few, strength=0.5), "eta 15, adam": Way(eta=15, method="adam")}
        more |= {"eta 8, exchange image": replace(few, exchange="image"), "eta 8, exchange none": replace(few, exchange="none")}
        own = Way(24, eta=8, exchange="none")  # found on the first seed
        more |= {"eta 8, lo 0, hi 24, exchange none": replace(own, lo=0), "eta 8, hi 24, exchange none": own}
        found["CRDI + Chamfer, hi 24, exchange none, strength 0.5"] = replace(own, strength=0.5, chamfer=0.2)
        found["SDEdit + Chamfer, hi 24"] = Way(24, chamfer=0.2)
    clamped = {"SDEdit, hi 20, clamped": Way(clamped=True)}
    return found | {f"CRDI, {name}": way for name, way in more.items()} | clamped


# --- the saving of the closed form ---


def losses(case: Case, seed: int, way: Way, draws: int) -> Callable[[Embeddings], float]:
    """The loss of embeddings, over fixed noises at every guided step: written out as in the paper, lambda = 1."""
    levels, x0 = case.denoiser.levels.spacing(STEPS), case.targets
    condition, kept = no_condition(case.denoiser, len(x0)), []
    assert way.hi is not None
    with torch.no_grad():
        for step in range(way.lo, way.hi):
            t = levels[STEPS - 1 - step]
            for draw in range(draws):
                eps = normal(target_keys(10_000 + seed, len(x0)), tuple(x0.shape[1:]), step, draw, 9)
                x_t = t.alpha * x0 + t.sigma * eps
                kept.append((step, eps, x_t, case.denoiser(x_t, t, condition)))

    def loss(told: Embeddings) -> float:
        spread = float((told.G - told.G.mean(0)).square().mean())
        return float(np.mean([_one(told, *one) for one in kept])) + spread

    def _one(told: Embeddings, step: int, eps: Tensor, x_t: Tensor, x0_hat: Tensor) -> float:
        t, s = levels[STEPS - 1 - step], levels[STEPS - step]
        guided = x0_hat + score_factor(t) * told.scale * told.G[:, told.segment_of(step)]
        down = s.alpha * guided + s.sigma * (x_t - t.alpha * guided) / t.sigma
        return float((guided - x0).square().mean() + (down - s.alpha * x0 - s.sigma * eps).square().mean())

    return loss


def saving(case: Case, seed: int, eta: int, quick: bool) -> dict[str, dict[str, float]]:
    """Loss by epochs of both ways to fit; an epoch costs the same evaluations of the model in both."""
    way = Way(eta=eta)
    loss = losses(case, seed, way, 2)
    adam = (120,) if case.name != "digits" else (20, 40, 120)
    asked = {"adam": (20,) if quick else adam, "difference": (1, 2, 3, 5, 8, 10, 20)[: 3 if quick else None]}
    if case.name != "digits":
        asked["difference"] = asked["difference"][:6]
    told = {
        method: {str(e): loss(fit(case.denoiser, case.targets, segments=eta, epochs=e, method=method, seed=seed)) for e in each}
        for method, each in asked.items()
    }
    begun = fit(case.denoiser, case.targets, segments=eta, epochs=1, seed=seed)
    told["none"] = {"0": loss(replace(begun, G=torch.zeros_like(begun.G)))}
    return told


# --- running ---


def run(case: Case, seed: int, results: Path, quick: bool, levers: bool, figure: Path) -> None:
    rows: dict[str, dict] = json.loads(results.read_text()) if results.is_file() else {}
    referee, fits = Referee(case), Fits(case, seed)
    sets: dict[str, tuple[Tensor, list[int]]] = {}

    def keep(name: str, row: dict) -> None:
        rows[f"{case.name} | {seed} | {name}"] = row
        write_atomically(results, json.dumps(rows, indent=1).encode())
        print(
            f"{case.name} {seed} {name:32}",
            " ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float)),
            flush=True,
        )

    def missing(name: str) -> bool:
        return f"{case.name} | {seed} | {name}" not in rows

    for name, images in real_rows(case).items():
        if missing(name):
            keep(name, referee.row(images))
    for name, way in ways(case.name, levers).items():
        if missing(name):
            if way.eta:
                fits(way)
            begun = time.perf_counter()
            sets[name] = generated(case, way, fits, seed)
            seconds = time.perf_counter() - begun
            row = {"seconds": seconds, **referee.row(sets[name][0])}
            if way.hi and way == replace(way, chamfer=0.0, a=0.05, exchange="step", strength=1.0):
                row |= referee.reconstruction(way, fits)
            keep(name, {**row, "way": asdict(way)})
    for eta in (1, 15) if case.name == "digits" else (8,) if levers else ():
        if missing(f"loss, eta {eta}"):
            keep(f"loss, eta {eta}", saving(case, seed, eta, quick))
    if seed == 0 and not figure.exists():
        write_atomically(figure, picture(case, referee, fits, sets))


def picture(case: Case, referee: Referee, fits: Fits, sets: dict[str, tuple[Tensor, list[int]]]) -> bytes:
    """Targets, reconstructions, and images that start from each target by three ways; the map is of CRDI's."""
    shown: dict[int | str, Tensor] = {eta: reconstructed(case, Way(eta=eta), fits, 0) for eta in (1, 3, 8, 15)}
    crdi = "CRDI, eta 8"
    for label, name in {"SDEdit": "SDEdit, hi 20", "Chamfer": "Chamfer", "both": "CRDI + Chamfer"}.items():
        images, own = sets.get(name) or generated(case, ways(case.name, False)[name], fits, 0)
        shown[label] = images[_from_each(own, 0)] if name != "Chamfer" else images[: len(case.targets)]
    images, own = sets.get(crdi) or generated(case, ways(case.name, False)[crdi], fits, 0)
    rows = torch.cat([images[_from_each(own, place)] for place in range(2)])
    features = {"source": case.source, "held-out targets": case.reference, "generated": images, "targets": case.targets}
    return few_shot_figure_png(
        case.targets,
        rows,
        reconstructions=shown,
        rows=2,
        features={name: referee.features(part) for name, part in features.items()},
    )


def _from_each(own: Sequence[int], place: int) -> list[int]:
    """For each of ten targets the image (the place-th) that starts from it."""
    return [[i for i, target in enumerate(own) if target == wanted][place] for wanted in range(10)]


COLUMNS = {
    "frechet": "Frechet",
    "robust_frechet": "robust Frechet",
    "precision": "precision",
    "coverage": "coverage",
    "intra": "Intra-distance",
    "mc_ssim": "MC-SSIM",
    "vendi": "Vendi",
    "spread": "pixel spread",
    "copied": "copied",
    "nearest": "nearest",
    "mse": "rec. MSE",
    "ssim": "rec. SSIM",
    "seconds": "seconds",
}
ONE_PLACE = ("frechet", "robust_frechet", "vendi", "seconds")


def by_name(rows: dict[str, dict], case: str, having: str) -> dict[str, list[dict]]:
    """A case's rows with a column, one a seed, by name."""
    found: dict[str, list[dict]] = {}
    for key, row in rows.items():
        of, _, name = key.split(" | ")
        if of == case and having in row:
            found.setdefault(name, []).append(row)
    return found


def mean(each: list[dict], column: str) -> float:
    return float(np.mean([row[column] for row in each]))


def table(rows: dict[str, dict], case: str) -> str:
    """Means over seeds; of the Frechet distance also the standard deviation."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, each in by_name(rows, case, "frechet").items():
        cells = [f"{mean(each, c):.{1 if c in ONE_PLACE else 3}f}" if c in each[0] else "" for c in COLUMNS]
        if len(each) > 1:
            cells[0] += f" ± {np.std([row['frechet'] for row in each], ddof=1):.1f}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def equal_reconstruction(rows: dict[str, dict], case: str) -> str:
    """CRDI / SDEdit at the hi, interpolated seed by seed, at which SDEdit's mean squared error is that of CRDI."""
    columns = ("frechet", "robust_frechet", "precision", "coverage", "intra", "mc_ssim", "vendi", "spread", "copied")
    lines = ["| | rec. MSE | " + " | ".join(COLUMNS[c] for c in columns) + " |", "|---|" + "---|" * (len(columns) + 1)]
    found = by_name(rows, case, "mse")
    plain = [each for name, each in found.items() if name.startswith("SDEdit") and "clamped" not in name]
    for name, each in found.items():
        if name.startswith("SDEdit") or any(len(other) < len(each) for other in plain):
            continue
        cells = []
        for column in columns:
            curves = [sorted((other[seed]["mse"], other[seed][column]) for other in plain) for seed in range(len(each))]
            beside = np.mean(
                [
                    np.interp(row["mse"], [at for at, _ in curve], [value for _, value in curve])
                    for row, curve in zip(each, curves, strict=True)
                ]
            )
            places = 1 if column in ONE_PLACE else 2
            cells.append(f"{mean(each, column):.{places}f} / {beside:.{places}f}")
        lines.append(f"| {name} | {mean(each, 'mse'):.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def saving_table(rows: dict[str, dict], case: str) -> str:
    lines = ["| | epochs: loss |", "|---|---|"]
    for name, each in by_name(rows, case, "adam").items():
        for method in each[0]:
            told = {epochs: float(np.mean([row[method][epochs] for row in each])) for epochs in each[0][method]}
            lines.append(f"| {name}, {method} | " + ", ".join(f"{e}: {value:.4f}" for e, value in told.items()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, help="default: both")
    parser.add_argument("--seeds", type=int, help="draws of targets; default: 3 of digits, 1 of CIFAR-10")
    parser.add_argument("--levers", action="store_true", help="more settings, one thing changed in each")
    parser.add_argument("--quick", action="store_true", help="few images: does it run?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    for name in [args.case] if args.case else CASES:
        for seed in range(args.seeds or {"digits": 3, "cifar10": 1}[name]):
            run(CASES[name](seed, args.quick), seed, results, args.quick, args.levers, args.out / f"{name}.png")
    rows = json.loads(results.read_text())
    for name in CASES:
        if any(key.startswith(name) for key in rows):
            print(f"\n## {name}\n\n{table(rows, name)}\n\n{equal_reconstruction(rows, name)}\n\n{saving_table(rows, name)}")


if __name__ == "__main__":
    main()
