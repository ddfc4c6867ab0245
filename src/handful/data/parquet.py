"""Labelled images in one parquet file, as Hugging Face `datasets` writes them.

A column `image` of {bytes, path} and a column `label` of whole numbers. What the labels are called is in the file's own
metadata (`ClassLabel`), else in the paths' folders (`cat/0631.jpg`), else nowhere: then they are called by their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from handful.data.images import LabelledImages, read_all, read_folder, read_image
from handful.errors import RequestError, first_line

_WANTED = (
    'Give a parquet file with columns "image" ({bytes, path}) and "label", as datasets writes them, or a folder per class.'
)


def read_labelled(
    source: str | Path,
    *,
    channels: int,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    field: str = "data",
) -> tuple[LabelledImages, list[str]]:
    """Reads labelled images from a parquet file, or from a folder with a folder per class.

    Args:
        source: A file `*.parquet`, else a folder (`handful.data.images.read_folder`).
        channels, size, workers: As for `read_folder`.
        limit: At most so many images of each class, the first ones.
        field: What errors call the source.

    Returns:
        The images in the source's order, (n, channels, h, w) in [-1, 1], and the classes in the order of their labels (of a
        folder: as `image_folder` lists them).

    Raises:
        RequestError: The source is of another kind, damaged, or holds an image that can't be read.
    """
    path = Path(source).expanduser()
    if path.suffix != ".parquet" or path.is_dir():
        found = read_folder(path, channels=channels, size=size, limit=limit, workers=workers, field=field)
        return found, found.classes
    images, labels, names = _columns(path, field)
    kept, counts = [], dict.fromkeys(names, 0)
    for place, name in enumerate(labels):
        counts[name] += 1
        if limit is None or counts[name] <= limit:
            kept.append(place)
    shape = size
    if shape is None:
        first = read_image(images[kept[0]][0], channels=channels, name=images[kept[0]][1])
        shape = (first.shape[1], first.shape[2])
    held = torch.empty((len(kept), channels, *shape))  # filled in place, so that nothing is held twice

    def read(index: int) -> None:
        content, name = images[kept[index]]
        image = read_image(content, channels=channels, size=size, name=name)
        if image.shape != held.shape[1:]:
            problem = f"it has {image.shape[1]} x {image.shape[2]} pixels where others have {shape[0]} x {shape[1]}"
            raise RequestError("image", name, problem, "Give the size that all shall have.")
        held[index] = image

    read_all(read, range(len(kept)), field=field, root=path, workers=workers)
    return LabelledImages(held, [labels[place] for place in kept], [Path(images[place][1]) for place in kept]), names


def _columns(path: Path, field: str) -> tuple[list[tuple[bytes, str]], list[str], list[str]]:
    """(bytes, path) of each image, the class of each, and the classes in the order of their labels."""
    try:
        # not read_table, whose threads and torch's abort the process at exit (see generate/manifest.py)
        table = pq.ParquetFile(path).read(use_threads=False)
    except FileNotFoundError:
        raise RequestError(field, path, "there is no such file", "Check the path.") from None
    except (OSError, pa.ArrowException) as error:
        raise RequestError(field, path, f"it is no whole parquet file ({first_line(error)})", _WANTED) from error
    if not {"image", "label"} <= set(table.column_names) or not len(table):
        raise RequestError(field, path, f"its {len(table)} rows have the columns {', '.join(table.column_names)}", _WANTED)
    cells: Sequence[Any] = table["image"].to_pylist()
    numbers: Sequence[Any] = table["label"].to_pylist()
    if not all(isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes) for cell in cells):
        raise RequestError(field, path, "an image has no bytes", _WANTED)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise RequestError(field, path, "a label is no whole number from 0", _WANTED)
    paths = [str(cell.get("path") or f"row {row}") for row, cell in enumerate(cells)]
    names = _names(table.schema, numbers, paths)
    contents = [(cell["bytes"], where) for cell, where in zip(cells, paths, strict=True)]
    return contents, [names[number] for number in numbers], [names[number] for number in sorted(names)]


def _names(schema: pa.Schema, numbers: Sequence[int], paths: Sequence[str]) -> dict[int, str]:
    """What each label is called."""
    found = sorted(set(numbers))
    told = (schema.metadata or {}).get(b"huggingface")
    if told:
        try:
            known = json.loads(told)["info"]["features"]["label"].get("names")
        except (ValueError, LookupError, AttributeError):
            known = None
        if isinstance(known, list) and len(known) > found[-1]:
            return {number: str(known[number]) for number in found}
    folders: dict[int, set[str]] = {number: set() for number in found}
    for number, path in zip(numbers, paths, strict=True):
        folders[number].add(PurePosixPath(path).parent.name)
    one_each = [next(iter(of_label)) for of_label in folders.values() if len(of_label) == 1]
    if len(set(one_each)) == len(found) and all(one_each):
        return dict(zip(found, one_each, strict=True))
    return {number: str(number) for number in found}
