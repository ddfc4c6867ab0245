"""Did a generated set copy its exemplars? By pixels, against other real images (`metrics/copying.py`)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages, image_folder
from handful.metrics.copying import copied
from handful.runs.metadata import exemplars_of


class CopyCheck:
    """Exemplars and held-out real images, to hold generated sets against.

    Args:
        folder: The exemplars, a folder per class; classes that are not asked for are left alone.
        run: The generated set. Where it is a run whose recipe drew exemplars from `folder`, those are taken; else all.
        real: Real images that are no exemplars. Those that are, byte for byte, are told in a warning.
        classes: The generated classes.
        channels: Of the images read.

    Raises:
        RequestError: If the folder lacks a class or can't be read.
    """

    def __init__(
        self, folder: str | Path, run: str | Path, real: LabelledImages, classes: Sequence[str], channels: int
    ) -> None:
        require_exemplars(folder, classes)
        drawn = exemplars_of(run)
        same = drawn is not None and drawn.folder.resolve() == Path(folder).expanduser().resolve()
        height, width = real.images.shape[-2:]
        found = Exemplars.from_folder(
            folder,
            channels=channels,
            size=(height, width),
            minimum=1,
            k=drawn.k if same and drawn else None,
            seed=drawn.seed if same and drawn else 0,
        )
        self.exemplars = {name: found.images[name].flatten(1) for name in classes}
        self.real = _pixels(real)
        self.shared = shared_files((file for name in classes for file in found.files[name]), real.files)
        if self.shared:
            warnings.warn(
                f"{self.shared} of the {len(real)} real images are exemplars, byte for byte: metrics measured on them flatter,"
                " and copies go unseen; take real images that guided nothing",
                stacklevel=3,
            )

    def __call__(self, images: LabelledImages) -> np.ndarray:
        """Which images are nearer to an exemplar than 99 % of the real ones are, (n,) bool, class after class."""
        return copied(_pixels(images), self.exemplars, self.real)


def require_exemplars(folder: str | Path, classes: Sequence[str]) -> None:
    """Raises RequestError where a folder has no images of a class."""
    image_folder(folder, classes=classes, field="exemplars")


def shared_files(some: Iterable[Path], others: Sequence[Path]) -> int:
    """How many of the other files have the content of one of some."""
    by_size: dict[int, set[str]] = {}
    for file in some:
        by_size.setdefault(file.stat().st_size, set()).add(_content(file))
    return sum(1 for file in others if (same := by_size.get(file.stat().st_size)) and _content(file) in same)


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _pixels(images: LabelledImages) -> Mapping[str, Tensor]:
    return {name: part.flatten(1) for name, part in images.by_class().items()}
