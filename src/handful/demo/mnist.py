"""`handful demo`: somebody else's model, your handful.

The zoo's `mnist` is a published model of MNIST; the user's digits are the UCI ones, by other writers and another scanner. With
k real images of each class: what are they worth alone, what does a synthetic set add, and which way to make it adds most? Each
set is judged, and a small classifier learns from the exemplars alone and from both, for the smallest k from the set alone too;
897 real digits that nothing else saw are its test. Where there are two processors, one makes sets and the other measures
them: the numbers are the same. `report.html` shows the headline's images beside the other methods'.
"""

from __future__ import annotations

import warnings
from functools import cache
from math import hypot
from pathlib import Path

import torch
from torch import Tensor

from handful.data.augmentation import stroke_view
from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages, read_folder
from handful.demo.compared import Demo, Entry, Measure, Row, Say, begin, check_size, write_real
from handful.features.registry import load_extractor
from handful.generate.run import same_arithmetic
from handful.judge.evaluate import evaluate
from handful.judge.measure import Referee
from handful.judge.utility import LightClassifier, accuracy, train_classifier
from handful.report.html import report
from handful.runs.contact_sheet import contact_sheet
from handful.zoo import JUDGES
from handful.zoo.mnist import CLASSES, SIZE, load_uci_split

KS = (2, 4, 16)
STEPS, BATCH = 160, 32  # of a training
CHANCE = 0.01  # standard deviation of the accuracy between trainings of this length on one set, about
EQUAL = 6  # so many exemplars of a class make half of a batch beside a synthetic set: k make k / (k + 6)
NOISED = {"from": "exemplars", "depth": 0.5}
OTHERS = {"from": "exemplars", "of": "others", "depth": 0.67}
METHODS: dict[str, Row] = {
    "none": {"guidance": []},
    "cfg": {"guidance": [{"method": "cfg"}]},
    "sdedit": {"guidance": [], "start": NOISED},
    "chamfer": {"guidance": [{"method": "chamfer", "margin": 0.0}]},
    "energy": {"guidance": [{"method": "energy"}]},
    "auto": {"guidance": [{"method": "auto"}]},
    "crdi": {},
    "sdedit+others": {"mix": [{"share": 1, "start": NOISED}, {"share": 1, "start": OTHERS}]},
}
HEADLINE = "sdedit+others"  # the best rule of benchmarks/foreign.py
UNGUIDED = ("none", "cfg")  # one set serves every k
FITTED = "crdi"  # embeddings, fitted as `handful invert` does
TITLE = "MNIST's published model, UCI digits"
COLUMNS = {
    "exemplars": "exemplars",
    "utility": "synthetic",
    "both": "both",
    "precision": "precision",
    "coverage": "coverage",
    "robust_precision": "rob.prec",
    "robust_coverage": "rob.cov",
    "copied": "copied",
    "seconds": "seconds",
}
NOTES = (
    "exemplars, synthetic, both: accuracy on 897 real test digits of a small classifier trained on the k exemplars of each",
    "class alone, on the synthetic set alone (for the smallest k), and on both (k / (k + 6) of each batch exemplars),",
    "augmented alike. Two trainings on one set differ by about .01.  sdedit+others: half of the images start from noised",
    "exemplars of their own class, half from those of other classes.  precision, coverage: by uci-judge, a classifier of",
    "the 900 other UCI digits; rob.: after mild transforms of real and generated images alike.  copied: share nearer to an",
    "exemplar than 99 % of real test digits are.  seconds: of sampling, and with crdi of fitting: a run for each class, which",
    "the report leaves out.",
    "contact_sheet.png: the exemplars of k = 2, and below them three noises, each made by "
    + ", ".join(list(METHODS)[:-1])
    + ".",
)


