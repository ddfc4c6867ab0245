"""Generated images as files: which file holds an image, how it is encoded, and how a cohort's images are packed.

    imagefolder   images/CLASS/000000.png and metadata.jsonl, as Hugging Face's "imagefolder" has it
    webdataset    data/CLASS-0000.tar, a shard a cohort: KEY.png, KEY.cls (the label) and KEY.json
    parquet       data/CLASS-0000.parquet, a shard a cohort: image {bytes, path}, label (ClassLabel), index, seed

A shard is a cohort, so it is bounded, is there whole or not at all, and has the same bytes whoever makes it. A manifest names
an image in a shard as SHARD::NAME.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from handful.data.images import encode_png, to_uint8
from handful.errors import RequestError
from handful.recipe.plan import Cohort

IMAGES, SHARDS = "images", "data"
METADATA = "metadata.jsonl"
FORMATS = ("imagefolder", "webdataset", "parquet")
_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9]|metadata)(\..*)?$", re.IGNORECASE)
_SUFFIX = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "webp-lossless": ".webp"}
_INSIDE = "::"


@dataclass(frozen=True)
class Writer:
    """How a run's images become files.

    Args:
        format: One of `FORMATS`.
        image: `png`, `jpeg:QUALITY`, `webp:QUALITY` or `webp-lossless`.
        classes: All classes in order, for shards that number them.
    """

    format: str = "imagefolder"
    image: str = "png"
    classes: tuple[str, ...] = ()

    @property
    def _kind(self) -> tuple[str, int | None]:
        kind, _, quality = self.image.partition(":")
        return kind, int(quality) if quality else None

    @property
    def lossless(self) -> bool:
        """Whether a file holds the very bytes that were made."""
        return self._kind[0] in ("png", "webp-lossless")

    @property
    def suffix(self) -> str:
        """Of an image's name."""
        return _SUFFIX[self._kind[0]]

    def encode(self, image: Tensor) -> bytes:
        """One image (c, h, w) in [-1, 1] as a file's content, which its pixels (and Pillow's version) decide alone."""
        kind, quality = self._kind
        if kind == "png":
            return encode_png(image)
        values = np.ascontiguousarray(to_uint8(image).cpu().permute(1, 2, 0).numpy())
        picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
        options: dict[str, Any] = {"lossless": True} if kind == "webp-lossless" else {"quality": quality}
        if kind == "jpeg":
            options["subsampling"] = 0  # colours at full resolution: an image is generated once and judged for ever
        encoded = io.BytesIO()
        picture.save(encoded, kind.partition("-")[0].upper(), **options)
        return encoded.getvalue()

    def files(self, cohort: Cohort) -> list[str]:
        """Where each image of a cohort lies, relative to the run directory."""
        names = [f"{cohort.class_name}/{index:06d}{self.suffix}" for index in range(cohort.first, cohort.first + cohort.count)]
        if self.format == "imagefolder":
            return [f"{IMAGES}/{name}" for name in names]
        return [f"{self.shard(cohort)}{_INSIDE}{name}" for name in names]

    def shard(self, cohort: Cohort) -> str:
        """The file of a cohort's images, in formats that have such."""
        return f"{SHARDS}/{cohort.key}.{'tar' if self.format == 'webdataset' else 'parquet'}"

    def pack(self, cohort: Cohort, images: Sequence[bytes], rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """The files that hold a cohort's images, by name relative to the run directory."""
        files = self.files(cohort)
        if self.format == "imagefolder":
            return dict(zip(files, images, strict=True))
        names = [file.partition(_INSIDE)[2] for file in files]
        label = self.classes.index(cohort.class_name)
        if self.format == "webdataset":
            return {self.shard(cohort): _tar(cohort.label if cohort.label is not None else label, names, images, rows)}
        return {self.shard(cohort): _parquet(label, self.classes, names, images, rows)}

    def unpack(self, cohort: Cohort, root: Path) -> list[bytes] | None:
        """What `pack` packed; None where a file is missing or damaged."""
        files = self.files(cohort)
        try:
            return [self.read(root, file) for file in files]
        except (OSError, pa.ArrowException, tarfile.TarError, LookupError, TypeError):
            return None

    def read(self, root: Path, file: str) -> bytes:
        """The content of one image, by its name in the manifest; neighbours in a shard are read together."""
        shard, inside, name = file.partition(_INSIDE)
        if not inside:
            return (root / file).read_bytes()
        found = (root / shard).stat()
        return _members(root / shard, found.st_mtime_ns, found.st_size)[name]


@lru_cache(maxsize=2)
def _members(shard: Path, modified: int, size: int) -> dict[str, bytes]:
    """All that a shard holds, by name; kept for the next image as long as the file is not changed."""
    content = io.BytesIO(shard.read_bytes())
    if shard.suffix == ".parquet":
        cells = pq.ParquetFile(content).read(["image"], use_threads=False)["image"].to_pylist()
        return {cell["path"]: cell["bytes"] for cell in cells}
    with tarfile.open(fileobj=content) as archive:
        streams = {member.name: archive.extractfile(member) for member in archive}
        return {name: stream.read() for name, stream in streams.items() if stream}


def _tar(label: int, names: Sequence[str], images: Sequence[bytes], rows: Sequence[Mapping[str, Any]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, image, row in zip(names, images, rows, strict=True):
            told = {key: row[key] for key in ("class", "label", "index", "seed")}
            stem = name.rpartition(".")[0]
            members = {name: image, f"{stem}.cls": str(label).encode(), f"{stem}.json": json.dumps(told).encode()}
            for member, content in members.items():
                info = tarfile.TarInfo(member)  # of no time and no user: the same bytes from everyone
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _parquet(
    label: int, classes: Sequence[str], names: Sequence[str], images: Sequence[bytes], rows: Sequence[Mapping[str, Any]]
) -> bytes:
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array([label] * len(names), pa.int64()),
            "index": pa.array([row["index"] for row in rows], pa.int64()),
            "seed": pa.array([row["seed"] for row in rows], pa.int64()),
        }
    )
    whole = {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    told = {"info": {"features": features | {"index": whole, "seed": whole}}}
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)}), stream)
    return stream.getvalue()


def check_class_names(names: Iterable[str], field: str) -> None:
    """Refuses class names that can't be names of folders: nothing is ever renamed in silence, or written elsewhere."""
    seen: dict[str, str] = {}
    for name in names:
        problem = _problem(name)
        if name.casefold() in seen:
            problem = f"on some file systems it is the same folder as '{seen[name.casefold()]}'"
        if problem:
            remedy = "Rename the class, or give other names with --class-names."
            raise RequestError(field, name, f"this class name can't name a folder: {problem}", remedy)
        seen[name.casefold()] = name


def _problem(name: str) -> str | None:
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a space"
    if "/" in name or "\\" in name or name in (".", ".."):
        return "it contains a path to another folder"
    if name.startswith(".") or name.endswith("."):
        return "it begins or ends with a dot"
    if not name.isprintable():
        return "it holds characters that can't be printed"
    if _RESERVED.match(name):
        return "this name is reserved"
    if len(name.encode("utf-8", "surrogatepass")) > 200:
        return "it is longer than 200 bytes"
    return None


def metadata_line(file: str, label: str) -> str:
    """A line of the imagefolder's metadata: the file relative to the run directory, and its class."""
    return json.dumps({"file_name": file.removeprefix(f"{IMAGES}/"), "label": label}, ensure_ascii=False) + "\n"
