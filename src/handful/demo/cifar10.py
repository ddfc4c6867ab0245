"""`handful demo --model cifar10`: the main job on photographs, with the provisional packaged model and no image of the data.

Exemplars are packaged as features alone, and so are the real test images that the judges compare with. 16 images of each
class are generated without guidance, with classifier-free guidance, with Chamfer and with energy guidance by the exemplars, and
with the last and CFG; every set is an ordinary run directory. Of the judges one (ResNet-56) is of the guide's family
(ResNet-20), the other (a transformer trained without labels) is not: what both see after the mild transforms counts, and the
pictures. With real images at hand they judge by those, and a small classifier trained on each set is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handful import __version__
from handful.judge.audit import TRANSFORMS
from handful.runs.contact_sheet import contact_sheet
from handful.demo.digits import Entry, Row, begin
from handful.errors import RequestError, RunError
from handful.judge.judge import Judge
from handful.features.registry import FeatureExtractor, load_extractor
from handful.judge.gains import AS_IS
from handful.generate import generate
from handful.guidance.cfg import CFGRequest
from handful.guidance.chamfer import ChamferRequest
from handful.guidance.energy import EnergyRequest
from handful.recipe.schema import ExemplarsRequest, ModelRequest, Recipe, SamplerRequest, for_model
from handful.data.parquet import read_labelled
from handful.data.images import LabelledImages, read_folder, write_atomically
from handful.metrics.copying import copied_share
from handful.data.shared_exemplars import ExemplarFeatures
from handful.report.tables import Table
from handful.judge.utility import downstream_accuracy
from handful.zoo import exemplars_path
from handful.zoo.cifar10 import CLASSES, JUDGES, SIZE, UNTOUCHED, RealFeatures, load_real_features

EXEMPLARS = "cifar10-exemplars"
CFG_SCALE = 2.5
STEPS = 18
EXEMPLARS_PER_CLASS = 32
HEADLINE = "energy+cfg"  # what the picture shows
OTHER = "simclr_"  # begins the columns of the judge that is not of the guide's family
REAL_PER_CLASS = 200  # of the user's own real images, at most
COLUMNS = {
    "precision": "precision", "coverage": "coverage", "frechet": "Frechet", "judge_accuracy": "accuracy",
    "robust_coverage": "rob.cov", "robust_f1": "rob.F1", "robust_frechet": "rob.Fre", f"{OTHER}robust_coverage": "SSL cov",
    f"{OTHER}robust_f1": "SSL F1", f"{OTHER}robust_frechet": "SSL Fre", "copied": "copied", "utility": "utility",
    "seconds": "seconds",
}


class FeaturesJudge(Judge):
    """A judge of generated images against real ones of which only the features are at hand.

    Args:
        real: What the judge saw of them.
        extractor: The same judge.
        k: As for `Judge`.

    Raises:
        RunError: The features are another judge's.
    """

    def __init__(self, real: RealFeatures, extractor: FeatureExtractor, *, k: int = 5) -> None:
        if real.judge != extractor.digest:
            raise RunError(f"the packaged real features are not {extractor.name}'s: make them again (tools/package_cifar10.py)")
        views = {AS_IS: UNTOUCHED, **{name: name for name in TRANSFORMS if name in real.features}}
        features = {view: real.features[name].numpy() for view, name in views.items()}
        super().__init__(features, real.labels, extractor, k=k, ceiling=False, classes=CLASSES)


def entries(steps: int = STEPS) -> list[Entry]:
    """What is compared, at the defaults that `handful generate` has; `steps` are the sampler's."""
    cfg = CFGRequest(scale=CFG_SCALE)
    chamfer, energy = (for_model(term, "cifar10", steps) for term in (ChamferRequest(), EnergyRequest()))
    sparse = CFGRequest(scale=2 * CFG_SCALE, every=2)  # half of the second evaluations, at twice the scale
    return [
        Entry("none", 0.0, 0, ()),
        Entry("cfg", CFG_SCALE, 0, (cfg,)),
        Entry("chamfer", chamfer.scale, EXEMPLARS_PER_CLASS, (chamfer,)),
        Entry("energy", energy.scale, EXEMPLARS_PER_CLASS, (energy,)),
        Entry(HEADLINE, energy.scale, EXEMPLARS_PER_CLASS, (energy, sparse)),
    ]


