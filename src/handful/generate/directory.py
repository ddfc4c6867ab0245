"""The run directory: whose it is, who works in it, and how a cohort gets there whole or not at all.

    out/.handful/lock                   held by the one process that works here
    out/.handful/tmp/                   everything unfinished; emptied at every start and end
    out/.handful/cohorts/3-0000.parquet the commit marker of a cohort: its rows of the manifest, each image's SHA-256 among them

A cohort is done if its marker is readable and its images exist with the right hashes; so neither a kill nor a power cut
between the images and the marker, nor a damaged file, is ever taken for a result. Images are not synced one by one, which
would take longer than making them: what a power cut loses is noticed by its hash, and made again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from handful.errors import RequestError, RunError
from handful.generate.manifest import parquet_bytes, read_rows
from handful.generate.plan import Cohort
from handful.generate.recipe_file import PROVENANCE, parse_yaml
from handful.generate.writers import image_file

RECIPE = "recipe.yaml"
_OURS = ".handful"
_ELSEWHERE = "Choose a new or empty directory with --out; nothing here has been touched."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunDirectory:
    """A directory that a run writes into.

    Args:
        path: It need not exist. Nothing is created before `locked`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self._own = self.path / _OURS
        self._temporary, self._markers = self._own / "tmp", self._own / "cohorts"

    def stored(self) -> dict[str, Any] | None:
        """The recipe.yaml of the run that has begun here, with its provenance; None where none has.

        Raises:
            RequestError: The directory holds something else, is a file, or can't be written.
        """
        if not self.path.exists():
            parent = next(parent for parent in self.path.parents if parent.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise RequestError("out", self.path, f"it can't be created in '{parent}'", "Choose another --out.")
            return None
        if not self.path.is_dir():
            raise RequestError("out", self.path, "this is a file", "Choose another --out.")
        try:
            present = sorted(os.listdir(self.path))
        except PermissionError:
            raise RequestError("out", self.path, "you may not read it", "Choose another --out.") from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise RequestError("out", self.path, "you may not write into it", "Choose another --out.")
        if _OURS in present and RECIPE in present:
            text = (self.path / RECIPE).read_text(encoding="utf-8", errors="replace")
            data = parse_yaml(text, "out", self.path / RECIPE)
            if not isinstance(data, dict) or not isinstance(data.get(PROVENANCE), dict):
                raise RequestError("out", self.path / RECIPE, "it is no recipe that a run has written", _ELSEWHERE)
            return data
        foreign = [name for name in present if name != _OURS]
        if foreign:
            listed = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            raise RequestError("out", self.path, f"it holds something that is no run of handful: {listed}", _ELSEWHERE)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the directory where needed and keeps other processes out; leaves no temporary files behind.

        Raises:
            RequestError: Another process works here.
        """
        self._own.mkdir(parents=True, exist_ok=True)
        with (self._own / "lock").open("a") as handle:
            with suppress(ImportError):  # Windows has no fcntl; there nobody is kept out
                import fcntl

                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RequestError("out", self.path, "another process is generating into it",
                                       "Wait until it has finished, or choose another --out.") from None  # fmt: skip
                except OSError as error:  # some network file systems lock nothing
                    if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                        raise
            self._clear()
            try:
                self._temporary.mkdir()
                self._markers.mkdir(exist_ok=True)
                yield
            finally:
                self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def publish(self, name: str, content: bytes) -> None:
        """Writes a file of the run, whole or not at all, and on the disk when this returns. Same bytes are left alone."""
        target = self.path / name
        with suppress(OSError):
            if target.read_bytes() == content:
                return
        temporary = self._temporary / target.name
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        with suppress(OSError):  # the rename itself; not every file system can
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def commit(self, cohort: Cohort, images: Sequence[bytes], rows: Sequence[dict[str, Any]], schema: pa.Schema) -> None:
        """Puts a cohort's files in place, then its marker.

        Args:
            images: The files' contents, in the order of the rows.
            rows: Of the manifest.
        """
        folder = self._temporary / cohort.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        targets = [self.path / row["file"] for row in rows]
        for target, content in zip(targets, images, strict=True):
            (folder / target.name).write_bytes(content)
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        for target in targets:
            os.replace(folder / target.name, target)
        folder.rmdir()
        self.publish(self._marker(cohort), parquet_bytes(rows, schema))

    def finished(self, cohort: Cohort, schema: pa.Schema) -> list[dict[str, Any]] | None:
        """The rows of a cohort that is done, None of one that must be made (again)."""
        rows = read_rows(self.path / self._marker(cohort), schema)
        files = [image_file(cohort.class_name, index) for index in range(cohort.first, cohort.first + cohort.count)]
        if rows is None or [row["file"] for row in rows] != files:
            return None
        return rows if all(self._sha256(row["file"]) == row["sha256"] for row in rows) else None

    def _marker(self, cohort: Cohort) -> str:
        return f"{_OURS}/cohorts/{cohort.key}.parquet"

    def _sha256(self, file: str) -> str | None:
        try:
            return hashlib.sha256((self.path / file).read_bytes()).hexdigest()
        except OSError:
            return None

    def free_bytes(self) -> int:
        """Free space where the directory is or will be."""
        return shutil.disk_usage(next(path for path in (self.path, *self.path.parents) if path.exists())).free


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turns the operating system's "no space left" into a RunError with the remedy; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunError(
            f"out: '{path}': the disk is full ({os.strerror(error.errno or 0)}). The cohorts that were finished are kept: "
            "free some space and repeat the same command, which goes on from there."
        ) from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two recipes (plain data) differ in: a line for each field, in the fields' order."""
    one, other = dict(_flat(there)), dict(_flat(here))
    return [
        f"{key}: {_shown(one, key)} there, {_shown(other, key)} now"
        for key in dict.fromkeys([*one, *other])
        if _shown(one, key) != _shown(other, key)
    ]


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "nothing"
    return text if len(text) <= 200 else text[:197] + "..."


def _flat(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list) and any(isinstance(item, Mapping) for item in data):
        for index, value in enumerate(data):
            yield from _flat(value, f"{key}[{index}]")
    else:
        yield key, data
