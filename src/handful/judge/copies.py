"""Did a generated set copy its exemplars? By pixels, against other real images (`metrics/copying.py`)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages
from handful.data.sources import labelled_files
from handful.judge.image_sets import FileImages, Images, as_images
from handful.metrics.copying import nearer
from handful.metrics.neighbours import nearest
from handful.runs.metadata import exemplars_of


class CopyCheck:
    """Exemplars and held-out real images, to hold generated sets against.

    Args:
        folder: The exemplars, by class; classes that are not asked for are left alone.
        run: The generated set. Where it is a run whose recipe drew exemplars from `folder`, those are taken; else all.
        real: Real images that are no exemplars. Those that are, byte for byte, are told in a warning.
        classes: The generated classes.

    Raises:
        RequestError: If the folder lacks a class or can't be read.
    """

    def __init__(self, folder: str | Path, run: str | Path, real: Images | LabelledImages, classes: Sequence[str]) -> None:
        listed, of_real, drawn = labelled_files(folder, classes=classes, field="exemplars"), as_images(real), exemplars_of(run)
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
        distances, labels = self._distances(of_real), np.array(of_real.labels)
        self._real = {name: distances[labels == name] for name in classes}
        places = {name: place for place, name in enumerate(listed.names)}
        taken = {listed.content(places[str(file)]) for name in classes for file in found.files[name] if str(file) in places}
        self.shared = shared(taken, real)
        if self.shared:
            warnings.warn(
                f"{self.shared} of the {len(real)} real images are exemplars, byte for byte: metrics measured on them flatter,"
                " and copies go unseen; take real images that guided nothing",
                stacklevel=3,
            )

    def __call__(self, images: Images | LabelledImages) -> np.ndarray:
        """Which images are nearer to an exemplar than 99 % of the real ones are, (n,) bool, in the images' order."""
        made = as_images(images)
        distances, labels = self._distances(made), np.array(made.labels)
        flags = np.zeros(len(made), bool)
        for name, of_real in self._real.items():
            flags[labels == name] = nearer(distances[labels == name], of_real)
        return flags

    def _distances(self, images: Images) -> np.ndarray:
        """Of each image to the nearest exemplar of its class, (n,)."""
        found = np.full(len(images), np.inf)
        for part in images.parts():
            pixels, labels = images.read(part).flatten(1), np.array(images.labels[part])
            for name in set(labels.tolist()):
                rows = np.flatnonzero(labels == name)
                found[part.start + rows] = nearest(pixels[rows], self.exemplars[name])[0]
        return found


def shared(contents: Iterable[bytes], images: Images | LabelledImages) -> int:
    """How many images have, byte for byte, the content of one of these files."""
    known = {hashlib.sha256(content).hexdigest() for content in contents}
    if isinstance(images, FileImages):
        return sum(content in known for content in images.contents)
    files = images.files if isinstance(images, LabelledImages) else []
    return sum(hashlib.sha256(file.read_bytes()).hexdigest() in known for file in files)
