"""Exemplars: the handful of real images, by class, and their features, kept on disk.

Which images are drawn depends on the seed and on each file's own class and name: k = 4 draws a subset of what k = 8
draws (Chamfer guidance is compared over k on nested sets), and another class or image leaves the others' order alone.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from handful.core.memory import in_smaller_parts
from handful.core.ranges import any_range, check_images
from handful.data.images import read_all, read_image
from handful.data.sources import labelled_files
from handful.errors import RequestError, RunError, counted, some_of
from handful.files.atomic import printable
from handful.files.cache import default_cache as default_cache
from handful.files.sealed import computed_once

# Part of every content hash: raise it whenever `read_image` turns the same file into other pixels. Version 2 reads TIFF, and
# PNG with a transparent colour, otherwise than version 1 did.
_READING, _OTHERS = 2, 1

# Images of each class that are no exemplars: so many serve `handful evaluate` (its 5 neighbours and one more), and so many
# `handful utility` to test on.
PER_CLASS_LEFT, FEWEST_TO_TEST = 6, 5


class Extractor(Protocol):
    """What `exemplar_features` needs of a feature extractor."""

    @property
    def digest(self) -> str:
        """Identifies weights and preprocessing."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] -> features (n, D)."""
        ...


@dataclass(frozen=True, eq=False)
class Exemplars:
    """A few real images of each class.

    Attributes:
        images: for each class (k, C, H, W), float32 in [-1, 1]; the classes may differ in k.
        files: for each class the file of each image; none where the images were given as tensors.
        hashes: for each class the content hash of each image: SHA-256 of the file's bytes, and of the size and channels
            that it was read at (of the pixels themselves, where the images were given as tensors).
        warnings: what is odd but usable, in words: images that occur twice.
    """

    images: dict[str, Tensor]
    files: dict[str, tuple[Path, ...]]
    hashes: dict[str, tuple[str, ...]]
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_folder(
        cls,
        root: str | Path,
        *,
        channels: int,
        size: tuple[int, int],
        k: int | None = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        minimum: int = 2,
        workers: int | None = None,
    ) -> Exemplars:
        """Draw exemplars from a folder of classes, or whatever else holds labelled images (`handful.data.sources`).

        Args:
            root: the folder; of images alone, they are one class `images`.
            channels, size: what the model takes; size is (height, width). See `handful.data.images.read_image`.
            k: how many of each class; None takes all. The draw of k is the first k of the draw of more.
            seed: another seed, another draw.
            classes: those that the model knows; the folder may hold fewer, but no others. None: any.
            minimum: fewest images a class may have. One alone says nothing of diversity, so 1 must be asked for.
            workers: threads to read with.

        Raises:
            RequestError: the folder is unusable, a class is unknown or has too few images, or images are unreadable.
        """
        if k is not None and k < minimum:
            raise RequestError(
                "k", k, f"at least {counted(minimum, 'exemplar')} of each class are needed", f"Raise k to {minimum}."
            )
        listed = labelled_files(root, field="exemplars", flat=True)
        _refuse_unknown(root, listed.classes, classes)
        _refuse_few(root, listed.counts, k, minimum)
        drawn = {
            name: [places[at] for at in draw_order(seed, name, [listed.names[place] for place in places])][:k]
            for name, places in listed.by_class().items()
        }
        flat = [(name, place) for name, places in drawn.items() for place in places]

        def read(index: int) -> tuple[Tensor, str]:
            place = flat[index][1]
            return read_hashed(listed.content(place), listed.names[place], channels, size)

        read_files = read_all(read, range(len(flat)), field="exemplars", root=root, workers=workers)
        images: dict[str, list[Tensor]] = {name: [] for name in drawn}
        hashes: dict[str, list[str]] = {name: [] for name in drawn}
        for (name, _), (image, content) in zip(flat, read_files, strict=True):
            images[name].append(image)
            hashes[name].append(content)
        files = {name: tuple(Path(listed.names[place]) for place in places) for name, places in drawn.items()}
        return cls(
            {name: torch.stack(of_class) for name, of_class in images.items()},
            files,
            {name: tuple(of_class) for name, of_class in hashes.items()},
            [
                *(f"exemplars: {note}" for note in listed.notes),
                *_repetitions(hashes, {name: [file.name for file in of_class] for name, of_class in files.items()}),
            ],
        )

    @classmethod
    def from_tensors(cls, images: Mapping[str, Tensor]) -> Exemplars:
        """Exemplars from images at hand: for each class (k, C, H, W) with values in [-1, 1], k at least 1.

        Raises:
            RequestError: there is no class, or a class's tensor is of another kind.
        """
        if not images:
            raise RequestError("exemplars", dict(images), "there are no classes", "Give at least one class.")
        shape = next(iter(images.values())).shape[1:]
        for name, given in images.items():
            if given.ndim != 4 or len(given) == 0 or given.shape[1] not in (1, 3) or given.shape[1:] != shape:
                remedy = "Give (k, 1 or 3, height, width) for each class, k at least 1, the same size for all classes."
                raise RequestError(f"exemplars[{name!r}]", tuple(given.shape), "this is not a set of images", remedy)
            check_images(given, f"exemplars[{name!r}]")
            if not bool((given.abs() <= 1 + 1e-4).all()):
                remedy = "Clamp them to [-1, 1]."
                raise RequestError(f"exemplars[{name!r}]", given.dtype, "the values are not all in [-1, 1]", remedy)
        # Cloned, so that what the hashes say stays true whatever the caller does next.
        kept = {
            name: given.detach().to("cpu", torch.float32, copy=True).clamp(-1, 1).contiguous() for name, given in images.items()
        }
        hashes = {name: [_pixel_hash(image) for image in of_class] for name, of_class in kept.items()}
        numbers = {name: [f"image {index}" for index in range(len(of_class))] for name, of_class in kept.items()}
        return cls(
            kept,
            dict.fromkeys(kept, ()),
            {name: tuple(of_class) for name, of_class in hashes.items()},
            _repetitions(hashes, numbers),
        )

    @property
    def classes(self) -> list[str]:
        """The class names, in order."""
        return list(self.images)

    def _repr_html_(self) -> str:
        from handful.data.notebook import html_images

        return html_images("exemplars", self.images)

    @property
    def counts(self) -> dict[str, int]:
        """How many images each class has."""
        return {name: len(of_class) for name, of_class in self.images.items()}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = next(iter(self.images.values())).shape[1:]
        return channels, height, width

    @property
    def digest(self) -> str:
        """64 hexadecimal digits for classes, images, size and channels, whatever the paths and the classes' order."""
        state = hashlib.sha256()
        for name in sorted(self.hashes):
            state.update(repr((name, self.hashes[name])).encode("utf-8", "backslashreplace"))
        return state.hexdigest()

    def select(self, k: int) -> Exemplars:
        """The first k images of each class: what a draw of k with the same seed gives.

        Raises:
            RequestError: a class has fewer.
        """
        fewest = min(self.counts.values())
        if not 1 <= k <= fewest:
            raise RequestError("k", k, f"the smallest class has {counted(fewest, 'exemplar')}", f"Take 1 to {fewest}.")
        files = {name: of_class[:k] for name, of_class in self.files.items()}
        hashes = {name: of_class[:k] for name, of_class in self.hashes.items()}
        images = {name: of_class[:k] for name, of_class in self.images.items()}
        return Exemplars(images, files, hashes, _repetitions(hashes, {name: self.called(name)[:k] for name in files}))

    def only(self, classes: Sequence[str]) -> Exemplars:
        """Those of some classes, in the order given."""
        others = tuple(f"class '{name}':" for name in self.classes if name not in classes)
        told = [text for text in self.warnings if not text.startswith(others)]
        return Exemplars(
            {name: self.images[name] for name in classes},
            {name: self.files[name] for name in classes},
            {name: self.hashes[name] for name in classes},
            told,
        )

    def called(self, name: str) -> list[str]:
        """What each image of a class is called: its file's name, or its number where it was given as a tensor."""
        return [printable(file.name) for file in self.files[name]] or [
            f"image {place}" for place in range(len(self.images[name]))
        ]

    def seen_by(self, extractor: Extractor, reduce: int, cache: Path | None) -> dict[str, Tensor]:
        """By class the features (k, D) that an extractor gives at 1/reduce of the resolution; see `exemplar_features`."""
        return exemplar_features(self.shrunk(reduce), extractor, cache)

    def shrunk(self, reduce: int) -> Exemplars:
        """The same images at 1/reduce of their resolution, by averaging squares; each content hash says so.

        Raises:
            RequestError: the resolution does not divide.
        """
        if reduce == 1:
            return self
        if reduce < 1 or self.shape[1] % reduce or self.shape[2] % reduce:
            problem = f"the images' size, {self.shape[1]} x {self.shape[2]}, is not divisible by it"
            raise RequestError("reduce", reduce, problem, "Use 1, or a common divisor of both sides.")
        images = {name: avg_pool2d(of_class, reduce) for name, of_class in self.images.items()}
        hashes = {
            name: tuple(hashlib.sha256(f"{each}/{reduce}".encode()).hexdigest() for each in of_class)
            for name, of_class in self.hashes.items()
        }
        return Exemplars(images, self.files, hashes, self.warnings)


