"""Pictures inside a page: as data, each once, as many as its size allows."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from handful.data.images import read_image, to_uint8
from handful.errors import RequestError
from handful.runs.writers import Writer

_WHOLE = 64  # pixels: images up to this side stay as they are
_REFUSED = 20  # pictures that did not fit, after which none is tried any more
SIDES = (160, 96, 64, 40)


class Pictures:
    """Reads image files and keeps them as data URIs, until there is no room left.

    Args:
        room: Characters of all together.
        side: Longest side of a picture in pixels.

    Attributes:
        uris: Those that were taken.
        left_out: How many found no room.
        unreadable: How many files could not be read.
    """

    def __init__(self, room: int, side: int = SIDES[0]) -> None:
        self.room, self.side = room, side
        self.uris: list[str] = []
        self._places: dict[tuple[Path, str], int] = {}
        self.left_out = self.unreadable = 0

    def add(self, root: Path, file: str) -> int:
        """The place of a picture among `uris`; -1 where there is no room, or it can't be read. `file` as manifests say it."""
        if (root, file) not in self._places:
            full = self.left_out >= _REFUSED
            uri = "" if full else data_uri(root, file, self.side)
            if full:
                self.left_out += 1
                return -1
            if uri is None:
                self.unreadable += 1
            elif len(uri) > self.room:
                self.left_out += 1
                return -1
            else:
                self.room -= len(uri)
                self.uris.append(uri)
            self._places[root, file] = -1 if uri is None else len(self.uris) - 1
        return self._places[root, file]


def fitting_side(root: Path, sample: list[str], wanted: int, room: int) -> int:
    """The largest of `SIDES` at which so many pictures like those of the sample fit."""
    for side in SIDES[:-1]:
        sizes = [len(uri) for file in sample if (uri := data_uri(root, file, side)) is not None]
        if sizes and wanted * sum(sizes) / len(sizes) <= room:
            return side
    return SIDES[-1]


def data_uri(root: Path, file: str, side: int) -> str | None:
    """A picture of an image, which may lie in a shard, as text; None where it can't be read."""
    try:
        pixels = to_uint8(read_image(_content(root, file), channels=3, name=file)).permute(1, 2, 0).contiguous().numpy()
    except (RequestError, OSError, LookupError, StopIteration):
        return None
    image = Image.fromarray(pixels)
    small = max(image.size) <= min(_WHOLE, side)
    image.thumbnail((side, side))
    if small and (pixels.min(2) == pixels.max(2)).all():
        image = image.convert("L")
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True) if small else image.save(stream, "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


@lru_cache(maxsize=64)
def _content(root: Path, file: str) -> bytes:
    return Writer().read(root, file)
