"""One judge and one real set, for many generated sets: features taken part by part and kept, then every metric of them."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from handful.data.sources import ONLY_CLASS
from handful.errors import Note, RequestError
from handful.features.class_numbers import class_numbers
from handful.features.extractor import FeatureExtractor
from handful.judge.evaluation import Evaluation
from handful.judge.gains import AS_IS, DRAWS, Measured
from handful.judge.image_sets import Images
from handful.judge.viewer import Keeping, Viewer
from handful.metrics import catalogue
from handful.metrics.neighbours import require_neighbours
from handful.metrics.reference import Reference, Sets, draw_counts
from handful.metrics.summary import summarize


@dataclass(frozen=True, eq=False)
class Seen:
    """A labelled set as a judge sees it, by view: as is (`gains.AS_IS`) and after each transform.

    Attributes:
        labels: The images' class names.
        features: (n, D) float32.
        per_image: By the metric's name, a value for each image, (n,): whether the judge names it as its label says (left out
            where it is no classifier of these classes), and what others add.
        names: What each image is called; None where they are in memory.
    """

    labels: list[str]
    features: dict[str, np.ndarray]
    per_image: dict[str, dict[str, np.ndarray]]
    names: list[str] | None = None


class Judge:
    """Judges many generated sets against one real set, whose features, balls and Gaussian it takes once.

    Args:
        images: Real, (m, c, h, w) in [-1, 1], or `handful.judge.image_sets.Images`; or by view what the judge saw (m, D).
        labels: Their class names.
        extractor: What judges.
        k: Neighbour of precision, recall, density and coverage.
        audit: Judge again after each mild transform of real and generated images alike.
        ceiling: Measure one half of the real set against the other too.
        classes: What the judge's classes are called, by number; None: as the extractor says.
        judge_class: By class of the images, the judge's class (name or number), where neither name nor number says it.
        metrics: Names of metrics beyond the usual ones (`metrics/catalogue.py`).
        keeping: Where features are kept, and who is notified.

    Attributes:
        notes: What the user should know: why there is no accuracy.

    Raises:
        RequestError: If there are too few real images for k, or no such metric.
    """

    def __init__(
        self,
        images: Tensor | Images | Mapping[str, np.ndarray],
        labels: Sequence[str],
        extractor: FeatureExtractor,
        *,
        k: int = 5,
        audit: bool = True,
        ceiling: bool = True,
        classes: Sequence[str] | None = None,
        judge_class: Mapping[str, str | int] | None = None,
        metrics: Sequence[str] = (),
        keeping: Keeping | None = None,
    ) -> None:
        self.extractor, self.k, self.ceiling = extractor, k, ceiling
        self.viewer = Viewer(extractor, audit, keeping)
        self.labels, self.classes = list(labels), list(extractor.classes if classes is None else classes)
        self.metrics, self.notes = catalogue.chosen(metrics), []
        self._said, self._numbers = judge_class, {}
        self._real_answers: tuple[np.ndarray | None, int] = None, 0
        if judge_class:
            if not extractor.is_classifier:
                problem = f"the judge {extractor.name} is not a classifier, so it has no classes"
                remedy = "Leave it out, or use a classifier as the judge, such as --judge digits-judge."
                raise RequestError("judge_class", ", ".join(judge_class), problem, remedy)
            if self.classes:  # before the long work; without names, their number is known after it
                class_numbers(self.labels, self.classes, len(self.classes), judge_class)
        require_neighbours(len(self.labels), k, "real")
        if not isinstance(images, Mapping):
            real = images if isinstance(images, Images) else Images(images, labels)
            looked = self.viewer.look(real, answers=extractor.is_classifier)
            images = {view: features for view, (features, _, _) in looked.items()}
            self._real_answers = looked[AS_IS][1:]
        self.viewer.views = list(images)
        self.references = {view: Reference(features, k) for view, features in images.items()}

    @property
    def real(self) -> np.ndarray:
        """Features of the real images as they are, (m, D)."""
        return self.references[AS_IS].features

    def see(self, images: Tensor | Images, labels: Sequence[str]) -> Seen:
        """Takes features and names of images (n, c, h, w) in [-1, 1] of classes `labels`, as is and after each transform."""
        given = images if isinstance(images, Images) else Images(images, labels)
        seen = self.viewer.look(given, answers=self.extractor.is_classifier)
        per_image: dict[str, dict[str, np.ndarray]] = {}
        for view, (_, answers, count) in seen.items():
            per_image[view] = self._right(answers, count, labels)
        return Seen(list(labels), {view: features for view, (features, _, _) in seen.items()}, per_image, given.names)

    def sets(self, seen: Seen) -> dict[str, Sets]:
        """What the metrics are given, by view."""
        return {
            view: Sets(self.references[view], seen.features[view], seen.per_image[view], seen.names) for view in self.references
        }

    def judged(self, seen: Seen, sets: Mapping[str, Sets] | None = None) -> Evaluation:
        """Judges a set that was seen.

        Args:
            seen: From `see`.
            sets: From `sets`, where they are at hand.

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        sets = sets or self.sets(seen)
        summary = summarize(
            self.references[AS_IS],
            seen.features[AS_IS],
            self.labels,
            seen.labels,
            self.k,
            self.ceiling,
            metrics=self.metrics,
            per_image=seen.per_image[AS_IS],
            real_per_image=self._right(*self._real_answers, self.labels),
            names=seen.names,
        )
        audited = [metric for metric in self.metrics if metric.audited and metric.compared]
        transformed = {view: catalogue.measure(sets[view], audited)[0] for view in self.references if view != AS_IS}
        return Evaluation(self.extractor.name, self.extractor.digest, summary, transformed, notes=tuple(self.notes))

    def __call__(self, images: Tensor | Images, labels: Sequence[str]) -> Evaluation:
        """Judges generated images (n, c, h, w) in [-1, 1] of classes `labels`.

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        return self.judged(self.see(images, labels))

    def measured(
        self,
        seen: Seen,
        found: Evaluation,
        sets: Mapping[str, Sets] | None = None,
        *,
        stream: str,
        seed: int = 0,
        views: Sequence[str] | None = None,
    ) -> Measured:
        """A judged set with its bootstrap draws, ready for `gains.compare`.

        Args:
            seen, found, sets: The set, and what `judged` said of it.
            stream: Which of the seed's streams draws; two sets that are compared take two.
            seed: Of the draws.
            views: Only of these; None: of all.
        """
        counts = draw_counts(seen.labels, DRAWS, [seed, zlib.crc32(stream.encode())])
        sets, values = sets or self.sets(seen), found.by_view()
        draws = {
            view: {
                metric.name: metric.redraw(sets[view], counts)
                for metric in self.metrics
                if metric.redraw is not None and values[view].get(metric.name) is not None
            }
            for view in (self.references if views is None else views)
        }
        return Measured(len(seen.labels), values, draws)

    def _right(self, answers: np.ndarray | None, count: int, labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Whether the judge, a classifier, names each image as its class; {} where it is none of these classes."""
        numbers = None if answers is None else self._numbers_of(labels, count)
        return {} if numbers is None else {"judge_accuracy": answers == np.array([numbers[label] for label in labels])}

    def _numbers_of(self, labels: Sequence[str], count: int) -> dict[str, int] | None:
        """The judge's number of each class; None, with a note, where one is not certain."""
        known = list(dict.fromkeys((*self.labels, *labels)))
        key = (count, *known)
        if key not in self._numbers:
            self._numbers[key], why = class_numbers(known, self.classes, count, self._said)
            if why and known == [ONLY_CLASS] and not self._said:
                why = "the images are not in class folders, so it is not known what they should show"
            if why:
                self.notes.append(f"no accuracy: {why}")
                warnings.warn(self.notes[-1], Note, stacklevel=2)
        return self._numbers[key]