def read_hashed(data: bytes, name: str | Path, channels: int, size: tuple[int, int]) -> tuple[Tensor, str]:
    """An image (`handful.data.images.read_image`), called `name` in errors, and its `content_hash`.

    Raises:
        RequestError: As `read_image`.
    """
    return read_image(data, channels=channels, size=size, name=name), content_hash(data, channels, size)


def content_hash(data: bytes, channels: int, size: tuple[int, int]) -> str:
    """SHA-256 of an image file's content and of the size and channels that it is read at; nothing is decoded."""
    reading = _READING if data[:2] in (b"II", b"MM") or b"tRNS" in data[:4096] else _OTHERS
    target = f"handful {reading} {channels} {size[0]} {size[1]} ".encode()
    return hashlib.sha256(target + hashlib.sha256(data).digest()).hexdigest()


def drawn_files(by_class: Mapping[str, Sequence[Path]], k: int | None, seed: int) -> dict[str, list[Path]]:
    """Of each class's files the k that are drawn (None: all), in the order of the draw."""
    return {name: [found[at] for at in draw_order(seed, name, found)][:k] for name, found in by_class.items()}


def draw_order(seed: int, class_name: str, files: Sequence[str | Path]) -> list[int]:
    """The places of a class's files in the order of the draw, which their class and names alone decide."""
    return sorted(range(len(files)), key=lambda place: _draw(seed, class_name, Path(files[place]).name))


