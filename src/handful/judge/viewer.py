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
from handful.features.registry import FeatureExtractor, load_extractor
from handful.files.sealed import seal, unseal
from handful.judge.audit import TRANSFORMS, Views
from handful.judge.gains import AS_IS
from handful.judge.image_sets import Images, Part
from handful.runs.processes import Processes
from handful.runs.progress import Progress

_VERSION = 2  # of what is kept: raise it whenever the same file and judge give other features
_KIND = "features of a judge"


@dataclass
class Keeping:
    """Where a judge keeps features, and what shows its progress.

    Attributes:
        cache: The folder, such as `handful.data.exemplars.default_cache()`; None keeps nothing.
        progress: Is notified of every image.
        processes: Those that look beside this one, ready with `eye` of the same judge; None: this one does all.
    """

    cache: Path | None = None
    progress: Progress = field(default_factory=Progress)
    processes: Processes | None = None

    def get(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """What `put` kept; None where nothing is, or where it is damaged."""
        if self.cache is not None and name and (file := self._file(kind, name)).is_file():
            with suppress(RequestError):
                return unseal(file, _KIND, _VERSION, field="cache", remedy="")[1]
        return None

    def put(self, kind: str, name: str, held: dict[str, Tensor]) -> None:
        """Keeps tensors in CACHE/KIND/NAME.safetensors; nothing under the name ""."""
        if self.cache is None or not name:
            return
        file = self._file(kind, name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, seal(_KIND, _VERSION, {}, held))
        except OSError as error:
            why = error.strerror or error
            text = (
                f"the cache {self.cache} can't be written ({why}): an interrupted evaluation would start again from the "
                f"beginning"
            )
            warnings.warn(text, stacklevel=2)
            self.cache = None

    def has(self, kind: str, name: str) -> bool:
        """Whether something is kept under a name."""
        return self.cache is not None and bool(name) and self._file(kind, name).is_file()

    def _file(self, kind: str, name: str) -> Path:
        assert self.cache is not None
        return self.cache / kind / f"{name}.safetensors"


@dataclass(frozen=True)
class Task:
    """A part of a set to look at: which views of it, from which place in the set; `answers` as for `Viewer.look`."""

    part: Part
    start: int
    views: list[str]
    answers: bool


class Eye:
    """A judge, and where it is in the random draws of the transforms."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor, self.apply = extractor, Views()


def eye(judge: str, digest: str) -> Eye:
    """An `Eye` for a process of its own; see `loaded_again`."""
    return Eye(loaded_again(judge, digest))


def loaded_again(name: str, digest: str, field: str = "judge") -> FeatureExtractor:
    """An extractor in a process of its own.

    Raises:
        RequestError: The one that the name loads here is another one.
    """
    extractor = load_extractor(name)
    if extractor.digest != digest:
        problem = "each process that loads it gets different weights"
        raise RequestError(field, name, problem, "Leave --workers out, or change it to load the same weights each time.")
    return extractor


@torch.no_grad()
@any_range()
def looked(here: Eye, task: Task) -> dict[str, dict[str, Tensor]]:
    """By view what a judge sees of a part."""
    pixels, found = task.part.read(), {}
    for view in task.views:
        seen = pixels if view == AS_IS else here.apply(view, pixels, task.start)
        found[view] = _answers(here.extractor, seen, task.part.names, task.answers)
    return found


class Viewer:
    """Takes features of sets.

    Args:
        extractor: What judges.
        audit: Also after each mild transform.
        keeping: Where features are kept, and who is notified.
    """

    def __init__(self, extractor: FeatureExtractor, audit: bool = True, keeping: Keeping | None = None) -> None:
        self.extractor, self.keeping = extractor, keeping or Keeping()
        self.views = [AS_IS, *(TRANSFORMS if audit else ())]

    def pending(self, images: Images, *, answers: bool) -> list[tuple[slice, list[str]]]:
        """The parts of which something is not kept yet, with the views that are missing."""
        keeping, judge = self.keeping, self._folder
        asked = [
            (part, [view for view in self.views if not keeping.has(judge, self._name(images, part, view, answers))])
            for part in images.parts()
        ]
        return [(part, views) for part, views in asked if views]

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
        plan = []
        for part in images.parts():
            names = {view: self._name(images, part, view, answers) for view in self.views}
            held = {view: self.keeping.get(self._folder, name) for view, name in names.items()}
            plan.append((part, names, held, [view for view in self.views if held[view] is None]))
        tasks = (Task(images.part(part), part.start, missing, answers) for part, _, _, missing in plan if missing)
        processes = self.keeping.processes or Processes(1, Eye, note=warnings.warn)
        seen = processes.map(looked, tasks, Eye(self.extractor))
        for part, names, held, missing in plan:
            for view, new in next(seen).items() if missing else ():
                self.keeping.put(self._folder, names[view], new)
                held[view] = new
            self.keeping.progress.advance((part.stop - part.start) * len(missing) / len(self.views))
            for view, of_part in held.items():
                assert of_part is not None
                found[view].append(of_part)
        return {view: _joined(parts, answers) for view, parts in found.items()}

    @property
    def _folder(self) -> str:
        return f"judged/{self.extractor.digest[:16]}"

    def _name(self, images: Images, part: slice, view: str, answers: bool) -> str:
        contents = images.key(part)
        if not contents or not self.extractor.digest:
            return ""
        place = part.start if view == "noise" else None  # the draws of noise depend on it
        told = json.dumps([_VERSION, self.extractor.digest, view, place, answers, contents])
        return hashlib.sha256(told.encode()).hexdigest()


def _answers(extractor: FeatureExtractor, images: Tensor, names: Sequence[str] | None, answers: bool) -> dict[str, Tensor]:
    def of(size: int) -> list[dict[str, Tensor]]:
        starts = range(0, len(images), size)
        return [_of(extractor, images[at : at + size], names and names[at : at + size], answers) for at in starts]

    parts = in_smaller_parts(of, len(images))
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "count"}
    return joined | ({"count": parts[0]["count"]} if answers else {})


def _of(extractor: FeatureExtractor, images: Tensor, names: Sequence[str] | None, answers: bool) -> dict[str, Tensor]:
    size = extractor.size
    if size and images.shape[-2:] != torch.Size(size):
        for each in ((images.shape[2], size[1]), size):  # clipped after each direction, as Pillow's bytes are
            images = interpolate(images, each, mode="bicubic", antialias=True).clamp(-1, 1)
    found, logits = extractor.features_and_logits(images) if answers else (extractor(images), None)
    features = found.float().cpu()
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        name = names[row] if names else f"image {row}"
        problem = f"{extractor.name} gives NaN or infinite features for it"
        raise RequestError("image", name, problem, "Remove that image, or use another judge.")
    if logits is None:
        return {"features": features.contiguous()}
    largest = logits.argmax(1).cpu()
    return {"features": features.contiguous(), "largest": largest, "count": torch.tensor([logits.shape[1]])}


def _joined(parts: Sequence[Mapping[str, Tensor]], answers: bool) -> tuple[np.ndarray, np.ndarray | None, int]:
    features = torch.cat([part["features"] for part in parts]).numpy()
    if not answers:
        return features, None, 0
    return features, torch.cat([part["largest"] for part in parts]).numpy(), int(parts[0]["count"])
