"""Is it worth it? Classifiers trained on the exemplars alone, on the synthetic images alone, on both; tested on real images.

What a user with a few images would do without any generated ones is to train on these with augmentation; synthetic images are
worth their cost only if they add to that. So everything is trained alike (same network, same steps, same augmentation), several
times, and what is chosen (the augmentation, the share of exemplars in a batch) is chosen on one part of the exemplars by
training on the other: the test images have no say in it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from handful.data.exemplars import FEWEST_TO_TEST
from handful.data.images import read_all
from handful.data.notebook import html_table
from handful.data.sources import LabelledFiles, labelled_files
from handful.errors import RequestError, counted
from handful.judge.class_lists import Entry, of_classes, read_class_list
from handful.judge.learners import FromScratch, Learner, Pretrained
from handful.judge.utility import numbered
from handful.runs.kept import keep, kept, key_of
from handful.runs.metadata import exemplars_of, unused_images
from handful.runs.progress import Progress

KIND, VERSION = "utility", 2
SMALL = 64  # pixels: up to this side a small network learns from scratch
SHARES = (0.25, 0.5, 0.75)  # of exemplars in a batch, to choose from
EXEMPLARS, SYNTHETIC, BOTH = "exemplars alone", "synthetic alone", "exemplars + synthetic"
TEST = "test"


@dataclass(frozen=True)
class Tested:
    """Accuracies on one set of real images, a number for each trained classifier.

    Attributes:
        accuracies: Share of right answers among all classes, by seed.
        per_class: By class, the mean over the seeds.
        among_own: The share where only the set's own classes may be answered, as is usual on ImageNet-R and -A; None where it
            has all classes.
    """

    accuracies: list[float]
    per_class: dict[str, float]
    among_own: list[float] | None = None

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def worst(self) -> tuple[str, float]:
        """The class with the lowest accuracy, and that."""
        name = min(self.per_class, key=lambda each: self.per_class[each])
        return name, self.per_class[name]


@dataclass(frozen=True)
class Trained:
    """One way to train, and what came of it.

    Attributes:
        name: Such as `exemplars + synthetic`.
        images: How many there are to train on.
        share: Of exemplars in a batch; None where only one kind is trained on.
        tests: By the test set's name; `test` first.
    """

    name: str
    images: int
    share: float | None
    tests: dict[str, Tested]


@dataclass(frozen=True)
class Difference:
    """What the synthetic images add to the exemplars on the test images: `gain`, with the `margin` of chance.

    margin = 2 sqrt((s_a^2 + s_b^2) / seeds + e^2), s the standard deviations over the seeds and e the standard error of
    the difference over the test images.
    """

    over: str
    gain: float
    margin: float


@dataclass(frozen=True)
class Worth:
    """What `worth` found.

    Attributes:
        network: What was trained.
        augmentation: Which of `learners.AUGMENTATIONS` (or how many views) was chosen on the exemplars.
        rows: The ways to train, in the order of the table.
        differences: exemplars + synthetic over each other way; exemplars alone first.
        steps, seeds: Of the optimizer; so many classifiers of each kind.
        notes: What else should be known.
    """

    network: str
    augmentation: str
    rows: list[Trained]
    differences: list[Difference]
    steps: int
    seeds: int
    notes: list[str] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """Whether the synthetic images help, in plain words."""
        by_name = {row.name: row.tests[TEST].mean for row in self.rows}
        first, *others = self.differences
        text = (
            f"trained on them and the exemplars, a classifier is right on {by_name[BOTH]:.1%} of the test images; trained on"
            f" the exemplars alone, on {by_name[EXEMPLARS]:.1%} ({100 * first.gain:+.1f} points, spread"
            f" {100 * first.margin:.1f})"
        )
        if first.gain > first.margin:
            verdict = "The synthetic images help"
        elif first.gain < -first.margin:
            verdict = "The synthetic images harm"
        else:
            verdict = "The synthetic images do not help beyond the spread"
        rivals = [each for each in others if each.over.startswith("exemplars + ")]
        beside = ""
        if rivals:
            best = min(rivals, key=lambda each: each.gain)
            how = "no better than" if abs(best.gain) <= best.margin else "better than" if best.gain > 0 else "worse than"
            points = f"{100 * best.gain:+.1f} points, spread {100 * best.margin:.1f}"
            beside = f" They are {how} {best.over.removeprefix('exemplars + ')} ({points})."
        return f"{verdict}: {text}.".replace("%", " %") + beside

    def _repr_html_(self) -> str:
        tests = list(self.rows[0].tests)
        rows = [[row.name, row.images, *(row.tests[name].mean for name in tests)] for row in self.rows]
        return html_table(self.network, ["trained on", "images", *tests], rows, [self.sentence])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = asdict(self)
        for plain, row in zip(found["rows"], self.rows, strict=True):
            for name, tested in row.tests.items():
                plain["tests"][name] |= {"mean": tested.mean, "spread": tested.spread, "worst": list(tested.worst)}
        return {**found, "sentence": self.sentence}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Worth:
        """From what `to_dict` gave."""
        return TypeAdapter(cls).validate_python(data)


def worth(
    synthetic: str | Path,
    *,
    test: str | Path | None = None,
    ood: Mapping[str, str | Path] | None = None,
    baselines: Mapping[str, str | Path] | None = None,
    exemplars: str | Path | None = None,
    features: str | None = None,
    ood_classes: str | Path | None = None,
    seeds: int = 3,
    steps: int = 400,
    seed: int = 0,
    progress: Progress | None = None,
    workers: int = 1,
) -> Worth:
    """Trains and tests; a result that a run directory holds already is read from there.

    Args:
        synthetic: Generated images: a run directory, or a folder per class.
        test: Held-out real images, a folder per class; None: those of the exemplars' folder that guided nothing.
        ood: By name, further real test images. Folders that are none of the classes are left out, with a note.
        baselines: By name, other synthetic sets to train on in the same ways.
        exemplars: A folder per class, all of it; None: those that the run drew.
        features: An extractor whose last block is trained with a linear head; None: `dinov2` for images above `SMALL`
            pixels, and a small network from scratch below.
        ood_classes: A list of what classes are called (`handful.judge.class_lists`), by which the folders of `test` and `ood`
            are matched to the generated classes: ImageNet's synsets and numbers, or one's own pairs.
        seeds, steps: So many classifiers of each kind; so many steps each.
        seed: Of the first one.
        progress: Is notified of every classifier.
        workers: Processes that compute features of large images, each with its share of the threads; training has one.

    Raises:
        RequestError: If a folder or its classes do not fit, or too few test images are left; said before any training.
    """
    if seeds < 1 or steps < 10:
        raise RequestError(
            "seeds, steps", (seeds, steps), "this would train nothing", "Give 1 or more seeds and 10 or more steps."
        )
    entries = read_class_list(ood_classes) if ood_classes is not None else []
    sets = _Sets(synthetic, test, ood or {}, baselines or {}, exemplars, entries)
    progress = progress or Progress()
    asked = {"features": features, "seeds": seeds, "steps": steps, "seed": seed, "version": VERSION}
    key = key_of({**asked, "sets": sets.digests()})
    if (there := kept(synthetic, KIND, key)) is not None:
        return Worth.from_dict(there["result"])
    learner = _learner(sets, features, workers, progress)
    try:
        found = _compared(sets, learner, seeds, steps, seed, progress)
    finally:
        if isinstance(learner, Pretrained):
            learner.processes.close()
    folders = {"test": test, "exemplars": exemplars, "ood": ood or {}, "baselines": baselines or {}}
    keep(synthetic, KIND, key, {"asked": {**asked, **_texts(folders)}, "result": found.to_dict()})
    return found


def _texts(folders: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: str(path) for key, path in each.items()} if isinstance(each, Mapping) else each and str(each)
        for name, each in folders.items()
    }


class _Sets:
    """All images that are trained or tested on, not read yet; all checked before anything is read.

    Attributes:
        classes: Of the generated images.
        training, tests: By name; `EXEMPLARS` and `SYNTHETIC` first, `TEST` first.
        notes: What else should be known.
    """

    def __init__(
        self,
        synthetic: str | Path,
        test: str | Path | None,
        ood: Mapping[str, str | Path],
        baselines: Mapping[str, str | Path],
        exemplars: str | Path | None,
        entries: Sequence[Entry] = (),
    ) -> None:
        made = labelled_files(synthetic, field="OUT")
        self.classes, self.notes = made.classes, [*made.notes]
        guided, left = self._exemplars(synthetic, exemplars, test is None)
        tested = left
        if tested is None:
            assert test is not None
            if entries:
                tested, said = of_classes(TEST, labelled_files(test, field="test"), self.classes, entries)
                self.notes += said
            else:
                tested = labelled_files(test, classes=self.classes, field="test")
        few = [(count, name) for name in self.classes if (count := tested.counts.get(name, 0)) < FEWEST_TO_TEST]
        if few:
            count, name = min(few)
            problem = f"class '{name}' has {counted(count, 'image')} to test on, at least {FEWEST_TO_TEST} are needed"
            fewer = "Generate with a smaller --k, add images, or name other ones with --test DIR"
            remedy = "Add images" if test else fewer
            raise RequestError("test", str(tested.root), problem, f"{remedy}.")
        self.training: dict[str, LabelledFiles] = {EXEMPLARS: guided, SYNTHETIC: made}
        for name, path in baselines.items():
            self.training[f"{name} alone"] = labelled_files(path, classes=self.classes, field="baseline")
        self.tests: dict[str, LabelledFiles] = {TEST: tested}
        for name, path in ood.items():
            if name == TEST:
                raise RequestError(
                    "ood", f"{name}={path}", "this is already the name of the images of --test", "Give it another name."
                )
            self.tests[name], said = of_classes(name, labelled_files(path, field="ood"), self.classes, entries)
            self.notes += said
        self._contents = {
            role: {name: _contents(files, role) for name, files in sets.items()}
            for role, sets in (("training", self.training), ("tests", self.tests))
        }
        same = len(set(self._contents["tests"][TEST]) & set(self._contents["training"][EXEMPLARS]))
        if same:
            warnings.warn(
                f"{same} of the test images are exemplars, byte for byte: so the accuracies are too high", stacklevel=4
            )

    def _exemplars(
        self, synthetic: str | Path, exemplars: str | Path | None, tested: bool
    ) -> tuple[LabelledFiles, LabelledFiles | None]:
        """The images that guided, and those of their folder that did not, where these are to be tested on."""
        if exemplars is not None:
            found = labelled_files(exemplars, classes=self.classes, field="exemplars")
            if tested:
                raise RequestError(
                    "test", None, "it is missing", "With --exemplars, also give real test images with --test DIR."
                )
            return found, None
        asked = exemplars_of(synthetic)
        if asked is None:
            problem = "it was made without exemplars, and everything here is compared with them"
            raise RequestError("exemplars", str(synthetic), problem, "Give their folder with --exemplars DIR.")
        if asked.folder.is_file():
            problem = "its exemplars are a file of features, but a classifier learns from images"
            raise RequestError("exemplars", asked.folder, problem, "Give the folder of images with --exemplars DIR.")
        everything = labelled_files(asked.folder, classes=self.classes, field="exemplars")
        left = unused_images(synthetic, needed=0, field="exemplars", remedy="--exemplars DIR and --test DIR")
        unused = set(left.names)
        guided = everything.only([place for place, name in enumerate(everything.names) if name not in unused])
        if tested:
            self.notes.append(f"tested on the {counted(len(left), 'image')} of {asked.folder} that were not used as exemplars")
        return guided, left if tested else None

    def digests(self) -> dict[str, Any]:
        """What identifies all images, by content."""
        return {
            role: {name: key_of([files.labels, self._contents[role][name]]) for name, files in sets.items()}
            for role, sets in (("training", self.training), ("tests", self.tests))
        }

    def size(self) -> tuple[int, int]:
        """Height and width of most of the generated images."""
        made = self.training[SYNTHETIC]
        sample = range(0, len(made), max(1, len(made) // 50))
        (height, width), _ = Counter(tuple(made.image(place, channels=1).shape[1:]) for place in sample).most_common(1)[0]
        return height, width


def _contents(files: LabelledFiles, field: str) -> list[str]:
    """The SHA-256 of each image."""

    def read(place: int) -> str:
        return hashlib.sha256(files.content(place)).hexdigest()

    return read_all(read, range(len(files)), field=field, root=files.root)


def _learner(sets: _Sets, features: str | None, workers: int, progress: Progress) -> Learner:
    size = sets.size()
    if features is None and max(size) <= SMALL:
        if workers > 1:
            progress.note("--workers is not used: a small network learns from the images, so there are no features to compute")
        return FromScratch(size)
    images = sum(map(len, sets.training.values()))
    return Pretrained(features or "dinov2", size, images, workers, progress.note)


def _compared(sets: _Sets, learner: Learner, seeds: int, steps: int, seed: int, progress: Progress) -> Worth:
    classes, count = sets.classes, len(sets.classes)
    held = {name: learner.read(files, name, True) for name, files in sets.training.items()}
    labels = {name: numbered(files.labels, classes) for name, files in sets.training.items()}
    tested = {name: (learner.read(files, name, False), numbered(files.labels, classes)) for name, files in sets.tests.items()}
    notes, mixed = list(sets.notes), [name for name in sets.training if name != EXEMPLARS]
    choosable = min(sets.training[EXEMPLARS].counts.values()) >= 2
    trainings = seeds * (1 + 2 * len(mixed)) + (choosable and len(learner.choices) + len(SHARES) * len(mixed))
    quicker = "; --seeds 1 --steps 50 is quicker, and less exact" if seeds > 1 and steps > 50 else ""
    progress.begin(trainings, 0)
    kinds = 1 + 2 * len(mixed)
    choosing = trainings - kinds * seeds
    progress.note(
        f"{counted(kinds, 'kind')} x {counted(seeds, 'seed')}, and {choosing} to choose augmentation and mixture{quicker}"
    )

    def train(names: Sequence[str], share: float | None, choice: str, seed: int, steps: int, only: Tensor | None) -> nn.Module:
        """Trains on one set, or on exemplars and another, `share` of each batch from the exemplars (`only` some of them)."""
        parts = [(held[name], labels[name]) for name in names]
        if only is not None and names[0] == EXEMPLARS:
            parts[0] = (parts[0][0][only], parts[0][1][only])
        weights = None
        if share is not None:
            sizes = [len(of) for _, of in parts]
            weights = torch.cat([torch.full((n,), s / n) for n, s in zip(sizes, (share, 1 - share), strict=True)])
        images, truth = (torch.cat([part[place] for part in parts]) for place in (0, 1))
        stepped = partial(progress.advance, 1 / steps, _called(names))
        return learner.train(images, truth, count, choice, steps=steps, seed=seed, weights=weights, stepped=stepped)

    choice, shares = learner.choices[-1], dict.fromkeys(mixed, 0.5)
    try:
        if choosable:
            half, rest = _halves(labels[EXEMPLARS])
            kept_back = held[EXEMPLARS][rest][:, :1] if isinstance(learner, Pretrained) else held[EXEMPLARS][rest]

            def tried(names: Sequence[str], share: float | None, choice: str) -> float:
                network = train(names, share, choice, seed, max(10, steps // 2), half)
                with torch.no_grad():
                    answers = learner.logits(network, kept_back).argmax(1)
                return float((answers == labels[EXEMPLARS][rest]).double().mean())

            choice = max(reversed(learner.choices), key=lambda each: tried([EXEMPLARS], None, each))
            for name in mixed:
                shares[name] = max(SHARES, key=lambda share: tried([EXEMPLARS, name], share, choice))
        else:
            notes.append(
                "a class has only one exemplar, so the mixture can't be chosen by testing: half of each batch are exemplars"
            )
        ways: list[tuple[str, list[str], float | None]] = [(EXEMPLARS, [EXEMPLARS], None)]
        for name in mixed:
            ways += [(name, [name], None), (_called([EXEMPLARS, name]), [EXEMPLARS, name], shares[name])]
        rows, hits = [], dict[str, Tensor]()
        for called, names, share in ways:
            networks = [train(names, share, choice, seed + each, steps, None) for each in range(seeds)]
            tests = {}
            for name, (images, truth) in tested.items():
                with torch.no_grad():
                    logits = torch.stack([learner.logits(network, images) for network in networks])
                if name == TEST:
                    hits[called] = (logits.argmax(2) == truth).double().mean(0)
                tests[name] = _tested(logits, truth, classes)
            rows.append(Trained(called, sum(len(labels[name]) for name in names), share, tests))
    finally:
        progress.end()
    by_name = {row.name: row.tests[TEST] for row in rows}
    differences = [
        Difference(other, *_difference(by_name[BOTH], by_name[other], hits[BOTH] - hits[other]))
        for other in by_name
        if other != BOTH
    ]
    for name in sets.tests:
        means = [f"{row.name} {fmean(among):.3f}" for row in rows if (among := row.tests[name].among_own)]
        notes += [f"{name}: if the classifier may answer only with classes of these images, {'; '.join(means)}"] * bool(means)
    if seeds == 1:
        notes.append("with one seed the spread covers only the choice of test images, not of the training; give --seeds 3")
    return Worth(learner.name, choice, rows, differences, steps, seeds, notes)


def _called(names: Sequence[str]) -> str:
    """`synthetic alone`, `exemplars + synthetic`."""
    return names[0] if len(names) == 1 else " + ".join(name.removesuffix(" alone") for name in names)


def _halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places of one half of each class, the larger, and of the other."""
    places = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    middles = [(len(each) + 1) // 2 for each in places]
    first = [each[:middle] for each, middle in zip(places, middles, strict=True)]
    return torch.cat(first), torch.cat([each[middle:] for each, middle in zip(places, middles, strict=True)])


def _tested(logits: Tensor, truth: Tensor, classes: Sequence[str]) -> Tested:
    """From logits (seeds, n, classes) of images of labels (n,)."""
    right, own = (logits.argmax(2) == truth).double(), truth.unique()
    per_class = {str(classes[label]): float(right[:, truth == label].mean()) for label in own.tolist()}
    among = None if len(own) == len(classes) else own[logits[..., own].argmax(2)] == truth
    return Tested(right.mean(1).tolist(), per_class, None if among is None else among.double().mean(1).tolist())


def _difference(one: Tested, other: Tested, per_image: Tensor) -> tuple[float, float]:
    """The gain and its margin (see `Difference`)."""
    over_seeds = sum((each.spread or 0.0) ** 2 for each in (one, other)) / len(one.accuracies)
    over_images = float(per_image.var(correction=1)) / len(per_image)
    return one.mean - other.mean, 2 * math.sqrt(over_seeds + over_images)