def _draw(seed: int, class_name: str, file: str) -> str:
    """A file's place in the draw: a hash as its lottery number. NFC, since macOS spells accents its own way."""
    name = unicodedata.normalize("NFC", f"{seed}/{class_name}/{file}")
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _pixel_hash(image: Tensor) -> str:
    return hashlib.sha256(f"pixels {tuple(image.shape)} ".encode() + image.numpy().tobytes()).hexdigest()


def _refuse_unknown(root: str | Path, found: list[str], known: Sequence[str] | None) -> None:
    unknown = [name for name in found if known is not None and name not in known]
    if unknown and known is not None:
        listed = some_of(map(repr, unknown))
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = (
            f"Did you mean '{close[0]}'?"
            if close
            else f"The model has {counted(len(known), 'class')}, the first is '{known[0]}'."
        )
        problem = f"the model does not have class {listed}"
        raise RequestError("exemplars", Path(root), problem, f"{hint} Rename the folder or remove it.")


def _refuse_few(root: str | Path, counts: dict[str, int], k: int | None, minimum: int) -> None:
    needed = minimum if k is None else k
    few = {name: count for name, count in counts.items() if count < needed}
    if not few:
        return
    listed = ", ".join(f"'{name}' has {count}" for name, count in list(few.items())[:5])
    more = f" and {counted(len(few) - 5, 'more class')} with too few" if len(few) > 5 else ""
    fewest = min(few.values())
    if fewest >= minimum:
        remedy = f"Lower k to {fewest}, or add images."
    elif fewest == 1 and minimum == 2:
        remedy = "Add images: at least 2 are needed; or use one exemplar per class (--k 1)."
    else:
        remedy = f"Add images: at least {minimum} are needed."
    problem = f"class {listed}{more}; {counted(needed, 'exemplar')} of each are needed"
    raise RequestError("exemplars", Path(root), problem, remedy)


