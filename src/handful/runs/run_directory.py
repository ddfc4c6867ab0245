"""The run directory: whose it is, who works in it, and how a cohort gets there whole or not at all.

    out/.handful/plan.json              the classes' labels and the cohorts' sizes: what is there stays when a run grows
    out/.handful/exemplars.json         which images guided
    out/.handful/lock                   held for moments: at the start and the end of each process
    out/.handful/tmp/WORKER/            a process's unfinished files
    out/.handful/workers, claims, ...   who makes what (claims.py); gone when all is done
    out/.handful/cohorts/3-0000.parquet the commit marker of a cohort: its rows of the manifest, each image's SHA-256 among them

A cohort is done if its marker is readable and its images exist with the right hashes; so neither a kill nor a power cut
between the images and the marker, nor a damaged file, is ever taken for a result. Images are not synced one by one, which
would take longer than making them: what a power cut loses is noticed by its hash, and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from handful.errors import RunError
from handful.recipe.plan import Cohort
from handful.runs.job_directory import OURS, OwnedDirectory
from handful.runs.manifest import SHARD, parquet_bytes, read_hashes, read_rows
from handful.runs.writers import Writer

RECIPE = "recipe.yaml"
PLAN, EXEMPLARS, FINISHED = f"{OURS}/plan.json", f"{OURS}/exemplars.json", f"{OURS}/finished"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Plan:
    """What is laid out in a run directory.

    Attributes:
        sizes: By class the images of each cohort.
    """

    labels: dict[str, int | None] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, cohorts: Sequence[Cohort]) -> Plan:
        """The plan of all cohorts, in order."""
        plan = cls()
        for cohort in cohorts:
            plan.labels[cohort.class_name] = cohort.label
            plan.sizes.setdefault(cohort.class_name, []).append(cohort.count)
        return plan

    def cohorts(self) -> list[Cohort]:
        """The cohorts, in order."""
        return [
            Cohort(name, self.labels[name], index, sum(sizes[:index]), count)
            for name, sizes in self.sizes.items()
            for index, count in enumerate(sizes)
        ]

    def to_json(self) -> bytes:
        """Always the same bytes for the same plan."""
        return (json.dumps({"labels": self.labels, "cohorts": self.sizes}, ensure_ascii=False) + "\n").encode()


class RunDirectory(OwnedDirectory):
    """A directory that a run writes into.

    Args:
        path: It need not exist. Nothing is created before `locked` or `lock`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, RECIPE, job="run", request="recipe", doing="generating")
        self.writer = Writer()

    @property
    def own(self) -> Path:
        """Where handful keeps what is not for others."""
        return self._own

    @contextmanager
    def working(self, worker: str) -> Iterator[None]:
        """Keeps this process's unfinished files apart from those of others inside the block."""
        self._temporary = self._own / "tmp" / worker
        self._temporary.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self._clear()
            with suppress(OSError):  # others work here
                self._temporary.parent.rmdir()

    def clear_others(self) -> None:
        """Removes the unfinished files of processes that were killed; by the holder of the lock, where nobody else is here."""
        for folder in (self._own / "tmp").iterdir() if (self._own / "tmp").is_dir() else ():
            if folder != self._temporary:
                shutil.rmtree(folder, ignore_errors=True)

    def plan(self) -> Plan:
        """What is laid out here; an empty plan where nothing is, or where it can't be read."""
        try:
            data = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
            return Plan(dict(data["labels"]), {name: list(map(int, sizes)) for name, sizes in data["cohorts"].items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return Plan()

    def begun(self) -> dict[str, int]:
        """By class how many cohorts are laid out up to the last one that is marked as done."""
        plan, marked = self.plan(), self.marked()
        kept = {
            name: max((index + 1 for index in range(len(sizes)) if f"{name}-{index:04d}" in marked), default=0)
            for name, sizes in plan.sizes.items()
        }
        return {name: count for name, count in kept.items() if count}

    def marked(self) -> set[str]:
        """Keys of all cohorts that have a marker, whether or not it is true."""
        folder = self._own / "cohorts"
        return {name.removesuffix(".parquet") for name in (os.listdir(folder) if folder.is_dir() else ())}

    def is_marked(self, cohort: Cohort) -> bool:
        """Whether a cohort has a marker."""
        return (self.path / self._marker(cohort)).exists()

    @contextmanager
    def replacing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write a large file of the job into, which is in its place when the block ends well."""
        target, temporary = self.path / name, self._temporary / Path(name).name
        for folder in (target.parent, temporary.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)

    def commit(self, cohort: Cohort, images: Sequence[bytes], rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
        """Puts a cohort's files in place, then its marker.

        Args:
            images: The images' contents, in the order of the rows.
        """
        packed = self.writer.pack(cohort, images, rows)
        self.put(packed)
        if self.writer.format != "imagefolder":  # one hash shows whether a shard is whole, without opening it
            schema = schema.with_metadata({SHARD: _sha256(packed[self.writer.shard(cohort)])})
        self.publish(self._marker(cohort), parquet_bytes(rows, schema))

    def put(self, files: Mapping[str, bytes]) -> None:
        """Moves files into place, each whole."""
        folder = self._temporary / "cohort"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, content in enumerate(files.values()):
            (folder / str(number)).write_bytes(content)
        for number, name in enumerate(files):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / str(number), target)
        folder.rmdir()

    def finished(self, cohort: Cohort, schema: pa.Schema) -> bool:
        """Whether a cohort is done and its images are those that were made; reads every file of it."""
        marker = read_hashes(self.path / self._marker(cohort), schema)
        if marker is None or marker[0] != self.writer.files(cohort):
            return False
        files, hashes, shard = marker
        if self.writer.format != "imagefolder":
            files, hashes = [self.writer.shard(cohort)], [shard or ""]
        try:
            return all(_sha256((self.path / file).read_bytes()) == wanted for file, wanted in zip(files, hashes, strict=True))
        except OSError:
            return False

    def rows(self, cohort: Cohort, schema: pa.Schema) -> list[dict[str, Any]] | None:
        """The rows of a cohort's marker; None where there is none of this cohort. No image is read."""
        rows = read_rows(self.path / self._marker(cohort), schema)
        return rows if rows is not None and [row["file"] for row in rows] == self.writer.files(cohort) else None

    def forget(self, cohort: Cohort) -> None:
        """Removes a marker that is not true: its images are made again."""
        (self.path / self._marker(cohort)).unlink(missing_ok=True)

    def _marker(self, cohort: Cohort) -> str:
        return f"{OURS}/cohorts/{cohort.key}.parquet"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turns the operating system's "no space left" into a RunError with the remedy; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunError(
            f"out: '{path}': the disk is full ({os.strerror(error.errno or 0)}). Finished cohorts are kept: free some space "
            f"and repeat the same command, which continues from there."
        ) from error
