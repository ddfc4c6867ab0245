"""Judges a generated set against a real one: every metric, a ceiling beside it, what is left after mild transforms, and
what it gains over baselines.

The judge should share nothing with the guide: another architecture, other training (design.md, "Gain, or adversarial
gain?"). Each number is meaningless without the judge, k and n, so they travel with it.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handful.data.images import LabelledImages, image_folder, read_folder, read_image
from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, load_extractor
from handful.judge.audit import TRANSFORMS
from handful.judge.copies import CopyCheck, require_exemplars
from handful.judge.gains import AS_IS, DRAWS, Comparison, Measured, compare
from handful.metrics import PRDC
from handful.metrics.reference import Reference, draw_counts, redrawn_mean
from handful.metrics.summary import Summary, summarize
from handful.runs.metadata import guided_by

_NEAR = ("precision", "recall", "density", "coverage", "f1")


@dataclass(frozen=True)
class Transformed:
    """What a judge found after one mild transform of real and generated images alike; pooled."""

    prdc: PRDC
    frechet: float
    judge_accuracy: float | None

    def row(self) -> dict[str, float | None]:
        """By metric, flat."""
        near = {name: getattr(self.prdc, name) for name in _NEAR}
        return {**near, "frechet": self.frechet, "judge_accuracy": self.judge_accuracy}


@dataclass(frozen=True)
class Evaluation:
    """What a judge found.

    Attributes:
        judge: The extractor's name, and `judge_digest` its weights and preprocessing.
        summary: Every metric, pooled and per class, with the real-against-real ceiling.
        judge_accuracy: Share of generated images that the judge names as asked; None if it is no classifier.
        transformed: The pooled metrics after each mild transform of both sets; empty where the audit was left out.
        copied: Share of generated images nearer (in pixels) to an exemplar of their class than 99 % of the real images are;
            None where no exemplars were given.
        gains: By the baseline's name, what this set gains over it.
    """

    judge: str
    judge_digest: str
    summary: Summary
    judge_accuracy: float | None
    transformed: dict[str, Transformed]
    copied: float | None = None
    gains: dict[str, Comparison] = field(default_factory=dict)

    def robust(self, metric: str) -> float | None:
        """The mean of a metric over the transforms.

        None where the audit was left out, the judge is no classifier, or the metric is not taken after transforms (Vendi).
        """
        values = [value for found in self.transformed.values() if (value := found.row().get(metric)) is not None]
        return float(np.mean(values)) if values else None

    def row(self) -> dict[str, float | None]:
        """The pooled numbers, flat: a row of a table."""
        robust = ("precision", "recall", "coverage", "f1", "frechet", "judge_accuracy")
        return {**self._plain(), **{f"robust_{name}": self.robust(name) for name in robust}}

    def by_view(self) -> dict[str, dict[str, float | None]]:
        """The pooled metrics as is (`gains.AS_IS`) and after each transform."""
        return {AS_IS: self._plain(), **{name: found.row() for name, found in self.transformed.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Everything, safe for JSON."""
        sizes = {
            "k": self.summary.k,
            "n_real": self.summary.pooled.generated.n_real,
            "n_generated": self.summary.pooled.generated.n_generated,
        }
        return {
            "judge": self.judge,
            "judge_digest": self.judge_digest,
            **self.row(),
            "copied": self.copied,
            **self.summary.to_dict(),
            "transformed": {name: {**found.row(), **sizes} for name, found in self.transformed.items()},
            "gains": {name: found.to_dict() for name, found in self.gains.items()},
        }

    def _plain(self) -> dict[str, float | None]:
        scores = self.summary.pooled.generated
        plain = {name: getattr(scores, name) for name in (*_NEAR, "frechet", "vendi")}
        return {**plain, "judge_accuracy": self.judge_accuracy}


@dataclass(frozen=True, eq=False)
class Seen:
    """A labelled set as a judge sees it, by view: as is (`gains.AS_IS`) and after each transform.

    Attributes:
        labels: The images' class names.
        features: (n, D) float32.
        right: Whether the judge names each image as its label says, (n,) bool; None where it is no classifier of these.
    """

    labels: list[str]
    features: dict[str, np.ndarray]
    right: dict[str, np.ndarray | None]