def _repetitions(hashes: Mapping[str, Sequence[str]], shown: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each image that occurs more than once in its class."""
    told = []
    for name, of_class in hashes.items():
        places: dict[str, list[str]] = {}
        for content, label in zip(of_class, shown[name], strict=True):
            places.setdefault(content, []).append(label)
        same = [" = ".join(labels) for labels in places.values() if len(labels) > 1]
        told += [f"class '{name}': the same image more than once: {labels}" for labels in same]
    return told


def exemplar_features(exemplars: Exemplars, extractor: Extractor, cache: Path | None, *, batch: int = 32) -> dict[str, Tensor]:
    """The features of all exemplars, from the cache where it holds them.

    A file a class, `cache/features/EXTRACTOR/CONTENT.safetensors`, named by the extractor's digest and by the images'
    content hashes (which include size and channels); see `computed_once`.

    Args:
        exemplars: the images.
        extractor: called without gradients, on the device of its own weights where it has some.
        cache: such as `default_cache()`; None keeps nothing.
        batch: images to a call.

    Returns:
        For each class (k, D), float32 on the CPU, in the order of the images.

    Raises:
        RunError: the extractor gives something else than finite (n, D).
    """
    return {name: _class_features(exemplars, name, extractor, cache, batch) for name in exemplars.classes}


def _class_features(exemplars: Exemplars, name: str, extractor: Extractor, cache: Path | None, batch: int) -> Tensor:
    identity = "\n".join((extractor.digest, *exemplars.hashes[name]))
    key = hashlib.sha256(identity.encode()).hexdigest()
    # A digest is hexadecimal by custom only: what a path cannot hold is replaced, and the key tells such digests apart.
    prefix = re.sub(r"[^\w-]", "_", extractor.digest)[:16] or "_"
    tensors = computed_once(
        lambda: {"features": _extract(exemplars.images[name], extractor, batch)}, key, cache, f"features/{prefix}"
    )
    return tensors["features"]


@torch.no_grad()
def _extract(images: Tensor, extractor: Extractor, batch: int) -> Tensor:
    weights = [*extractor.parameters(), *extractor.buffers()] if isinstance(extractor, nn.Module) else []
    device = weights[0].device if weights else images.device

    def of(chunk: Tensor) -> Tensor:
        part = extractor(chunk.to(device))
        if part.ndim != 2 or len(part) != len(chunk) or not bool(torch.isfinite(part).all()):
            what = f"{tuple(part.shape)}" + ("" if bool(torch.isfinite(part).all()) else " with NaN or infinite values")
            raise RunError(f"The feature extractor gave {what} for {counted(len(chunk), 'image')}, not finite (n, D) features.")
        return part.float().cpu()

    with any_range():  # exemplars are in [-1, 1]
        return in_smaller_parts(lambda size: torch.cat([of(chunk) for chunk in images.split(size)]), batch)
