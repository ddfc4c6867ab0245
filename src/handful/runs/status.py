"""How far a run is, and whether its files are whole: `handful status` and `handful verify`. No model is loaded."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from handful.errors import RequestError, counted
from handful.runs.claims import Claims
from handful.runs.progress import duration
from handful.runs.run_directory import RECIPE, RunDirectory
from handful.runs.writers import IMAGES, METADATA, SHARDS, Writer


@dataclass
class Status:
    """How far a run is.

    Attributes:
        failed: By cohort why it could not be made; tried again by the next start.
        claimed: By cohort the worker that makes it.
        workers: Those that are there, as far as can be seen at once.
        rate: Images a second of all workers, each by its own clock; None where none has made an image yet.
    """

    images: int = 0
    images_done: int = 0
    cohorts: int = 0
    cohorts_done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)
    workers: list[str] = field(default_factory=list)
    rate: float | None = None
    seconds_left: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `images` is the former name of `images_planned`, `failed` of `failures` (a list of texts)."""
        failures = [f"{key}: {why}" for key, why in self.failed.items()]
        return {**asdict(self), "images_planned": self.images, "failures": failures}

    def as_text(self) -> str:
        """Lines for people."""
        cohorts = f"{self.cohorts_done} of {counted(self.cohorts, 'cohort')} (images guided together)"
        lines = [f"done: {self.images_done} of {counted(self.images, 'image')}, {cohorts}"]
        if self.rate:
            left = f", {duration(self.seconds_left)} left" if self.seconds_left else ""
            lines.append(f"{self.rate:.3g} images/s{left}")
        lines.append(f"{counted(len(self.workers), 'process')} at work" + "".join(f"\n  {name}" for name in self.workers))
        lines += [f"{key} is being made by {worker}" for key, worker in list(self.claimed.items())[:20]]
        lines += [f"{key} failed: {why}" for key, why in self.failed.items()]
        return "\n".join(lines)


def status(out: str | Path) -> Status:
    """Looks at a run directory, while others may work in it.

    Raises:
        RequestError: It is none, or of a version that kept no plan.
    """
    directory = _opened(out)
    cohorts, marked = directory.plan().cohorts(), directory.marked()
    if not cohorts:
        raise RequestError(
            "out", directory.path, "its plan is missing (.handful/plan.json)", "Repeat the command that made it."
        )
    claims = Claims(directory.own, "")
    left = [cohort for cohort in cohorts if cohort.key not in marked]
    found = Status(
        images=sum(cohort.count for cohort in cohorts),
        images_done=sum(cohort.count for cohort in cohorts if cohort.key in marked),
        cohorts=len(cohorts),
        cohorts_done=len(cohorts) - len(left),
        failed=claims.failures(),
        workers=claims.others(),
    )
    latest = claims.claimed()
    for cohort in left:
        if cohort.key in latest:
            with suppress(OSError, ValueError, LookupError):
                text = (directory.own / "claims" / f"{cohort.key}.{latest[cohort.key]}").read_text(encoding="utf-8")
                if (worker := json.loads(text)["worker"]) in found.workers:
                    found.claimed[cohort.key] = worker
    if rates := claims.rates():
        found.rate = sum(rates.values())
        found.seconds_left = (found.images - found.images_done) / found.rate
    return found


@dataclass
class Verified:
    """What was found of the files.

    Attributes:
        images: Those that the manifest has.
        missing, damaged: Of these, by file.
        extra: Images that the manifest does not have.
    """

    images: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every image of the manifest is there and unchanged, and no other."""
        return not (self.missing or self.damaged or self.extra)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "whole": self.whole}

    def as_text(self) -> str:
        """Lines for people."""
        lines = [f"{counted(self.images, 'image')} in the manifest: " + ("all exist, unchanged" if self.whole else "")]
        for told, files in (("missing", self.missing), ("changed", self.damaged), ("not in the manifest", self.extra)):
            if files:
                lines.append(f"{len(files)} {told}: " + ", ".join(files[:5]) + (", ..." if len(files) > 5 else ""))
        if self.missing or self.damaged:
            lines.append("repeat the command that made the run: it makes them again")
        return "\n".join(lines)


def verify(out: str | Path) -> Verified:
    """Compares every image with the manifest's SHA-256.

    Raises:
        RequestError: It is no run directory, or is not finished.
    """
    directory, found, known = _opened(out), Verified(), set[str]()
    for file, sha256 in _listed(directory):
        known.add(file.partition("::")[0])
        found.images += 1
        content = _content(directory, file)
        if content is None:
            found.missing.append(file)
        elif hashlib.sha256(content).hexdigest() != sha256:
            found.damaged.append(file)
    for folder in (IMAGES, SHARDS):
        for path in sorted((directory.path / folder).rglob("*")):
            name = str(path.relative_to(directory.path))
            if path.is_file() and path.name != METADATA and not path.name.startswith(".") and name not in known:
                found.extra.append(name)
    return found


def _content(directory: RunDirectory, file: str) -> bytes | None:
    try:
        return Writer().read(directory.path, file)
    except (OSError, LookupError, StopIteration, ValueError):
        return None
    except Exception:  # a damaged shard: tarfile and pyarrow raise kinds of their own
        return b""


def to_go_on(out: str | Path) -> str:
    """The command that finishes a run."""
    return shlex.join(["handful", "generate", str(Path(out) / RECIPE), "--out", str(out)])


def _listed(directory: RunDirectory) -> Iterator[tuple[str, str]]:
    file = directory.path / "manifest.parquet"
    if not file.exists() and directory.plan().cohorts() and (found := status(directory.path)).images_done < found.images:
        problem = (
            f"it is unfinished: it has {found.images_done} of {counted(found.images, 'image')}; only a whole run is verified"
        )
        raise RequestError("out", directory.path, problem, f"{to_go_on(directory.path)} makes the others.")
    try:
        manifest = pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        problem = f"its manifest can't be read ({error})"
        raise RequestError("out", directory.path, problem, "Repeat the command that made it.") from None
    for group in range(manifest.num_row_groups):
        for row in manifest.read_row_group(group, ["file", "sha256", "status"], use_threads=False).to_pylist():
            if row["status"] == "done":
                yield row["file"], row["sha256"]


def _opened(out: str | Path) -> RunDirectory:
    directory = RunDirectory(out)
    if not (directory.path / RECIPE).is_file() or not directory.own.is_dir():
        problem = "this is not a run directory of handful"
        raise RequestError("out", directory.path, problem, "Give the directory that was --out of handful generate.")
    with suppress(OSError, yaml.YAMLError, AttributeError):
        asked = yaml.safe_load((directory.path / RECIPE).read_text(encoding="utf-8")).get("output") or {}
        directory.writer = Writer(asked.get("format", "imagefolder"), asked.get("image", "png"))
    return directory
