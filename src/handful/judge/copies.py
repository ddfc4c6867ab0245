"""Did a generated set copy its exemplars? By pixels, against other real images (`metrics/copying.py`)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages
from handful.data.sources import labelled_files
from handful.judge.image_sets import FileImages, Images, as_images
from handful.judge.viewer import Keeping
from handful.metrics.copying import nearer
from handful.metrics.neighbours import nearest
from handful.runs.metadata import exemplars_of


class CopyCheck:
    """Exemplars and held-out real images, to hold generated sets against.

    Args:
        folder: The exemplars, by class; classes that are not asked for are left alone.
        run: The generated set. Where it is a run whose recipe drew exemplars from `folder`, those are taken; else all.
        real: Real images that are no exemplars. A warning counts those that are, byte for byte.
        classes: The generated classes.
        keeping: Where distances are kept.

    Raises:
        RequestError: If the folder lacks a class or can't be read.
    """

    def __init__(
        self,
        folder: str | Path,
        run: str | Path,
        real: Images | LabelledImages,
        classes: Sequence[str],
        keeping: Keeping | None = None,
    ) -> None:
        self._keeping = keeping or Keeping()
        listed, of_real, drawn = (
            labelled_files(folder, classes=classes, field="exemplars", flat=True),
            as_images(real),
            exemplars_of(run),
        )
        same = drawn is not None and drawn.folder.resolve() == Path(folder).expanduser().resolve()
        channels, height, width = of_real.shape
        found = Exemplars.from_folder(
            folder,
            channels=channels,
            size=(height, width),
            minimum=1,
            k=drawn.k if same and drawn else None,
            seed=drawn.seed if same and drawn else 0,
        )
        self.exemplars = {name: found.images[name].flatten(1) for name in classes}
        digest = hashlib.sha256()
        for name, pixels in self.exemplars.items():
            digest.update(f"{name}\n{tuple(pixels.shape)}\n".encode() + pixels.numpy().tobytes())
        self._digest = digest.hexdigest()
        self._real = of_classes(self._distances(of_real), of_real.labels, classes)
        places = {name: place for place, name in enumerate(listed.names)}
        taken = {listed.content(places[str(file)]) for name in classes for file in found.files[name] if str(file) in places}
        self.shared = shared(taken, real)
        if self.shared:
            warnings.warn(
                f"exemplars among the real images, byte for byte: {self.shared} of {len(real)}, so metrics look too good, and "
                "copies are not found. Use real images that are not exemplars",
                stacklevel=3,
            )

    def __call__(self, images: Images | LabelledImages) -> np.ndarray:
        """Which images are nearer to an exemplar than 99 % of the real ones are, (n,) bool, in the images' order."""
        made = as_images(images)
        return flagged(self._distances(made), made.labels, self._real)

    def identical(self, images: Images | LabelledImages) -> int:
        """How many images are an exemplar of their class, pixel for pixel."""
        return int((self._distances(as_images(images)) == 0).sum())

    def _distances(self, images: Images) -> np.ndarray:
        """Of each image to the nearest exemplar of its class, (n,)."""
        return np.concatenate([self._of_part(images, part) for part in images.parts()])

    def _of_part(self, images: Images, part: slice) -> np.ndarray:
        labels, contents = images.labels[part], images.key(part)
        told = json.dumps([self._digest, labels, contents])
        key = hashlib.sha256(told.encode()).hexdigest() if contents else ""
        if (held := self._keeping.get("copies", key)) is not None:
            return held["distances"].numpy()
        found = _nearest(images, part, self.exemplars)
        self._keeping.put("copies", key, {"distances": torch.from_numpy(found)})
        return found


def of_classes(distances: np.ndarray, labels: Sequence[str], classes: Iterable[str]) -> dict[str, np.ndarray]:
    """Distances (n,) by class."""
    return {name: distances[np.array(labels) == name] for name in classes}


def flagged(distances: np.ndarray, labels: Sequence[str], real: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which images, by their distances (n,), are nearer to an exemplar than 99 % of the real ones of their class, (n,) bool."""
    flags = np.zeros(len(labels), bool)
    for name, of_real in real.items():
        places = np.array(labels) == name
        flags[places] = nearer(distances[places], of_real)
    return flags


def distances(images: Images, exemplars: Mapping[str, Tensor]) -> np.ndarray:
    """Of each image to the nearest exemplar of its class, in pixels, (n,); exemplars flat (k, D), by class."""
    return np.concatenate([_nearest(images, part, exemplars) for part in images.parts()])


def _nearest(images: Images, part: slice, exemplars: Mapping[str, Tensor]) -> np.ndarray:
    classes = np.array(images.labels[part])
    pixels, found = images.read(part).flatten(1), np.full(len(classes), np.inf)
    for name in set(images.labels[part]):
        rows = np.flatnonzero(classes == name)
        found[rows] = nearest(pixels[rows], exemplars[name])[0]
    return found


def shared(contents: Iterable[bytes], images: Images | LabelledImages) -> int:
    """How many images have, byte for byte, the content of one of these files."""
    known = {hashlib.sha256(content).hexdigest() for content in contents}
    if isinstance(images, FileImages):
        return sum(content in known for content in images.contents)
    files = images.files if isinstance(images, LabelledImages) else []
    return sum(hashlib.sha256(file.read_bytes()).hexdigest() in known for file in files)
