"""`handful demo --model cifar10`: the main job on photographs, with the provisional packaged model and no image of the data.

Exemplars are packaged as features alone, and so are the real test images that the judges compare with. 16 images of each
class are generated without guidance, with classifier-free guidance, with Chamfer and with energy guidance by the exemplars, and
with the last and CFG; every set is an ordinary run directory. Of the judges one (ResNet-56) is of the guide's family
(ResNet-20), the other (a transformer trained without labels) is not: what both see after the mild transforms counts, and the
pictures. With real images at hand they judge by those, and a small classifier trained on each set is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handful.data.images import LabelledImages
from handful.data.parquet import read_labelled
from handful.data.shared_exemplars import ExemplarFeatures
from handful.demo.compared import Demo, Entry, Row, Say, begin, check_size
from handful.errors import RequestError, RunError
from handful.features.registry import FeatureExtractor, load_extractor
from handful.judge.audit import TRANSFORMS
from handful.judge.gains import AS_IS
from handful.judge.judge import Judge
from handful.judge.utility import downstream_accuracy
from handful.metrics.copying import copied_share
from handful.runs.contact_sheet import contact_sheet
from handful.zoo import exemplars_path
from handful.zoo.cifar10 import CLASSES, JUDGES, SIZE, UNTOUCHED, RealFeatures, load_real_features

EXEMPLARS = "cifar10-exemplars"
CFG_SCALE = 2.5
STEPS = 18
EXEMPLARS_PER_CLASS = 32
OTHER = "simclr_"  # begins the columns of the judge that is not of the guide's family
REAL_PER_CLASS = 200  # of the user's own real images, at most
TITLE = "CIFAR-10, provisional model"
COLUMNS = {
    "precision": "precision",
    "coverage": "coverage",
    "frechet": "Frechet",
    "judge_accuracy": "accuracy",
    "robust_coverage": "rob.cov",
    "robust_f1": "rob.F1",
    "robust_frechet": "rob.Fre",
    f"{OTHER}robust_coverage": "SSL cov",
    f"{OTHER}robust_f1": "SSL F1",
    f"{OTHER}robust_frechet": "SSL Fre",
    "copied": "copied",
    "utility": "utility",
    "seconds": "seconds",
}
NOTES = (
    "Judge: cifar10-judge, of the guide's family; SSL: cifar10-simclr, which learned without labels, after the transforms.",
    "accuracy: share in which the judge sees the right class.  rob.: mean after mild transforms of real and generated images.",
    "copied: share nearer to an exemplar, in the judge's features, than 99 % of real test images are.",
    "Trust what both judges see after the transforms, and the pictures.",
    "utility: accuracy on the real images of a small classifier trained on the set alone; measured with --real.",
)


class FeaturesJudge(Judge):
    """A judge of generated images against real ones of which only the features are at hand.

    Args:
        real: What the judge saw of them.
        k: As for `Judge`.

    Raises:
        RunError: The features are another judge's.
    """

    def __init__(self, real: RealFeatures, extractor: FeatureExtractor, *, k: int = 5) -> None:
        if real.judge != extractor.digest:
            raise RunError(
                f"the packaged real features were not computed by {extractor.name}: make them again (tools/package_cifar10.py)"
            )
        views = {AS_IS: UNTOUCHED, **{name: name for name in TRANSFORMS if name in real.features}}
        features = {view: real.features[name].numpy() for view, name in views.items()}
        super().__init__(features, real.labels, extractor, k=k, ceiling=False, classes=CLASSES)


def entries() -> list[Entry]:
    """What is compared, at the defaults that `handful generate` has."""
    cfg = {"method": "cfg", "scale": CFG_SCALE}
    sparse = {"method": "cfg", "scale": 2 * CFG_SCALE, "every": 2}  # half of the second evaluations, at twice the scale
    k = EXEMPLARS_PER_CLASS
    return [
        Entry("none"),
        Entry("cfg", 0, CFG_SCALE, {"guidance": [cfg]}),
        Entry("chamfer", k, says={"guidance": [{"method": "chamfer", "margin": 0.0}]}),
        Entry("energy", k, says={"guidance": [{"method": "energy"}]}),
        Entry("energy+cfg", k, says={"guidance": [{"method": "energy"}, sparse]}),  # what the picture shows
    ]


def demo(
    out: str | Path,
    *,
    seeds: int = 1,
    per_class: int = 16,
    steps: int = STEPS,
    real: str | Path | None = None,
    say: Say = lambda text: None,
) -> list[Row]:
    """Runs the demo, or goes on with one that was interrupted.

    Args:
        out: A new or empty directory, or one with a demo of the same settings.
        seeds: How often everything is repeated, with other noise; the exemplars are the packaged ones each time.
        per_class: Images generated of each class, and guided together.
        steps: Of the sampler.
        real: The user's own copy of CIFAR-10's test images, a folder per class or a parquet file; None: the packaged features.
        say: Called with a line on what is done.

    Returns:
        A row for each method and seed, as in `results.json`; `utility` is None without real images.

    Raises:
        RequestError: If `out` holds something else, or the settings make no sense.
        RunError: If a set can't be generated.
    """
    check_size(seeds, per_class)
    given, out = None if real is None else _read_real(real), Path(out)
    settings = {"demo": "cifar10", "per_class": per_class, "steps": steps}
    rows = begin(out, settings | {"real": None if real is None else str(Path(real).absolute())})
    judges = {
        prefix: FeaturesJudge(load_real_features(role), extractor)
        if given is None
        else Judge(given.images, given.labels, extractor, ceiling=False, classes=CLASSES)
        for prefix, role in zip(("", OTHER), JUDGES, strict=True)
        for extractor in (load_extractor(f"cifar10-{role}"),)
    }
    exemplars = ExemplarFeatures.load(exemplars_path(EXEMPLARS)).seen_by(judges[""].extractor, 1)

    def measure(entry: Entry, seed: int, made: LabelledImages) -> Row:
        seen = {prefix: judge.see(made.images, made.labels) for prefix, judge in judges.items()}
        found = {
            prefix + name: value for prefix, judge in judges.items() for name, value in judge.judged(seen[prefix]).row().items()
        }
        first = judges[""]
        copied = copied_share(_by_class(seen[""].features[AS_IS], made.labels), exemplars, _by_class(first.real, first.labels))
        utility = None
        if given is not None:
            train, test = (torch.tensor([CLASSES.index(name) for name in images.labels]) for images in (made, given))
            utility = downstream_accuracy(made.images, train, given.images, test, steps=400, flip=True, seed=seed)
        return {**found, "copied": copied, "utility": utility}

    shared = {"per_class": per_class, "cohort": per_class, "sampler": {"steps": steps}}
    told = ("coverage", "robust_coverage", f"{OTHER}robust_coverage", "seconds")
    compared = Demo("cifar10", entries(), shared, measure, told, EXEMPLARS, (3, *SIZE))
    rows = compared.run(out, rows, seeds, say)
    contact_sheet({}, compared.made(out, entries()[-1]).by_class(), out / "contact_sheet.png", columns=16, rows=1)
    return rows


def _read_real(source: str | Path) -> LabelledImages:
    images, classes = read_labelled(source, channels=3, size=SIZE, limit=REAL_PER_CLASS, field="--real")
    if set(classes) != set(CLASSES):
        remedy = f"Give CIFAR-10's test images: a folder for each of {', '.join(CLASSES)}."
        raise RequestError("--real", Path(source), f"its classes are {', '.join(classes[:12])}", remedy)
    return images


def _by_class(features: Any, labels: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.asarray(features)[[label == name for label in labels]] for name in CLASSES}
