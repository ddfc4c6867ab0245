"""`--only CLASS/NUMBER`: makes one image of a finished run again, and says whether it is the same."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handful.data.exemplars import default_cache
from handful.data.images import read_image
from handful.errors import RequestError
from handful.generate.job import Job
from handful.generate.run import cohort_again


@dataclass(frozen=True)
class Again:
    """What came of it.

    Attributes:
        image: Its file, relative to the run directory.
        same: Whether its bytes are those that the manifest has.
        largest: The largest difference of a pixel in 255; None where the file that lies there can't be read.
        restored: Whether the file was missing or damaged, and is there again.
        cohort: How many images were made for it: those that were guided together.
    """

    image: str
    same: bool
    largest: float | None
    restored: bool
    cohort: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """A line for people."""
        if self.same:
            return f"{self.image}: the same, byte for byte" + (
                " (the file was missing or damaged, and is restored)" * self.restored
            )
        far = "" if self.largest is None else f"; a pixel differs by at most {self.largest:g} of 255"
        return (
            f"{self.image}: NOT the same{far}. Perhaps library versions, threads or the device differ: compare with "
            f"provenance in recipe.yaml"
        )


def make_again(job: Job, image: str) -> Again:
    """Makes an image's cohort again, in memory.

    Args:
        job: From `prepare`, of the directory that holds the run.
        image: CLASS/NUMBER.

    Raises:
        RequestError: The run has no such image.
        RunError: It can't be made.
    """
    name, _, number = image.rpartition("/")
    index = int(number) if number.isdecimal() else -1
    found = next((cohort for cohort in job.cohorts if cohort.class_name == name and index in cohort.indices), None)
    if found is None:
        classes = ", ".join(dict.fromkeys(cohort.class_name for cohort in job.cohorts[:5]))
        raise RequestError("--only", image, "this run has no such image", f"Write CLASS/NUMBER from 0; classes: {classes}.")
    place, directory = index - found.first, job.directory
    rows = directory.rows(found, job.schema)
    if rows is None:
        raise RequestError(
            "--only", image, "it has not been generated yet", "Generate it first: the same command without --only."
        )
    contents, _ = cohort_again(job, found, default_cache())
    file, wanted, content = rows[place]["file"], rows[place]["sha256"], contents[place]
    same = hashlib.sha256(content).hexdigest() == wanted
    held = directory.writer.unpack(found, directory.path)
    there = held[place] if held else _read(directory.path / file)
    damaged = there is None or hashlib.sha256(there).hexdigest() != wanted
    restored = same and damaged and directory.writer.format == "imagefolder"
    if restored:
        with directory.lock(), directory.working("again"):
            directory.put({file: content})
    largest = None
    if there is not None and not damaged:
        channels = job.image_shape[0]
        apart = read_image(content, channels=channels) - read_image(there, channels=channels)
        largest = float(apart.abs().max() * 127.5)
    return Again(file, same, largest, restored, found.count)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
