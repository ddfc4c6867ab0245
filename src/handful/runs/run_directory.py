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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from handful.errors import RunError
from handful.recipe.plan import Cohort
from handful.runs.job_directory import OURS, OwnedDirectory
from handful.runs.manifest import parquet_bytes, read_rows
from handful.runs.writers import image_file

RECIPE = "recipe.yaml"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunDirectory(OwnedDirectory):
    """A directory that a run writes into.

    Args:
        path: It need not exist. Nothing is created before `locked`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, RECIPE, job="run", request="recipe", doing="generating")

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

    def anything_finished(self) -> bool:
        """Whether any cohort of any recipe is done here, as its marker says; without one the directory is free."""
        return any((self.path / OURS / "cohorts").glob("*.parquet"))

    def _marker(self, cohort: Cohort) -> str:
        return f"{OURS}/cohorts/{cohort.key}.parquet"

    def _sha256(self, file: str) -> str | None:
        try:
            return hashlib.sha256((self.path / file).read_bytes()).hexdigest()
        except OSError:
            return None


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
