"""Labelled images wherever they lie, listed before one is read: `labelled_files`.

A folder with a folder per class, a run directory of handful, a flat folder, parquet, WebDataset's tar shards, zip, a CSV of
file and label, or GeoDE and DollarStreet as they are published (`geode:DIR`, `dollarstreet:DIR`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from handful.data.archives import Listed, csv_images, parquet_images, shards_in, tar_images, zip_images
from handful.data.images import EXTENSIONS, LabelledImages, image_folder, list_images, open_file, read_alike, read_image
from handful.data.regions import LAYOUTS, region_images
from handful.errors import RequestError, counted

ONLY_CLASS = "images"  # what the one class of a flat folder is called, as plan's
_FILES: Mapping[str, Callable[[Path, str], Listed]] = {
    ".parquet": lambda path, field: parquet_images([path], field),
    ".tar": lambda path, field: tar_images([path], field),
    ".zip": zip_images,
    ".csv": csv_images,
}


@dataclass(frozen=True, eq=False)
class LabelledFiles(Listed):
    """Images with their classes, not read yet, and the `root` that they lie in."""

    root: Path = Path()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        found = Counter(self.labels)
        return {name: found[name] for name in self.classes}

    def by_class(self) -> dict[str, list[int]]:
        """The places of each class's images."""
        places: dict[str, list[int]] = {name: [] for name in self.classes}
        for place, name in enumerate(self.labels):
            places[name].append(place)
        return places

    def only(self, places: Sequence[int]) -> LabelledFiles:
        """Those at some places, in the order given; classes without one are dropped."""
        labels = [self.labels[place] for place in places]
        kept = [name for name in self.classes if name in set(labels)]
        return replace(
            self,
            names=[self.names[place] for place in places],
            labels=labels,
            classes=kept,
            content=lambda index: self.content(places[index]),
            columns={name: [values[place] for place in places] for name, values in self.columns.items()},
            prompts={name: self.prompts[name] for name in kept if name in self.prompts},
        )

    def first(self, limit: int | None) -> LabelledFiles:
        """At most so many images of each class, the first ones."""
        return self if limit is None else self.only([place for found in self.by_class().values() for place in found[:limit]])

    def image(self, place: int, *, channels: int, size: tuple[int, int] | None = None, squeeze: bool = False) -> Tensor:
        """One image (channels, h, w) in [-1, 1]; see `handful.data.images.read_image`.

        Raises:
            RequestError: It can't be read.
        """
        return read_image(self.content(place), channels=channels, size=size, name=self.names[place], squeeze=squeeze)

    def read(
        self, *, channels: int, size: tuple[int, int] | None = None, workers: int | None = None, field: str = "data"
    ) -> LabelledImages:
        """Reads all; without a size all must have the same.

        Raises:
            RequestError: All unusable images are reported together.
        """
        read = partial(self.image, channels=channels, size=size)
        held = read_alike(read, self.names, channels, size, field=field, root=self.root, workers=workers)
        return LabelledImages(held, self.labels, [Path(name) for name in self.names])


def labelled_files(
    source: str | Path, *, classes: Sequence[str] | None = None, field: str = "data", flat: bool = False
) -> LabelledFiles:
    """Lists labelled images; reads none of them.

    Args:
        source: A folder with a folder per class; a run directory; a folder of parquet or tar shards, or one such file; a zip;
            a CSV; `geode:DIR`, `dollarstreet:DIR` (`handful.data.regions`). `~` is understood.
        classes: Only these, in this order; None: all.
        flat: Take images that lie in no class folder too, as one class `images`.

    Raises:
        RequestError: It holds no such images, is damaged, or a class is missing.
    """
    kind, path, each = split_source(source, field)
    if kind:
        return _of_listed(Path(source), region_images(kind, path, each, field), classes, field, flat)
    if path.suffix.lower() in _FILES and not path.is_dir():
        if not path.is_file():
            raise RequestError(field, path, "there is no such file", "Check the path.")
        return _of_listed(path, _FILES[path.suffix.lower()](path, field), classes, field, flat)
    is_run = (path / "recipe.yaml").is_file() and (path / "images").is_dir()
    if path.is_dir() and not is_run and not _has_classes(path):
        for suffix, listing in ((".parquet", parquet_images), (".tar", tar_images)):
            if shards := shards_in(path, suffix):
                return _of_listed(path, listing(shards, field), classes, field, flat)
        if flat and (found := list_images(path)):
            return _of_files(path, {ONLY_CLASS: found}, overlooked(path, {}))
    return _of_files(path, found := image_folder(path, classes=classes, field=field), overlooked(path, found))


