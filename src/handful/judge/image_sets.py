"""Sets of images as a judge takes them: part by part, so that memory holds one part however large a set is.

A set is in memory, or a list of files (`handful.data.sources`). Files are looked at before any is judged: their contents are
hashed (features are kept by content), their sizes are read, and those that were never judged are decoded once.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from handful.core.ranges import check_images
from handful.data.images import LabelledImages, read_all, read_image
from handful.data.sources import LabelledFiles
from handful.errors import RequestError

_VALUES = 1 << 24  # of a part, in float32: 64 MiB
_MOST = 256
_STEP = 16  # parts are multiples of it: so random noise drawn part by part is that of the whole (`audit.Views`)
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # EXIF: these exchange width and height


@dataclass(frozen=True)
class Part:
    """Some images of a set, as they go to whatever looks at them, in another process too.

    Attributes:
        names: What each is called; None: nothing.
        pixels: (b, c, h, w) in [-1, 1]; None: they are in `contents`.
        contents: The files' bytes.
        channels, size, squeeze, field, root: What these are read as, and what errors call them.
    """

    names: list[str] | None
    pixels: Tensor | None = None
    contents: Sequence[bytes] = ()
    channels: int = 3
    size: tuple[int, int] = (0, 0)
    squeeze: bool = False
    field: str = "images"
    root: Path = Path()

    def read(self) -> Tensor:
        """The images, (b, c, h, w) in [-1, 1].

        Raises:
            RequestError: Some can't be read; all of them are reported together.
        """
        if self.pixels is not None:
            return self.pixels

        def one(place: int) -> Tensor:
            name = self.names[place] if self.names else None
            return read_image(self.contents[place], channels=self.channels, size=self.size, squeeze=self.squeeze, name=name)

        return torch.stack(read_all(one, range(len(self.contents)), field=self.field, root=self.root))


class Images:
    """A labelled set in memory, (n, c, h, w) in [-1, 1].

    Args:
        images: The set.
        labels: The class of each.
        names: What each is called; None: nothing.

    Raises:
        RequestError: If they can't be in [-1, 1] (`handful.core.ranges.check_images`); files' bytes prove that they are.
    """

    def __init__(self, images: Tensor, labels: Sequence[str], names: Sequence[str] | None = None) -> None:
        self._images = check_images(images) if names is None else images
        self.labels, self.names = list(labels), None if names is None else list(names)
        self.shape: tuple[int, int, int] = tuple(images.shape[1:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self) -> Iterator[slice]:
        """Which images come together; it depends on nothing but their shape and number."""
        channels, height, width = self.shape
        size = max(_STEP, min(_MOST, _VALUES // (channels * height * width) // _STEP * _STEP))
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def part(self, part: slice) -> Part:
        """Some of them, to be read where they are looked at."""
        return Part(self.names and self.names[part], self._images[part])

    def read(self, part: slice) -> Tensor:
        """A part, (b, c, h, w) in [-1, 1]."""
        return self.part(part).read()

    def key(self, part: slice) -> str:
        """What identifies a part's images, to keep what was found of them; "" keeps nothing."""
        return ""


