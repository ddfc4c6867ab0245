"""A directory that one kind of job of handful owns: what lies there, one process at a time, files whole or not at all.

DIR/recipe.yaml or sweep.yaml   the mark: what was asked for, with its provenance
DIR/.handful/lock               held by the one process that works here (by a run's processes for moments only)
DIR/.handful/tmp/               everything unfinished; emptied at every start and end
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handful.errors import RequestError, some_of
from handful.files.atomic import publish
from handful.files.locks import held
from handful.recipe.file import PROVENANCE, parse_yaml

OURS = ".handful"
_ELSEWHERE = "Choose a new or empty directory with --out; nothing here has been changed."


class OwnedDirectory:
    """A directory that handful writes into.

    Args:
        path: It need not exist. Nothing is created before `locked`.
        mark: The file that says what was asked for.
        job: What writes here, in a word: "run".
        request: What the mark holds, in a word: "recipe".
        doing: What another process is doing there, in a word: "generating".
    """

    def __init__(self, path: str | Path, mark: str, *, job: str, request: str, doing: str) -> None:
        self.path = Path(path).expanduser().absolute()
        self._mark, self._job, self._request, self._doing = mark, job, request, doing
        self._own = self.path / OURS
        self._temporary = self._own / "tmp"

    def stored(self) -> dict[str, Any] | None:
        """What the job that has begun here was asked for, with its provenance; None where none has.

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
        if OURS in present and self._mark in present:
            text = (self.path / self._mark).read_text(encoding="utf-8", errors="replace")
            data = parse_yaml(text, "out", self.path / self._mark)
            if not isinstance(data, dict) or not isinstance(data.get(PROVENANCE), dict):
                problem = f"it is not the {self._request} of a {self._job}"
                raise RequestError("out", self.path / self._mark, problem, _ELSEWHERE)
            return data
        foreign = [name for name in present if name != OURS]
        if foreign:
            problem = f"it holds files that are not from a {self._job} of handful: {some_of(foreign)}"
            raise RequestError("out", self.path, problem, _ELSEWHERE)
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the directory where needed and keeps other processes out; leaves no temporary files behind.

        Raises:
            RequestError: Another process works here.
        """
        with self.lock(0):
            self._clear()
            try:
                self._temporary.mkdir(parents=True)
                yield
            finally:
                self._clear()

    @contextmanager
    def lock(self, seconds: float = 600) -> Iterator[None]:
        """Creates the directory where needed, and is the only process inside the block.

        Args:
            seconds: To wait for another one, which holds it for moments.

        Raises:
            RequestError: Another process is there after that time.
        """
        self._own.mkdir(parents=True, exist_ok=True)
        with held(self._own / "lock", seconds) as got:
            if not got:
                remedy = (
                    "Wait until it has finished, or choose another --out. If no process works there, on any machine, remove "
                    f"'{self._own / 'lock'}'."
                )
                raise RequestError("out", self.path, f"another process is {self._doing} into it", remedy)
            yield

    def _clear(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def publish(self, name: str, content: bytes) -> None:
        """Writes a file of the job, whole or not at all, and on the disk when this returns. Same bytes are left alone.

        Args:
            name: Relative to the directory; missing folders are made.
        """
        target = self.path / name
        self._temporary.mkdir(parents=True, exist_ok=True)  # gone where this process stood still for long, and others went on
        publish(target, content, self._temporary / f"{secrets.token_hex(4)}-{target.name}"[:200])

    def free_bytes(self) -> int:
        """Free space where the directory is or will be."""
        return shutil.disk_usage(next(path for path in (self.path, *self.path.parents) if path.exists())).free