class Judge:
    """Judges many generated sets against one real set, whose features, balls and Gaussian it takes once.

    Args:
        images: Real, (m, c, h, w) in [-1, 1].
        labels: Their class names.
        extractor: What judges.
        k: Neighbour of precision, recall, density and coverage.
        audit: Judge again after each mild transform of real and generated images alike.
        ceiling: Measure one half of the real set against the other too.
        classes: Class names in the order of the judge's logits; None: in alphabetical order, if their number fits.

    Raises:
        RequestError: If there are too few real images for k.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[str],
        extractor: FeatureExtractor,
        *,
        k: int = 5,
        audit: bool = True,
        ceiling: bool = True,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.extractor, self.k, self.ceiling = extractor, k, ceiling
        self.labels, self.classes = list(labels), list(classes or sorted(set(labels)))
        self.transforms = TRANSFORMS if audit else {}
        self.references = {name: Reference(self.features(view), k) for name, view in self._views(images)}
        self.real = self.references[AS_IS].features

    def _views(self, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield AS_IS, images
        for name, apply in self.transforms.items():
            yield name, apply(images)

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 256) -> np.ndarray:
        """Images (n, c, h, w) -> features (n, D), float32."""
        return torch.cat([self.extractor(part).float() for part in images.split(batch)]).cpu().numpy()

    @torch.no_grad()
    def right(self, images: Tensor, labels: Sequence[str], batch: int = 256) -> np.ndarray | None:
        """Whether each image's largest logit is its label, (n,) bool; None if the judge is no classifier of these classes."""
        if not self.extractor.is_classifier:
            return None
        logits = torch.cat([self.extractor.logits(part) for part in images.split(batch)])
        if logits.shape[1] != len(self.classes):
            return None
        places = {name: place for place, name in enumerate(self.classes)}
        return logits.argmax(1).cpu().numpy() == np.array([places.get(name, -1) for name in labels])

    def accuracy(self, images: Tensor, labels: Sequence[str]) -> float | None:
        """Share of images that the judge names as their labels say; None if it is no classifier of these classes."""
        return _share(self.right(images, labels))

    def see(self, images: Tensor, labels: Sequence[str]) -> Seen:
        """Takes features and names of images (n, c, h, w) in [-1, 1] of classes `labels`, as is and after each transform."""
        features, right = {}, {}
        for name, view in self._views(images):
            features[name], right[name] = self.features(view), self.right(view, labels)
        return Seen(list(labels), features, right)

    def judged(self, seen: Seen) -> Evaluation:
        """Judges a set that was seen.

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        summary = summarize(self.real, seen.features[AS_IS], self.labels, seen.labels, self.k, self.ceiling)
        transformed = {}
        for name in self.transforms:
            reference, features = self.references[name], seen.features[name]
            found = reference.prdc(features), reference.frechet(features)
            transformed[name] = Transformed(*found, _share(seen.right[name]))
        return Evaluation(self.extractor.name, self.extractor.digest, summary, _share(seen.right[AS_IS]), transformed)

    def __call__(self, images: Tensor, labels: Sequence[str]) -> Evaluation:
        """Judges generated images (n, c, h, w) in [-1, 1] of classes `labels`.

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        return self.judged(self.see(images, labels))

    def measured(
        self, seen: Seen, found: Evaluation, *, stream: str, seed: int = 0, copied: np.ndarray | None = None
    ) -> Measured:
        """A judged set with its bootstrap draws, ready for `gains.compare`.

        Args:
            seen, found: The set, and what `judged` said of it.
            stream: Which of the seed's streams draws; two sets that are compared take two.
            seed: Of the draws.
            copied: Which images count as copied, (n,) bool, where that is known.
        """
        counts = draw_counts(seen.labels, DRAWS, [seed, zlib.crc32(stream.encode())])
        values, draws = found.by_view(), {}
        for view, features in seen.features.items():
            draws[view] = self.references[view].redrawn(features, counts)
            right = seen.right[view]
            if right is not None:
                draws[view]["judge_accuracy"] = redrawn_mean(right, counts)
        if copied is not None:
            values[AS_IS]["copied"], draws[AS_IS]["copied"] = _share(copied), redrawn_mean(copied, counts)
        return Measured(len(seen.labels), values, draws)