class FileImages(Images):
    """A set of image files, each cropped to one aspect ratio and resized once, from its own size.

    Args:
        files: The files.
        field: What errors call the set.

    Raises:
        RequestError: A file can't be opened; all of them are reported together.
    """

    def __init__(self, files: LabelledFiles, field: str) -> None:
        self.files, self.field, self.labels, self.names = files, field, files.labels, files.names

        def look(place: int) -> tuple[str, tuple[int, int]]:
            data = files.content(place)
            return hashlib.sha256(data).hexdigest(), _own_size(data, files.names[place])

        looked = read_all(look, range(len(files)), field=field, root=files.root)
        self.contents = [content for content, _ in looked]
        self.sizes = Counter(size for _, size in looked)
        self._sizes = [size for _, size in looked]
        self.shape, self.squeeze = (3, 0, 0), False

    def seen_as(self, channels: int, size: tuple[int, int], squeeze: bool = False) -> FileImages:
        """Says what each is read as (see `handful.data.images.read_image`); returns itself."""
        self.shape, self.squeeze = (channels, *size), squeeze
        return self

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width of most images; of equals the first."""
        return self.sizes.most_common(1)[0][0]

    @property
    def has_colours(self) -> bool:
        """Whether one of the first images is in colour; what can't be read is not."""
        for place in range(min(4, len(self))):
            with suppress(RequestError):
                red, green, blue = read_image(self.files.content(place), channels=3)
                if not (torch.equal(red, green) and torch.equal(green, blue)):
                    return True
        return False

    def cropped(self, size: tuple[int, int]) -> int:
        """How many images lose more than rounding when they are cropped to the aspect ratio of a size."""
        return sum(abs(h * size[1] - w * size[0]) > max(size) for h, w in self._sizes)

    def part(self, part: slice) -> Part:
        channels, *size = self.shape
        places, root = range(len(self))[part], self.files.root
        contents = read_all(self.files.content, places, field=self.field, root=root)
        return Part(self.files.names[part], None, contents, channels, (size[0], size[1]), self.squeeze, self.field, root)

    def check(self, parts: Sequence[slice]) -> None:
        """Decodes every image of some parts, and forgets it: a damaged one must not be found after hours.

        Raises:
            RequestError: Some can't be read; all of them are reported together.
        """

        def decode(place: int) -> None:
            read_image(self.files.content(place), channels=1, name=self.names[place] if self.names else None)

        places = [place for part in parts for place in range(len(self))[part]]
        read_all(decode, places, field=self.field, root=self.files.root)

    def key(self, part: slice) -> str:
        text = "\n".join([repr(self.shape), *(["squeezed"] if self.squeeze else []), *self.contents[part]])
        return hashlib.sha256(text.encode()).hexdigest()


def as_images(images: Images | LabelledImages) -> Images:
    """A set as a judge takes it."""
    if isinstance(images, LabelledImages):
        return Images(images.images, images.labels, [str(file) for file in images.files])
    return images


def common_size(
    judge: tuple[int, int] | None, made: FileImages | tuple[int, int], others: Sequence[FileImages]
) -> tuple[tuple[int, int], str]:
    """The size that all images are read at, and what the user should know of it; "" where all have one size.

    Args:
        judge: The judge's own input size; None where it takes any.
        made: The generated set, or the one size that its images will have.
        others: The real images, and the baselines.

    Returns:
        Height and width: the one that all images have; else the judge's own; else the usual one of the generated set.
    """
    sets = [each for each in (made, *others) if isinstance(each, FileImages)]
    usual, own = (made.usual_size, Counter()) if isinstance(made, FileImages) else (made, Counter([made]))
    sizes = sum((each.sizes for each in sets), own)
    if len(sizes) == 1:
        return next(iter(sizes)), ""
    size, whose = (judge, "the judge's size") if judge else (usual, "the most common size of the generated set")
    shown = ", ".join(f"{count} of {h} x {w}" for (h, w), count in sizes.most_common(4))
    more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
    note = f"images of several sizes ({shown}{more}): all are resized to {size[0]} x {size[1]}, {whose}"
    cropped = sum(each.cropped(size) for each in sets)
    return size, note + (f"; {cropped} of them are cropped to its aspect ratio" if cropped else "")


def _own_size(data: bytes, name: str | Path) -> tuple[int, int]:
    """Height and width by the header, upright."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # Pillow turns a TIFF's size when it opens it
            lying = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _LYING
    except Exception:  # `read_image` knows what is wrong with it, and which formats are taken
        _, height, width = read_image(data, channels=1, name=name).shape
        return height, width
    if height * width == 0:
        raise RequestError("image", name, "it has no pixels", "Replace the file or remove it.")
    return (width, height) if lying else (height, width)