def entries(per_class: int = 24) -> list[Entry]:
    half = {"cohort": (per_class + 1) // 2}  # a mixture's settings take whole cohorts
    return [
        Entry(name, k, says={**says, **(half if "mix" in says else {})}, guided=name not in UNGUIDED, fitted=name == FITTED)
        for k in KS
        for name, says in METHODS.items()
    ]


def demo(out: str | Path, *, seeds: int = 3, per_class: int = 24, say: Say = lambda text: None) -> list[Row]:
    """Runs the demo, or goes on with one that was interrupted.

    Args:
        out: A new or empty directory, or one with a demo of the same settings.
        seeds: How often everything is repeated, exemplars drawn anew each time.
        per_class: Images generated of each class, and guided together.
        say: Called with a line on what is done.

    Returns:
        A row for each method, k and seed, as in `results.json`.

    Raises:
        RequestError: If `out` holds something else, or the settings make no sense.
        RunError: If a set can't be generated.
    """
    check_size(seeds, per_class)
    out = Path(out)
    rows = begin(out, {"demo": "mnist", "per_class": per_class})
    split, pool = load_uci_split(), out / "real-train"
    write_real(pool, split.train_images, split.train_labels, CLASSES)
    write_real(out / "real-held-out", split.test_images, split.test_labels, CLASSES)
    shared = {"per_class": per_class, "cohort": per_class, "sampler": {"steps": 10}}
    ready = (measures, out, KS[0], STEPS)
    told = ("exemplars", "both")
    compared = Demo("mnist", entries(per_class), shared, measures(*ready[1:]), told, str(pool), (1, *SIZE), ready)
    with same_arithmetic(1):  # small images: a second thread costs more in waking up than it brings
        rows = compared.run(out, rows, seeds, say)
    _picture(compared, out, _drawn(out, KS[0], 0))
    shown = [entry for entry in compared.entries if entry.k == KS[0] and not entry.fitted]
    shown.sort(key=lambda entry: entry.method != HEADLINE)
    sets = {entry.method: out / "seed-0" / entry.folder for entry in shown}
    baselines = {method: sets[method] for method in ("none", "cfg", "sdedit") if method in sets}
    with warnings.catch_warnings():  # the report shows its notes
        warnings.simplefilter("ignore")
        evaluate(sets[HEADLINE], out / "real-held-out", judge=JUDGES["mnist"], baselines=baselines)
    report([*sets.values()], out / "report.html")
    return rows


def measures(out: Path, smallest: int, steps: int) -> Measure:
    """What measures the sets of a demo in `out`; for the smallest k by the set alone too, with trainings of so many steps."""

    @cache
    def test() -> LabelledImages:
        return read_folder(out / "real-held-out", channels=1, size=SIZE)

    @cache
    def referee() -> Referee:
        return Referee(test(), load_extractor(JUDGES["mnist"]), classes=CLASSES)

    @cache
    def drawn(k: int, seed: int) -> dict[str, Tensor]:
        return _drawn(out, k, seed)

    @cache
    def by_exemplars(k: int, seed: int) -> float:
        return _utility([drawn(k, seed)], test(), seed, steps)

    known: dict[tuple[str, int, int], Row] = {}

    def measure(entry: Entry, seed: int, made: LabelledImages) -> Row:
        exemplars = drawn(entry.k, seed)
        key = (entry.method, entry.k if entry.guided else 0, seed)
        if key not in known:
            row = referee().row(made)
            del row["copied"], row["utility_spread"]
            alone = _utility([made.by_class()], test(), seed, steps) if key[1] in (0, smallest) else None
            known[key] = {**row, "utility": alone}
        return {
            **known[key],
            "copied": referee().copied(made, exemplars),
            "exemplars": by_exemplars(entry.k, seed),
            "both": _utility([made.by_class(), exemplars], test(), seed, steps),
        }

    return measure


def _drawn(out: Path, k: int, seed: int) -> dict[str, Tensor]:
    return Exemplars.from_folder(out / "real-train", channels=1, size=SIZE, k=k, seed=seed).images


def _utility(sets: list[dict[str, Tensor]], test: LabelledImages, seed: int, steps: int) -> float:
    """Accuracy on the test after training on a set, or on two, of which the second holds the exemplars (see `EQUAL`)."""
    images = torch.cat([images for each in sets for images in each.values()])
    labels = torch.tensor([CLASSES.index(name) for each in sets for name, images in each.items() for _ in images])
    weights = None
    if len(sets) == 2:
        first, second = (sum(map(len, each.values())) for each in sets)
        share = second / (second + EQUAL * len(CLASSES))
        weights = torch.cat([torch.full((first,), (1 - share) / first), torch.full((second,), share / second)])
    network = train_classifier(
        images,
        labels,
        len(CLASSES),
        network=LightClassifier,
        steps=steps,
        batch=BATCH,
        augment=stroke_view,
        seed=seed,
        weights=weights,
    )
    return accuracy(network, test.images, torch.tensor([CLASSES.index(name) for name in test.labels]))


def _picture(compared: Demo, out: Path, exemplars: dict[str, Tensor]) -> None:
    """Class by class the exemplars, and one image from the same noise by each method of the smallest k, but mixtures."""
    first = [entry for entry in compared.entries if entry.k == KS[0] and "mix" not in entry.says]
    sets = [compared.made(out, entry).by_class() for entry in first]
    shown = {name: torch.cat([torch.stack([each[name][place] for each in sets]) for place in range(3)]) for name in CLASSES}
    contact_sheet(exemplars, shown, out / "contact_sheet.png", columns=len(first) * 3, rows=1)


def answer(means: list[Row]) -> str:
    """The demo in one sentence: which set helps most, and whether chance alone could have brought it there."""
    k = KS[0]
    of = {mean["method"]: mean for mean in means if mean["k"] == k}
    best = max(of, key=lambda method: of[method]["both"])
    plain, first = of["none"], of[best]
    chance = 2 * hypot(*(max(CHANCE, mean.get("both_spread") or 0) for mean in (plain, first)))  # it is the best of several
    ahead = first["both"] - plain["both"]
    verdict = "no method is better than no guidance"
    if best != "none":
        verdict = (
            f"{best} is highest with {first['both']:.1%}, {ahead * 100:.1f} points above plain images, where chance makes up to"
            f" {chance * 100:.1f}" + ("" if ahead > chance else ": no method is shown to be better")
        )
    return (
        f"With {k} real images of each class a classifier is right on {plain['exemplars']:.1%} of the test digits; with plain"
        f" images of somebody else's model beside them on {plain['both']:.1%}, with classifier-free guidance on"
        f" {of['cfg']['both']:.1%}; {verdict}."
    ).replace("%", " %")
