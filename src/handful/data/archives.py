"""Labelled images in files of many: parquet and WebDataset's tar shards, zip, and tables (CSV) of file and label.

Each reader lists what is there, and gives the bytes of one image when it is asked for. Nothing is unpacked onto the disk, so
a name in an archive can lead nowhere.
"""

from __future__ import annotations

import csv
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from handful.data.images import EXTENSIONS, natural_order, open_file
from handful.errors import RequestError, first_line

_PARQUET = 'Give parquet with columns "image" ({bytes, path}) and "label", as datasets writes them, or a folder per class.'
_LARGEST = 2**30  # bytes of one image in an archive; more is a bomb
_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "class")
_FILES = ("file", "file_name", "filename", "path", "filepath", "image")


@dataclass(frozen=True, eq=False)
class Listed:
    """What lies in an archive, a folder or a table; nothing is read yet.

    Attributes:
        names: What each image is called: its path, or its name in an archive.
        labels: The class of each.
        classes: In order: of a folder as `image_folder` lists them, of numbered labels by number.
        content: The bytes of the image at a place; may be called from threads.
        notes: What lies there and is left out, in words for the user.
        columns: What else is known of each image, such as its region.
        prompts: By class, where the source says how a model is asked for it.
    """

    names: list[str]
    labels: list[str]
    classes: list[str]
    content: Callable[[int], bytes]
    notes: list[str] = field(default_factory=list)
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)


def read_table(path: Path, field: str) -> list[dict[str, Any]]:
    """The rows of a CSV with a header, in UTF-8, with or without its mark.

    Raises:
        RequestError: It can't be read, or is in another encoding.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    except UnicodeDecodeError as error:
        wrong = f"it is not UTF-8 (byte 0x{error.object[error.start]:02x})"
        remedy = "Save it as CSV in UTF-8. To convert a file with Windows' encoding: iconv -f CP1252 -t UTF-8 OLD.csv > NEW.csv"
        raise RequestError(field, path, wrong, remedy) from None
    except OSError as error:
        raise RequestError(field, path, f"it can't be read ({error.strerror or error})", "Check the path.") from None
    except csv.Error as error:
        raise RequestError(field, path, f"it can't be read as CSV ({error})", "Save it as CSV in UTF-8.") from None


def parquet_images(shards: Sequence[Path], field: str) -> Listed:
    """Rows of {image: {bytes, path}, label}. One row group at a time is in memory.

    What the labels are called is in the files' own metadata (`ClassLabel`), or the labels are texts, else it is in the paths'
    folders (`cat/0631.jpg`), else nowhere: then they are called by their numbers.

    Raises:
        RequestError: A file is of another kind or damaged.
    """
    opened = [_parquet(path, field) for path in shards]
    places: list[tuple[int, int, int]] = []  # shard, row group, row
    numbers: list[Any] = []
    paths: list[str] = []
    for shard, (path, file, image, label) in enumerate(opened):
        for group in range(file.num_row_groups):
            # use_threads=False: pyarrow's thread pool and torch's abort the process at exit (see runs/manifest.py)
            table = file.read_row_group(group, columns=[label, f"{image}.path"], use_threads=False)
            numbers += table[label].to_pylist()
            cells = table[image].to_pylist() if image in table.column_names else [{}] * len(table)
            first = len(paths)
            paths += [str((cell or {}).get("path") or f"row {first + row}") for row, cell in enumerate(cells)]
            places += [(shard, group, row) for row in range(len(table))]
        if not len(numbers):
            raise RequestError(field, path, "it has no rows", _PARQUET)
    if not all(isinstance(number, str) or (isinstance(number, int) and number >= 0) for number in numbers):
        raise RequestError(field, shards[0], "a label is neither text nor a whole number of 0 or more", _PARQUET)
    named = _label_names(opened[0][1].schema_arrow, opened[0][3], numbers, paths)
    lock, held = Lock(), {}

    def content(place: int) -> bytes:
        shard, group, row = places[place]
        path, file, image, _ = opened[shard]
        with lock:
            if (shard, group) not in held:
                held.clear()
                held[shard, group] = file.read_row_group(group, columns=[image], use_threads=False)[image]
            cell = held[shard, group][row].as_py()
        found = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
        if found is None and not isinstance(cell, bytes) and (cell or {}).get("path"):  # datasets embeds only what it uploads
            with open_file(path.parent / cell["path"]) as stream:
                found = stream.read()
        if not isinstance(found, bytes):
            raise RequestError("image", f"{path.name}: {paths[place]}", "it has no bytes", _PARQUET)
        return found

    return Listed(paths, [named[number] for number in numbers], list(dict.fromkeys(named.values())), content)


def _parquet(path: Path, field: str) -> tuple[Path, pq.ParquetFile, str, str]:
    """The file, and its columns of images and of labels."""
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise RequestError(field, path, "there is no such file", "Check the path.") from None
    except (OSError, pa.ArrowException) as error:
        raise RequestError(field, path, f"it is not a complete parquet file ({first_line(error)})", _PARQUET) from error
    names = file.schema_arrow.names
    image, label = (next((name for name in known if name in names), None) for known in (_IMAGES, _LABELS))
    if image is None or label is None:
        raise RequestError(field, path, f"its columns are {', '.join(names)}", _PARQUET)
    kind = file.schema_arrow.field(image).type
    if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise RequestError(field, path, f"its images are {kind}, without the images' bytes", _PARQUET)
    return path, file, image, label


def _label_names(schema: pa.Schema, column: str, numbers: Sequence[Any], paths: Sequence[str]) -> dict[Any, str]:
    """What each label is called, in the labels' order."""
    found = sorted(set(numbers), key=lambda number: natural_order(number) if isinstance(number, str) else number)
    if isinstance(found[0], str):
        return {name: name for name in found}
    told = (schema.metadata or {}).get(b"huggingface")
    if told:
        try:
            known = json.loads(told)["info"]["features"][column].get("names")
        except (ValueError, LookupError, AttributeError):
            known = None
        if isinstance(known, list) and len(known) > found[-1]:
            return {number: str(known[number]) for number in found}
    folders: dict[Any, set[str]] = {number: set() for number in found}
    for number, path in zip(numbers, paths, strict=True):
        folders[number].add(PurePosixPath(path).parent.name)
    one_each = [next(iter(of_label)) for of_label in folders.values() if len(of_label) == 1]
    if len(set(one_each)) == len(found) and all(one_each):
        return dict(zip(found, one_each, strict=True))
    return {number: str(number) for number in found}