def split_source(source: str | Path, field: str = "data") -> tuple[str, Path, int | None]:
    """`geode:DIR@180` -> "geode", DIR, 180; of any other source "", its path, None.

    Raises:
        RequestError: What follows the @ is no number of images.
    """
    kind, colon, rest = str(source).partition(":")
    if not colon or kind not in LAYOUTS:
        return "", Path(source).expanduser(), None
    folder, at, count = rest.rpartition("@")
    if not at or Path(rest).expanduser().exists():
        return kind, Path(rest).expanduser(), None
    if not count.isdecimal() or int(count) < 1:
        problem, remedy = "the text after @ is no number of images", f"Write {kind}:{folder}@180, or {kind}:{folder}."
        raise RequestError(field, str(source), problem, remedy)
    return kind, Path(folder).expanduser(), int(count)


def absolute_source(source: str | Path, base: Path) -> str:
    """A source with its path made absolute: relative ones are relative to `base`."""
    kind, path, each = split_source(source)
    return (f"{kind}:" if kind else "") + os.path.abspath(base / path) + ("" if each is None else f"@{each}")


def read_labelled(
    source: str | Path,
    *,
    channels: int,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    field: str = "data",
) -> tuple[LabelledImages, list[str]]:
    """Reads labelled images, whatever holds them (`labelled_files`).

    Args:
        limit: At most so many images of each class, the first ones.

    Returns:
        The images in the source's order, (n, channels, h, w) in [-1, 1], and the classes in the order of their labels.

    Raises:
        RequestError: The source is of another kind, damaged, or holds an image that can't be read.
    """
    listed = labelled_files(source, field=field)
    kept = sorted(place for places in listed.by_class().values() for place in places[:limit])
    return listed.only(kept).read(channels=channels, size=size, workers=workers, field=field), listed.classes


def overlooked(root: str | Path, files: Mapping[str, Sequence[Path]]) -> list[str]:
    """What lies in a folder of images and is no image of a class, in words: nothing is left out in silence.

    Args:
        files: By class, from `image_folder`; {}: the images lie in the root itself.
    """
    root = Path(root).expanduser()
    notes, others = [], Counter[str]()
    folders = [of_class[0].parent for of_class in files.values() if of_class] or [root]
    if files and (beside := len(list_images(folders[0].parent))):
        notes.append(f"left out: {counted(beside, 'image')} in '{folders[0].parent}' itself, in no class folder")
    for folder in folders:
        images = {path.name for path in list_images(folder)}
        for path in folder.iterdir():
            if path.name.startswith(".") or path.name in images or path.stem.lower() == "metadata":
                continue
            if path.is_dir():
                inner = sum(1 for each in path.rglob("*") if each.suffix.lower() in EXTENSIONS)
                if inner and path.name != "__MACOSX":
                    where = "inside a class" if files else "below it"
                    notes.append(f"left out: {counted(inner, 'image')} in the folder '{path}' {where}")
            elif path.name.lower() not in ("thumbs.db", "desktop.ini"):
                others[path.suffix.lower() or "no suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"left out: {counted(sum(others.values()), 'file')} in '{root}' without an image's suffix ({kinds})")
    return notes


def _has_classes(root: Path) -> bool:
    return any(path.is_dir() and not path.name.startswith(".") and list_images(path) for path in root.iterdir())


def _of_files(root: Path, found: Mapping[str, Sequence[Path]], notes: list[str]) -> LabelledFiles:
    files = [file for of_class in found.values() for file in of_class]
    labels = [name for name, of_class in found.items() for _ in of_class]

    def content(place: int) -> bytes:
        with open_file(files[place]) as stream:
            return stream.read()

    return LabelledFiles([str(file) for file in files], labels, list(found), content, notes, root=root)


def _of_listed(root: Path, listed: Listed, classes: Sequence[str] | None, field: str, flat: bool) -> LabelledFiles:
    if "" in listed.classes:
        if len(listed.classes) > 1 or not flat:
            lie = listed.labels.count("")
            raise RequestError(field, root, f"its images ({lie}) are not in class folders", "Put them into a folder per class.")
        listed = Listed(listed.names, [ONLY_CLASS] * len(listed.labels), [ONLY_CLASS], listed.content)
    whole = LabelledFiles(**vars(listed), root=root)
    if classes is None:
        return whole
    places = whole.by_class()
    missing = [name for name in classes if not places.get(name)]
    if missing:
        held = ", ".join(whole.classes[:5])
        raise RequestError(field, root, f"there is no image of class '{missing[0]}'", f"It holds {held}.")
    return whole.only([place for name in classes for place in places[name]])