def demo(
    out: str | Path, *, seeds: int = 1, per_class: int = 16, steps: int = STEPS, real: str | Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Runs the demo, or goes on with one that was interrupted.

    Args:
        out: A new or empty directory, or one with a demo of the same settings.
        seeds: How often everything is repeated, with other noise; the exemplars are the packaged ones each time.
        per_class: Images generated of each class, and guided together.
        steps: Of the sampler.
        real: The user's own copy of CIFAR-10's test images, a folder per class or a parquet file; None: the packaged features.
        say: Told, in a line, what is done.

    Returns:
        A row for each method and seed, as in `results.json`; `utility` is None without real images.

    Raises:
        RequestError: If `out` holds something else, or the settings make no sense.
        RunError: If a set can't be generated.
    """
    if seeds < 1:
        raise RequestError("seeds", seeds, "the demo needs at least one", "Give 1 or more; 3 tell the spread.")
    if per_class < 8:
        raise RequestError("per_class", per_class, "too few to measure precision and coverage of", "Give 8 or more.")
    given = None if real is None else _read_real(real)
    settings = {"handful": __version__, "demo": "cifar10", "per_class": per_class, "steps": steps,
                "real": None if real is None else str(Path(real).absolute())}
    rows = begin(Path(out), settings)
    judges = {
        prefix: FeaturesJudge(load_real_features(role), extractor) if given is None
        else Judge(given.images, given.labels, extractor, ceiling=False, classes=CLASSES)
        for prefix, role in zip(("", OTHER), JUDGES, strict=True)
        for extractor in (load_extractor(f"cifar10-{role}"),)
    }
    exemplars = ExemplarFeatures.load(exemplars_path(EXEMPLARS)).seen_by(judges[""].extractor, 1)
    for seed in range(seeds):
        for entry in entries(steps):
            known = (entry.method, entry.scale, entry.k, seed)
            if any((r["method"], r["scale"], r["k"], r["seed"]) == known for r in rows):
                continue
            rows.append(_row(entry, seed, per_class, steps, Path(out), exemplars, judges, given))
            write_atomically(Path(out) / "results.json", (json.dumps(rows, indent=1) + "\n").encode())
            told = ("coverage", "robust_coverage", f"{OTHER}robust_coverage", "seconds")
            say("  ".join([f"seed {seed}  {entry.folder:16}", *(f"{column} {rows[-1][column]:.3f}" for column in told)]))
    made = read_folder(Path(out) / "seed-0" / entries(steps)[-1].folder, channels=3, size=SIZE)
    contact_sheet({}, made.by_class(), Path(out) / "contact_sheet.png", columns=16, rows=1)
    return rows


def _read_real(source: str | Path) -> LabelledImages:
    images, classes = read_labelled(source, channels=3, size=SIZE, limit=REAL_PER_CLASS, field="--real")
    if set(classes) != set(CLASSES):
        raise RequestError("--real", Path(source), f"its classes are {', '.join(classes[:12])}",
                           f"Give CIFAR-10's test images: a folder for each of {', '.join(CLASSES)}.")
    return images


def _row(
    entry: Entry, seed: int, per_class: int, steps: int, out: Path, exemplars: Mapping[str, torch.Tensor],
    judges: Mapping[str, Judge], real: LabelledImages | None,
) -> Row:
    asked = ExemplarsRequest(path=EXEMPLARS, k=entry.k) if entry.k else ExemplarsRequest()
    recipe = Recipe(
        model=ModelRequest(name="cifar10"), seed=seed, per_class=per_class, cohort=per_class, guidance=entry.guidance,
        exemplars=asked, sampler=SamplerRequest(steps=steps),
    )
    folder = out / f"seed-{seed}" / entry.folder
    summary = generate(recipe, folder)
    if summary.failures:
        raise RunError(summary.failures[0])
    made = read_folder(folder, channels=3, size=SIZE)
    seen = {prefix: judge.see(made.images, made.labels) for prefix, judge in judges.items()}
    found = {
        prefix + name: value for prefix, judge in judges.items() for name, value in judge.judged(seen[prefix]).row().items()
    }
    first = judges[""]
    copied = copied_share(_by_class(seen[""].features[AS_IS], made.labels), exemplars, _by_class(first.real, first.labels))
    utility = None
    if real is not None:
        train, test = (torch.tensor([CLASSES.index(name) for name in images.labels]) for images in (made, real))
        utility = downstream_accuracy(made.images, train, real.images, test, steps=400, flip=True, seed=seed)
    return {
        "method": entry.method, "scale": entry.scale, "k": entry.k, "seed": seed, **found,
        "copied": copied, "utility": utility, "seconds": summary.seconds, "images": len(made),
    }


def _by_class(features: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.asarray(features)[[label == name for label in labels]] for name in CLASSES}


def table(means: Sequence[Mapping[str, Any]]) -> Table:
    """A line a method: mean, and spread over the seeds; of what was measured."""
    shown = {column: title for column, title in COLUMNS.items() if means[0][column] is not None}
    seeds = max(mean["seeds"] for mean in means)
    made = Table(f"CIFAR-10, provisional model; mean of {seeds} seed{'s' * (seeds > 1)}"
                 + (" ± standard deviation" if seeds > 1 else ""), ["method", *shown.values()])
    for mean in means:
        name = mean["method"] + (f" w={mean['scale']:g}" if mean["method"] == "cfg" else "")
        name += f" k={mean['k']}" if mean["k"] else ""
        cells = []
        for column in shown:
            spread = mean[f"{column}_spread"]
            cells.append(f"{mean[column]:.3f}" + ("" if spread is None else f" ±{spread:.3f}"))
        made.rows.append([name, *cells])
    made.notes = [
        "Judge: cifar10-judge, of the guide's family; SSL: cifar10-simclr, which learned without labels, after the transforms.",
        "accuracy: share that the judge names as asked.  rob.: mean after mild transforms of real and generated images alike.",
        "copied: share nearer to an exemplar, in the judge's features, than 99 % of real test images are.",
        "Believe what both judges see after the transforms, and the pictures.",
        *(
            ["utility: accuracy on the real images of a small classifier trained on the set alone."]
            if "utility" in shown
            else []
        ),
    ]
    return made
