"""Features of a set through a judge's eyes: part by part, as is and after each transform, kept by content.

What is kept lies in CACHE/judged/JUDGE/KEY.safetensors, a file for each part and view. The key is a digest of judge, view
and the contents of the images, so a second evaluation starts at once, and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from handful.core.memory import in_smaller_parts
from handful.core.ranges import any_range
from handful.data.images import write_atomically
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.files.sealed import seal, unseal
from handful.judge.audit import TRANSFORMS, Views
from handful.judge.gains import AS_IS
from handful.judge.image_sets import Images
from handful.runs.progress import Progress

_VERSION = 2  # of what is kept: raise it whenever the same file and judge give other features
_KIND = "features of a judge"


@dataclass
class Keeping:
    """Where a judge keeps features, and whom it tells how far it is.

    Attributes:
        cache: The folder, such as `handful.data.exemplars.default_cache()`; None keeps nothing.
        progress: Told of every image and view.
    """

    cache: Path | None = None
    progress: Progress = field(default_factory=Progress)


class Viewer:
    """Takes features of sets.

    Args:
        extractor: What judges.
        audit: Also after each mild transform.
        keeping: Where features are kept, and who is told.
    """

    def __init__(self, extractor: FeatureExtractor, audit: bool = True, keeping: Keeping | None = None) -> None:
        self.extractor, self.keeping = extractor, keeping or Keeping()
        self.views = [AS_IS, *(TRANSFORMS if audit else ())]

    def pending(self, images: Images, *, answers: bool) -> list[tuple[slice, list[str]]]:
        """The parts of which something is not kept yet, with the views that are missing."""

        def there(part: slice, view: str) -> bool:
            file = self._file(images, part, view, answers)
            return file is not None and file.is_file()

        asked = [(part, [view for view in self.views if not there(part, view)]) for part in images.parts()]
        return [(part, views) for part, views in asked if views]

    @torch.no_grad()
    @any_range()
    def look(self, images: Images, *, answers: bool) -> dict[str, tuple[np.ndarray, np.ndarray | None, int]]:
        """What it sees of a set.

        Args:
            images: The set.
            answers: Say how the judge, a classifier, names each image too.

        Returns:
            By view: features (n, D), the number of each image's largest logit (n,) or None, and how many logits there are.

        Raises:
            RequestError: If an image can't be read, or its features are not finite.
        """
        found: dict[str, list[dict[str, Tensor]]] = {view: [] for view in self.views}
        apply = Views()
        for part in images.parts():
            pixels = None
            for view in self.views:
                held = self._kept(images, part, view, answers)
                if held is None:
                    pixels = images.read(part) if pixels is None else pixels
                    seen = pixels if view == AS_IS else apply(view, pixels, part.start)
                    held = self._answers(seen, images.names and images.names[part], answers)
                    self._keep(images, part, view, answers, held)
                    self.keeping.progress.advance(len(pixels) / len(self.views))
                found[view].append(held)
        return {view: _joined(parts, answers) for view, parts in found.items()}

    def _answers(self, images: Tensor, names: Sequence[str] | None, answers: bool) -> dict[str, Tensor]:
        def of(size: int) -> list[dict[str, Tensor]]:
            starts = range(0, len(images), size)
            return [self._of(images[at : at + size], names and names[at : at + size], answers) for at in starts]

        parts = in_smaller_parts(of, len(images))
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "count"}
        return joined | ({"count": parts[0]["count"]} if answers else {})

    def _of(self, images: Tensor, names: Sequence[str] | None, answers: bool) -> dict[str, Tensor]:
        size = self.extractor.size
        if size and images.shape[-2:] != torch.Size(size):
            for each in ((images.shape[2], size[1]), size):  # clipped after each direction, as Pillow's bytes are
                images = interpolate(images, each, mode="bicubic", antialias=True).clamp(-1, 1)
        features = self.extractor(images).float().cpu()
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            name = names[row] if names else f"image {row}"
            problem = f"the features that {self.extractor.name} gives of it are not finite"
            raise RequestError("image", name, problem, "Remove that image, or take another judge.")
        if not answers:
            return {"features": features.contiguous()}
        logits = self.extractor.logits(images)
        largest = logits.argmax(1).cpu()
        return {"features": features.contiguous(), "largest": largest, "count": torch.tensor([logits.shape[1]])}

    def _file(self, images: Images, part: slice, view: str, answers: bool) -> Path | None:
        contents = images.key(part)
        if self.keeping.cache is None or not contents or not self.extractor.digest:
            return None
        place = part.start if view == "noise" else None  # the draws of noise depend on it
        told = json.dumps([_VERSION, self.extractor.digest, view, place, answers, contents])
        name = hashlib.sha256(told.encode()).hexdigest()
        return self.keeping.cache / "judged" / self.extractor.digest[:16] / f"{name}.safetensors"

    def _kept(self, images: Images, part: slice, view: str, answers: bool) -> dict[str, Tensor] | None:
        file = self._file(images, part, view, answers)
        if file is not None and file.is_file():
            with suppress(RequestError):  # damaged: it is made again
                return unseal(file, _KIND, _VERSION, field="cache", remedy="")[1]
        return None

    def _keep(self, images: Images, part: slice, view: str, answers: bool, held: dict[str, Tensor]) -> None:
        file = self._file(images, part, view, answers)
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, seal(_KIND, _VERSION, {}, held))
        except OSError as error:
            why = error.strerror or error
            text = f"the cache {self.keeping.cache} can't be written ({why}): an interrupted evaluation begins anew"
            warnings.warn(text, stacklevel=2)
            self.keeping.cache = None


def _joined(parts: Sequence[Mapping[str, Tensor]], answers: bool) -> tuple[np.ndarray, np.ndarray | None, int]:
    features = torch.cat([part["features"] for part in parts]).numpy()
    if not answers:
        return features, None, 0
    return features, torch.cat([part["largest"] for part in parts]).numpy(), int(parts[0]["count"])
