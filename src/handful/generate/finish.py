"""What sums a run up: manifest, metadata, contact sheet, the data set's card; written once by whoever finishes last."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from handful.data.images import read_image
from handful.generate.job import Job
from handful.recipe.plan import Cohort, image_seed
from handful.runs.card import CARD, card, may_write
from handful.runs.contact_sheet import MOST_CLASSES, contact_sheet_png
from handful.runs.manifest import DONE, FAILED, guidance_text
from handful.runs.run_directory import FINISHED
from handful.runs.writers import IMAGES, METADATA, metadata_line

MANIFEST, SHEET = "manifest.parquet", "contact_sheet.png"
_GROUP = 65_536  # rows of the manifest in memory at once
_COLUMNS = 16  # of the contact sheet: no more images of a class are read back for it than two rows


def planned_rows(job: Job, cohort: Cohort, status: str) -> list[dict[str, Any]]:
    """What is known of a cohort's images before they are made."""
    files = job.directory.writer.files(cohort)
    shared = {"class": cohort.class_name, "label": cohort.label, "cohort": cohort.index, "status": status}
    shared |= {"model": Path(job.recipe.model.name).name, "guidance": guidance_text(job.of(cohort).recipe)}
    return [
        {
            "file": files[place] if status == DONE else None,
            "index": cohort.first + place,
            "seed": image_seed(job.recipe.seed, cohort.class_name, cohort.first + place),
            **shared,
        }
        for place in range(cohort.count)
    ]


def finish(job: Job) -> int:
    """Writes what sums the run up; how many images are there. By the holder of the directory's lock.

    Where another process that made cohorts beside this one has written it already, it is left unchanged.
    """
    directory, marked = job.directory, job.directory.marked()
    state = hashlib.sha256(repr([(cohort.key, cohort.key in marked) for cohort in job.cohorts]).encode()).hexdigest()
    images = sum(cohort.count for cohort in job.cohorts if cohort.key in marked)
    finished, sheet = directory.path / FINISHED, job.directory.path / SHEET
    if finished.is_file() and finished.read_text() == state and (directory.path / MANIFEST).is_file():
        return images
    counts, distances = Counter[str](), list[float]()
    first: dict[str, list[str]] = {cohort.class_name: [] for cohort in job.cohorts}
    folder = job.directory.writer.format == "imagefolder"
    with ExitStack() as stack:
        manifest = stack.enter_context(directory.replacing(MANIFEST))
        table = stack.enter_context(pq.ParquetWriter(manifest, job.schema))
        lines = stack.enter_context(directory.replacing(f"{IMAGES}/{METADATA}")) if folder and images else None
        every = _rows(job, marked)
        while rows := list(islice(every, _GROUP)):
            table.write_table(pa.Table.from_pylist(rows, job.schema))
            for row in rows:
                if row["status"] == DONE:
                    counts[row["class"]] += 1
                    if row.get("nearest_exemplar_distance") is not None:
                        distances.append(row["nearest_exemplar_distance"])
                    if lines is not None:
                        lines.write(metadata_line(row["file"], row["class"]).encode())
                    if len(first[row["class"]]) < 2 * _COLUMNS:
                        first[row["class"]].append(row["file"])
    if images:
        directory.publish(SHEET, _contact_sheet(job, {name: files for name, files in first.items() if files}))
        if may_write(directory.path):
            text = card(directory.path, job.recipe.as_dict(), counts, distances)
            directory.publish(CARD, text.encode("utf-8", "replace"))
    elif sheet.exists():
        sheet.unlink()
    directory.publish(FINISHED, state.encode())
    return images


def _rows(job: Job, marked: set[str]) -> Iterator[dict[str, Any]]:
    for cohort in job.cohorts:
        rows = job.directory.rows(cohort, job.schema) if cohort.key in marked else None
        yield from rows if rows is not None else planned_rows(job, cohort, FAILED)


def _contact_sheet(job: Job, files: Mapping[str, Sequence[str]]) -> bytes:
    writer, root, (channels, *size) = job.directory.writer, job.directory.path, job.image_shape
    shown = set(list(files)[:MOST_CLASSES])
    generated = {
        name: torch.stack([read_image(writer.read(root, file), channels=channels, name=file) for file in of_class])
        if name in shown
        else torch.empty(0, channels, *size)
        for name, of_class in files.items()
    }
    return contact_sheet_png(job.exemplars.images if job.exemplars else {}, generated, columns=_COLUMNS)