def zip_images(path: Path, field: str) -> Listed:
    """A zip of class folders, or of one folder that holds them; of images alone they have the class "".

    Raises:
        RequestError: It is no zip, damaged, locked by a password, or holds no images.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise RequestError(field, path, f"it is not a complete zip file ({first_line(error)})", "Pack it again.") from error
    entries, lock = [entry for entry in archive.infolist() if _is_image(entry.filename)], Lock()
    if any(entry.flag_bits & 1 for entry in entries):
        raise RequestError(field, path, "a password is needed to read it", "Unpack it, and give the folder.")

    def content(entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > _LARGEST:
            raise RequestError("image", entry.filename, f"it claims {entry.file_size:,} bytes", "Remove it from the zip.")
        try:
            with lock:
                return archive.read(entry)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise RequestError("image", entry.filename, f"it is damaged ({first_line(error)})", "Pack it again.") from error

    return _by_folder(path, {entry.filename: entry for entry in entries}, content, field)


def tar_images(shards: Sequence[Path], field: str) -> Listed:
    """WebDataset's shards: KEY.png beside KEY.cls (a number or a name) or KEY.json (class or label); else class folders.

    Raises:
        RequestError: A file is no plain tar, damaged, or holds no images.
    """
    images: dict[str, tuple[Path, tarfile.TarInfo]] = {}
    told: dict[str, tuple[int, str]] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                    key = f"{shard.name}:{member.name[: len(member.name) - len(suffix) - 1] if stem else member.name}"
                    if _is_image(member.name):
                        images[f"{shard.name}:{member.name}"] = shard, member
                    elif suffix.lower() in ("cls", "json") and member.size < 2**20:
                        stream = archive.extractfile(member)
                        label = _told_label(suffix.lower(), stream.read() if stream else b"")
                        if label is not None:  # a JSON names the class, a .cls alone numbers it
                            told[key] = max(told.get(key, label), label)
        except (OSError, tarfile.TarError) as error:
            problem = f"it is not a complete tar file ({first_line(error)})"
            raise RequestError(
                field, shard, problem, "Give plain .tar files; decompress .tar.gz and the like first."
            ) from error
    lock = Lock()

    def content(found: tuple[Path, tarfile.TarInfo]) -> bytes:
        shard, member = found
        with lock, shard.open("rb") as stream:
            stream.seek(member.offset_data)
            return stream.read(min(member.size, _LARGEST))

    classes = {}
    for name, (_, member) in images.items():
        known = told.get(_without_suffix(name))
        classes[name] = known[1] if known else PurePosixPath(member.name).parent.name
    return _by_folder(shards[0], images, content, field, classes)


def _without_suffix(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    if not slash:
        folder, slash, file = name.rpartition(":")
    return folder + slash + file.partition(".")[0]


def _told_label(suffix: str, content: bytes) -> tuple[int, str] | None:
    """(how specific it is, the class)."""
    text = content.decode("utf-8", "replace").strip()
    if suffix == "cls":
        return (0, text) if text else None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    found = next((data[key] for key in _LABELS[::-1] if key in data), None) if isinstance(data, dict) else None
    return None if found is None else (1, str(found))


def csv_images(path: Path, field: str) -> Listed:
    """A table with a header, a column of files (relative to the table) and one of labels.

    Raises:
        RequestError: A column is missing, or a row names no file.
    """
    rows = read_table(path, field)
    columns = list(rows[0]) if rows else []
    lower = {str(name).strip().lower(): name for name in columns}
    file, label = (next((lower[name] for name in known if name in lower), None) for known in (_FILES, _LABELS))
    if file is None or label is None:
        problem = f"its columns are {', '.join(map(str, columns)) or 'missing'}"
        raise RequestError(field, path, problem, 'Give it a header with "file" and "label".')
    blank = next((number for number, row in enumerate(rows, 2) if not row[file] or not row[label]), None)
    if blank is not None:
        raise RequestError(field, path, f"line {blank} lacks the file or the label", "Complete it, or remove the line.")
    names, labels = [row[file].strip() for row in rows], [row[label].strip() for row in rows]

    def content(place: int) -> bytes:
        found = path.parent / Path(names[place]).expanduser()
        try:
            return found.read_bytes()
        except OSError as error:
            raise RequestError("image", found, f"it can't be read ({error.strerror})", f"Correct '{path}'.") from None

    return Listed(names, labels, sorted(set(labels), key=natural_order), content)


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    hidden = any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in parts)
    return bool(parts) and not hidden and PurePosixPath(parts[-1]).suffix.lower() in EXTENSIONS


def _by_folder(
    path: Path, entries: dict[str, Any], content: Callable[[Any], bytes], field: str, told: dict[str, str] | None = None
) -> Listed:
    """Entries by the folder that each lies in, unless their classes are given."""
    if not entries:
        raise RequestError(field, path, "there is no image in it", "Pack a folder per class.")
    labels = told or {name: PurePosixPath(name).parent.name for name in entries}
    classes = sorted(set(labels.values()), key=natural_order)
    names = sorted(entries, key=lambda name: (classes.index(labels[name]), natural_order(name)))
    return Listed(names, [labels[name] for name in names], classes, lambda place: content(entries[names[place]]))


def shards_in(folder: Path, suffix: str) -> list[Path]:
    """The shards of a folder, or of `data` in it, in natural order; a run's own manifest is none."""

    def found(place: Path) -> Iterator[Path]:
        return (path for path in place.glob(f"*{suffix}") if not path.name.startswith(".") and path.name != "manifest.parquet")

    return sorted(found(folder), key=lambda path: natural_order(path.name)) or sorted(
        found(folder / "data"), key=lambda path: natural_order(path.name)
    )
