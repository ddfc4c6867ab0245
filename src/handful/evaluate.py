"""Judges a generated set against a real one: every metric, a ceiling beside it, and what is left after mild transforms.

The judge should share nothing with the guide: another architecture, other training (design.md, "Gain, or adversarial
gain?"). Each number is meaningless without the judge, k and n, so they travel with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from handful.audit import TRANSFORMS
from handful.errors import RequestError
from handful.features import FeatureExtractor, load_extractor
from handful.images import image_folder, read_folder, read_image
from handful.metrics import PRDC, prdc
from handful.metrics.summary import Summary, summarize


@dataclass(frozen=True)
class Evaluation:
    """What a judge found.

    Attributes:
        judge: The extractor's name, and `judge_digest` its weights and preprocessing.
        summary: Every metric, pooled and per class, with the real-against-real ceiling.
        judge_accuracy: Share of generated images that the judge names as asked; None if it is no classifier.
        transformed: Precision, recall, density, coverage and F1 (pooled) after each mild transform of both sets.
    """

    judge: str
    judge_digest: str
    summary: Summary
    judge_accuracy: float | None
    transformed: dict[str, PRDC]

    def robust(self, metric: str) -> float | None:
        """The mean of a PRDC metric over the transforms; None where the audit was left out."""
        values = [getattr(found, metric) for found in self.transformed.values()]
        return float(np.mean(values)) if values else None

    def row(self) -> dict[str, float | None]:
        """The pooled numbers, flat: a row of a table."""
        scores = self.summary.pooled.generated
        plain = {
            name: getattr(scores, name) for name in ("precision", "recall", "density", "coverage", "f1", "frechet", "vendi")
        }
        robust = {f"robust_{name}": self.robust(name) for name in ("precision", "coverage", "f1")}
        return {**plain, "judge_accuracy": self.judge_accuracy, **robust}

    def to_dict(self) -> dict[str, Any]:
        """Everything, safe for JSON."""
        return {
            "judge": self.judge, "judge_digest": self.judge_digest, **self.row(), **self.summary.to_dict(),
            "transformed": {name: asdict(found) for name, found in self.transformed.items()},
        }  # fmt: skip


class Judge:
    """Judges many generated sets against one real set, whose features it takes once.

    Args:
        images: Real, (m, c, h, w) in [-1, 1].
        labels: Their class names.
        extractor: What judges.
        k: Neighbour of precision, recall, density and coverage.
        audit: Judge again after each mild transform of real and generated images alike.
        ceiling: Measure one half of the real set against the other too.
        classes: Class names in the order of the judge's logits; None: in alphabetical order, if their number fits.
    """

    def __init__(
        self, images: Tensor, labels: Sequence[str], extractor: FeatureExtractor, *, k: int = 5, audit: bool = True,
        ceiling: bool = True, classes: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.extractor, self.k, self.ceiling = extractor, k, ceiling
        self.labels, self.classes = list(labels), list(classes or sorted(set(labels)))
        self.transforms = TRANSFORMS if audit else {}
        self.real = self.features(images)
        self.real_transformed = {name: self.features(apply(images)) for name, apply in self.transforms.items()}

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 256) -> np.ndarray:
        """Images (n, c, h, w) -> features (n, D), float32."""
        return torch.cat([self.extractor(part).float() for part in images.split(batch)]).cpu().numpy()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Sequence[str], batch: int = 256) -> float | None:
        """Share of images whose largest logit is their label; None if the judge is no classifier of these classes."""
        if not self.extractor.is_classifier:
            return None
        logits = torch.cat([self.extractor.logits(part) for part in images.split(batch)])
        if logits.shape[1] != len(self.classes):
            return None
        wanted = torch.tensor([self.classes.index(name) for name in labels])
        return float((logits.argmax(1).cpu() == wanted).double().mean())

    def __call__(self, images: Tensor, labels: Sequence[str]) -> Evaluation:
        """Judges generated images (n, c, h, w) in [-1, 1] of classes `labels`.

        Raises:
            RequestError: If the sets have different classes, or are too small for k.
        """
        summary = summarize(self.real, self.features(images), self.labels, labels, self.k, self.ceiling)
        transformed = {
            name: prdc(self.real_transformed[name], self.features(apply(images)), self.k)
            for name, apply in self.transforms.items()
        }
        return Evaluation(self.extractor.name, self.extractor.digest, summary, self.accuracy(images, labels), transformed)


def evaluate(
    synthetic: str | Path, real: str | Path, features: str, *, k: int = 5, audit: bool = True, ceiling: bool = True
) -> Evaluation:
    """Judges a folder of generated images (or a run directory) against a folder of real ones, a folder per class each.

    Real images are brought to the generated ones' size, so that both are seen alike.

    Args:
        synthetic, real: The folders. Real images must not be the exemplars: those are known to the generator.
        features: The judge, a name that `handful.features.load_extractor` knows.
        k, audit, ceiling: As for `Judge`.

    Raises:
        RequestError: If a folder, the classes or the judge do not fit; said before any feature is taken.
    """
    made, wanted = image_folder(synthetic, field="synthetic"), image_folder(real, field="real")
    missing, unknown = sorted(set(wanted) - set(made)), sorted(set(made) - set(wanted))
    if unknown:
        raise RequestError("real", str(real), f"it has no folder for {', '.join(unknown[:8])}, which {synthetic} has",
                           "Add real images of these classes, or remove the folders.")  # fmt: skip
    for field, folder, files in (("synthetic", synthetic, made), ("real", real, {c: wanted[c] for c in made})):
        if sum(map(len, files.values())) <= k:
            raise RequestError(field, str(folder), f"it has {sum(map(len, files.values()))} images, k = {k} needs more than k",
                               "Add images, or lower --k.")  # fmt: skip
    extractor = load_extractor(features)
    first = next(iter(made.values()))[0]
    channels = extractor.channels or 3
    _, height, width = read_image(first, channels=channels).shape
    generated = read_folder(synthetic, channels=channels, size=(height, width), field="synthetic")
    reference = read_folder(real, channels=channels, size=(height, width), classes=list(made), field="real")
    judge = Judge(reference.images, reference.labels, extractor, k=k, audit=audit, ceiling=ceiling, classes=sorted(wanted))
    if extractor.digest in _guides(Path(synthetic)):
        warnings.warn(f"{features} guided these images: it judges its own work; take an unrelated judge", stacklevel=2)
    if missing:
        warnings.warn(f"real classes without generated images are left out: {', '.join(missing[:8])}", stacklevel=2)
    return judge(generated.images, generated.labels)


def _guides(run: Path) -> set[str]:
    """Digests of the extractors that guided a run; empty for any other folder."""
    if not (run / "recipe.yaml").is_file():
        return set()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    provenance = recipe.get("provenance") if isinstance(recipe, dict) else None
    return set(((provenance or {}).get("features_sha256") or {}).values())
