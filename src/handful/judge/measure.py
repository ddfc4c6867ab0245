"""From a set of generated images to a row of numbers: what a judge finds, copies, and downstream accuracy.

What `handful demo`, `handful sweep` and the benchmarks compare sets by; the row's names are everywhere the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from torch import Tensor, nn

from handful.data.images import LabelledImages
from handful.features.extractor import FeatureExtractor
from handful.files.digests import tensors_digest
from handful.judge.copies import distances, flagged, of_classes
from handful.judge.image_sets import Images, as_images
from handful.judge.judge import Judge, Seen
from handful.judge.utility import accuracy, numbered, train_classifier

Row = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """How the downstream classifiers are trained, the same for all sets that are compared; see `handful.judge.utility`.

    Attributes:
        steps: Of the optimizer.
        seeds: So many classifiers are trained on each set.
        augment, flip: Shift the training images; mirror them.
    """

    steps: int = 400
    seeds: int = 1
    augment: bool = True
    flip: bool = False


def train_on(made: LabelledImages, classes: Sequence[str], training: Training, seed: int = 0) -> list[nn.Module]:
    """Trains classifiers on a set alone.

    Args:
        made: The set.
        classes: Class names; a classifier's outputs are in their order.
        training: How.
        seed: Of the first classifier; the others take the next ones.
    """
    labels = numbered(made.labels, classes)
    return [
        train_classifier(
            made.images,
            labels,
            len(classes),
            steps=training.steps,
            augment=training.augment,
            flip=training.flip,
            seed=seed + each,
        )
        for each in range(training.seeds)
    ]


class Referee:
    """Measures many generated sets against one set of real images, whose features it takes once.

    Args:
        real: Real images, of the classes that are generated; never the exemplars. Files are read part by part.
        judge: What judges; it should be unrelated to what guides.
        k: Neighbour of precision, recall, density and coverage.
        audit: Judge again after mild transforms.
        classes, judge_class: As for `handful.judge.judge.Judge`.
        test: Real images that downstream accuracy is measured on; None: `real`, if these are in memory.
    """

    def __init__(
        self,
        real: Images | LabelledImages,
        judge: FeatureExtractor,
        *,
        k: int = 5,
        audit: bool = True,
        classes: Sequence[str] | None = None,
        judge_class: Mapping[str, str | int] | None = None,
        test: LabelledImages | None = None,
    ) -> None:
        self.real, self.classes = as_images(real), list(dict.fromkeys(real.labels))
        self.test = real if test is None and isinstance(real, LabelledImages) else test
        self.judge = Judge(
            self.real, real.labels, judge, k=k, audit=audit, ceiling=False, classes=classes, judge_class=judge_class
        )
        self._distances: dict[str, dict[str, np.ndarray]] = {}

    def see(self, made: Images | LabelledImages) -> Seen:
        """What the judge sees of a set; it serves other referees of the same judge and audit too."""
        return self.judge.see(as_images(made), made.labels)

    def row(
        self,
        made: Images | LabelledImages,
        exemplars: Mapping[str, Tensor] | None = None,
        classifiers: Sequence[nn.Module] = (),
        seen: Seen | None = None,
    ) -> Row:
        """Measures a set.

        Args:
            made: Images of the same size and channels as the real ones.
            exemplars: For each class (k, c, h, w), of the same size: what a copy would be one of; None: not measured.
            classifiers: From `train_on`, with the classes of the real images in their order.
            seen: From `see`, where it is at hand.

        Returns:
            What `Evaluation.row` says, then `copied`, `utility` (the mean over the classifiers) and `utility_spread` (their
            standard deviation; None for a single one).

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        row: Row = self.judge.judged(self.see(made) if seen is None else seen).row()
        row["copied"] = None
        if exemplars is not None:
            row["copied"] = self.copied(made, exemplars)
        found = []
        if classifiers:
            assert self.test is not None, "real images that are files need others in memory to test on"
            labels = numbered(self.test.labels, self.classes)
            found = [accuracy(network, self.test.images, labels) for network in classifiers]
        row["utility"] = fmean(found) if found else None
        row["utility_spread"] = stdev(found) if len(found) > 1 else None
        return row

    def copied(self, made: Images | LabelledImages, exemplars: Mapping[str, Tensor]) -> float:
        """The share of `made` that is nearer to an exemplar, in pixels, than 99 % of the real images are."""
        near = {name: exemplars[name].flatten(1).contiguous() for name in self.classes}
        key = tensors_digest(near)
        if key not in self._distances:
            self._distances[key] = of_classes(distances(self.real, near), self.real.labels, near)
        return float(flagged(distances(as_images(made), near), made.labels, self._distances[key]).mean())