def evaluate(
    synthetic: str | Path,
    real: str | Path,
    features: str,
    *,
    k: int = 5,
    audit: bool = True,
    ceiling: bool = True,
    baselines: Mapping[str, str | Path] | None = None,
    exemplars: str | Path | None = None,
    seed: int = 0,
) -> Evaluation:
    """Judges a folder of generated images (or a run directory) against a folder of real ones, a folder per class each.

    Real images are brought to the generated ones' size, so that both are seen alike.

    Args:
        synthetic, real: The folders. Real images must not be the exemplars: those are known to the generator.
        features: The judge, a name that `handful.features.load_extractor` knows.
        k, audit, ceiling: As for `Judge`.
        baselines: By name, sets to compare with: of the same classes and size as the synthetic one.
        exemplars: The folder of the exemplars, to count copies of them.
        seed: Of the bootstrap draws that tell a gain from chance.

    Raises:
        RequestError: If a folder, the classes, a baseline, the exemplars or the judge do not fit; said before any feature
            is taken.
    """
    baselines = dict(baselines or {})
    made, wanted = image_folder(synthetic, field="synthetic"), image_folder(real, field="real")
    missing, unknown = sorted(set(wanted) - set(made)), sorted(set(made) - set(wanted))
    if unknown:
        raise RequestError(
            "real",
            str(real),
            f"it has no folder for {', '.join(unknown[:8])}, which {synthetic} has",
            "Add real images of these classes, or remove the folders.",
        )
    reference_files = {name: wanted[name] for name in made}
    for role, folder, files in (("synthetic", synthetic, made), ("real", real, reference_files)):
        _require_enough(role, folder, files, k)
    size = _size(made)
    for folder in baselines.values():
        _require_baseline(folder, {"synthetic": made, "real": reference_files}, size, k)
    if exemplars is not None:
        require_exemplars(exemplars, list(made))
    extractor = load_extractor(features)
    channels = extractor.channels or 3

    def read(folder: str | Path, field: str) -> LabelledImages:
        return read_folder(folder, channels=channels, size=size, classes=list(made), field=field)

    reference = read(real, "real")
    classes = extractor.classes if set(made) <= set(extractor.classes) else sorted(wanted)
    check = CopyCheck(exemplars, synthetic, reference, list(made), channels) if exemplars is not None else None
    judge = Judge(reference.images, reference.labels, extractor, k=k, audit=audit, ceiling=ceiling, classes=classes)
    for folder in (synthetic, *baselines.values()):
        if guided_by(folder, features, extractor.digest):
            which = "these images" if folder == synthetic else f"the baseline {folder}"
            warnings.warn(f"{features} guided {which}: it judges its own work; take an unrelated judge", stacklevel=2)
    if missing:
        warnings.warn(f"real classes without generated images are left out: {', '.join(missing[:8])}", stacklevel=2)

    def judged(images: LabelledImages) -> tuple[Evaluation, Seen, np.ndarray | None]:
        seen, copied = judge.see(images.images, images.labels), check(images) if check else None
        return replace(judge.judged(seen), copied=_share(copied)), seen, copied

    found, seen, copied = judged(read(synthetic, "synthetic"))
    if not baselines:
        return found
    mine, gains = judge.measured(seen, found, stream="synthetic", seed=seed, copied=copied), {}
    for name, folder in baselines.items():
        other, seen, copied = judged(read(folder, "baseline"))
        theirs = judge.measured(seen, other, stream=f"baseline {name}", seed=seed, copied=copied)
        if theirs.images != mine.images:
            warnings.warn(
                f"the baseline {name} has {theirs.images} images, the set {mine.images}: recall, coverage, Frechet distance and"
                " Vendi score depend on the number, so their gains mislead; generate as many",
                stacklevel=2,
            )
        gains[name] = compare(mine, theirs)
    return replace(found, gains=gains)


def _share(flags: np.ndarray | None) -> float | None:
    return None if flags is None else float(flags.mean())


def _size(files: Mapping[str, Sequence[Path]]) -> tuple[int, int]:
    """Height and width of the first image."""
    height, width = read_image(next(iter(files.values()))[0], channels=3).shape[1:]
    return height, width


def _require_enough(role: str, folder: str | Path, files: Mapping[str, Sequence[Path]], k: int) -> None:
    number = sum(map(len, files.values()))
    if number <= k:
        raise RequestError(role, str(folder), f"it has {number} images, k = {k} needs more than k", "Add images, or lower --k.")


def _require_baseline(
    folder: str | Path, others: Mapping[str, Mapping[str, Sequence[Path]]], size: tuple[int, int], k: int
) -> None:
    """Refuses what is no baseline of the synthetic set: its own or the real images, other classes, another size, too few."""
    files, made = image_folder(folder, field="baseline"), others["synthetic"]
    firsts = {of_class[0].resolve() for of_class in files.values()}
    for role, known in others.items():
        if firsts & {of_class[0].resolve() for of_class in known.values()}:
            raise RequestError(
                "baseline",
                str(folder),
                f"these are the {role} images themselves",
                "Name another set of the same classes, such as one generated with --guidance none.",
            )
    lacks, more = ([repr(name) for name in sorted(set(a) - set(b))] for a, b in ((made, files), (files, made)))
    if lacks or more:
        told = [f"lacks {', '.join(lacks[:5])}"] * bool(lacks) + [f"has {', '.join(more[:5])} besides"] * bool(more)
        raise RequestError(
            "baseline",
            str(folder),
            f"it has other classes than the synthetic set: it {' and '.join(told)}",
            "Generate both with the same --classes.",
        )
    _require_enough("baseline", folder, files, k)
    own = _size(files)
    if own != size:
        raise RequestError(
            "baseline",
            str(folder),
            f"its images have {own[0]} x {own[1]} pixels, the synthetic ones {size[0]} x {size[1]}",
            "Generate both at one resolution.",
        )
