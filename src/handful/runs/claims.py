"""Who makes what: many processes on one run directory share its cohorts by files that only one of them can create.

    .handful/workers/ID        a process that works here; rewritten as it gets on (its heartbeat), locked as long as it lives
    .handful/claims/KEY.0      the cohort KEY is being made by the worker that is named in it
    .handful/claims/KEY.1      the first one was gone or silent, and this one took the cohort over
    .handful/failed/KEY        why a cohort could not be made

A claim is held while its worker is there. A worker is gone when its file is; when it ran on this machine and its lock is free;
or when its file has not changed for a while *by the observer's own clock*: no time of another machine is ever compared. A
heartbeat follows the work (`Claims.beat`), so a worker that hangs falls silent. Should it come back, it finds its claim taken
over and drops what it made; were it a moment too late for that, it would write the same bytes again.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from handful.files.atomic import write_atomically
from handful.files.locks import take

BEAT = 5.0  # seconds between heartbeats


@dataclass(frozen=True)
class Timeouts:
    """When a worker counts as gone.

    Attributes:
        heartbeat: Seconds without a heartbeat.
        step: Seconds without a step of the work, after which a worker that hangs has no heartbeat.
    """

    heartbeat: float = 90.0
    step: float = 1800.0


def this_machine() -> str:
    """What identifies this machine since it was started; containers on it share its locks."""
    with suppress(OSError):
        return f"{platform.node()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return platform.node()


class Claims:
    """One worker's view of a run directory's claims.

    Args:
        own: The directory's `.handful`.
        run: What identifies the request: a claim of another one counts for nothing.
        timeouts: When a worker counts as gone, by this process's clock.
        machine, clock: For tests.

    Attributes:
        images: How many this worker has made; the others see it.
    """

    def __init__(
        self,
        own: Path,
        run: str,
        *,
        timeouts: Timeouts | None = None,
        machine: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own, self.run, self._timeouts, self._clock = own, run, timeouts or Timeouts(), clock
        self._workers, self._claims, self._failed = own / "workers", own / "claims", own / "failed"
        self.machine = machine or this_machine()
        self.worker = f"{platform.node()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock: BaseFileLock | None = None
        self.images, self._beats, self._began, self._moved = 0, 0, clock(), clock()
        self._stop = threading.Event()

    @contextmanager
    def working(self, beat: float | None = None) -> Iterator[None]:
        """Is a worker here inside the block: listed, locked, and beating as long as the work gets on.

        Args:
            beat: Seconds between heartbeats; None: `BEAT`, or a third of the timeout where that is less.
        """
        beat = min(BEAT, self._timeouts.heartbeat / 3) if beat is None else beat
        for folder in (self._workers, self._claims, self._failed):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = take(self._lock_file(self.worker))
        self._began = self._moved = self._clock()
        self.join()
        heart = threading.Thread(target=self._beating, args=(beat,), daemon=True)
        heart.start()
        try:
            yield
        finally:
            self._stop.set()
            heart.join()
            (self._workers / self.worker).unlink(missing_ok=True)
            if self._lock is not None:
                self._lock.release()
            self._lock_file(self.worker).unlink(missing_ok=True)

    def beat(self) -> None:
        """The work gets on."""
        self._moved = self._clock()

    def _beating(self, beat: float) -> None:
        while not self._stop.wait(beat):
            if self._clock() - self._moved < self._timeouts.step and self.is_listed():
                with suppress(OSError):  # a full disk: the others will wait for a while, then go on
                    self.join()

    def is_listed(self) -> bool:
        """Whether the others see this worker; one that stood still for long was taken for gone, and swept away."""
        return (self._workers / self.worker).exists()

    def join(self) -> None:
        """Writes a heartbeat: lists this worker, where it is not."""
        self._beats += 1
        told = {"machine": self.machine, "pid": os.getpid(), "beat": self._beats, "images": self.images}
        told["seconds"] = round(self._clock() - self._began, 3)
        self._workers.mkdir(parents=True, exist_ok=True)
        write_atomically(self._workers / self.worker, json.dumps(told).encode())

    def _lock_file(self, worker: str) -> Path:
        return self._workers / f".{worker}.lock"

    def others(self) -> list[str]:
        """The other workers that are there, as far as can be seen by now."""
        listed = os.listdir(self._workers) if self._workers.is_dir() else []
        found = [name for name in listed if not name.startswith(".") and name != self.worker]
        return [name for name in found if not self.gone(name)]

    def rates(self) -> dict[str, float]:
        """Images a second of each other worker that has made some, by its own clock."""
        found = {}
        for worker in self.others():
            with suppress(OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
                told = json.loads((self._workers / worker).read_text(encoding="utf-8"))
                if told["images"]:
                    found[worker] = told["images"] / told["seconds"]
        return found

    def gone(self, worker: str) -> bool:
        """Whether a worker has ended, died or fallen silent."""
        try:
            text = (self._workers / worker).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return True
        except OSError:
            text = ""  # a stale handle, or no file at all: wait for the timeout
        machine = None
        with suppress(ValueError, LookupError, TypeError):
            machine = json.loads(text)["machine"]
        if machine == self.machine and self._is_free(worker):
            return True
        before = self._seen.get(worker)
        if before is None or before[0] != text:
            self._seen[worker] = text, self._clock()
            return False
        return self._clock() - before[1] > self._timeouts.heartbeat

    def _is_free(self, worker: str) -> bool:
        lock_file = self._lock_file(worker)
        if not lock_file.exists():
            return False  # it takes its lock before it lists itself; without one, only its heartbeat counts
        try:
            lock = take(lock_file)
        except OSError:
            return False
        if lock is None:
            return False
        lock.release()
        return True

    def claimed(self) -> dict[str, int]:
        """By cohort the number of its last claim, as one listing sees them."""
        latest: dict[str, int] = {}
        for name in os.listdir(self._claims) if self._claims.is_dir() else ():
            key, _, number = name.rpartition(".")
            if number.isdecimal():
                latest[key] = max(latest.get(key, -1), int(number))
        return latest

    def holder(self, key: str, number: int) -> str | None:
        """The worker that holds a claim; None where it counts for nothing."""
        path = self._claims / f"{key}.{number}"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            worker, run = str(data["worker"]), data["run"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            # being written just now, or damaged: wait a while
            before = self._seen.setdefault(path.name, ("", self._clock()))
            return path.name if self._clock() - before[1] <= min(self._timeouts.heartbeat, 10.0) else None
        return None if run != self.run or (worker != self.worker and self.gone(worker)) else worker

    def claim(self, key: str, last: int = -1) -> int | None:
        """Takes a cohort; the number of the claim, None where another one was faster.

        Args:
            last: Number of the claim that counts for nothing; -1: there is none.
        """
        path = self._claims / f"{key}.{last + 1}"
        self._claims.mkdir(parents=True, exist_ok=True)  # it is gone where others have finished
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump({"worker": self.worker, "run": self.run}, stream)
        return last + 1

    def still_mine(self, key: str, number: int) -> bool:
        """Whether nobody has taken a claim over."""
        with suppress(OSError, ValueError, LookupError, TypeError):
            held: Any = json.loads((self._claims / f"{key}.{number}").read_text(encoding="utf-8"))
            return held["worker"] == self.worker and not (self._claims / f"{key}.{number + 1}").exists()
        return False

    def release(self, key: str, number: int) -> None:
        """Gives a cohort back that was not made."""
        if self.still_mine(key, number):
            with suppress(OSError):
                (self._claims / f"{key}.{number}").unlink()

    def fail(self, key: str, text: str) -> None:
        """Keeps why a cohort could not be made, for the others who share the work."""
        self._failed.mkdir(parents=True, exist_ok=True)
        write_atomically(self._failed / key, json.dumps({"worker": self.worker, "error": text}).encode())

    def failures(self) -> dict[str, str]:
        """By cohort why it could not be made; of workers that are there."""
        found: dict[str, str] = {}
        for name in os.listdir(self._failed) if self._failed.is_dir() else ():
            with suppress(OSError, ValueError, LookupError, TypeError):
                found[name] = str(json.loads((self._failed / name).read_text(encoding="utf-8"))["error"])
        return found

    def start_afresh(self) -> bool:
        """Forgets what former starts left; by the holder of the directory's lock.

        Failures are tried again, but for those of workers that are seen to be here. Claims count as long as anyone may be here.

        Returns:
            Whether nobody else is here.
        """
        others = self.others()
        for path in _files(self._failed):
            with suppress(OSError, ValueError, LookupError, TypeError):
                worker = json.loads(path.read_text(encoding="utf-8"))["worker"]
                if worker not in others or self._is_elsewhere(worker):
                    path.unlink()
        if others:
            return False
        for path in (*_files(self._claims), *(path for path in _files(self._workers) if self.worker not in path.name)):
            path.unlink(missing_ok=True)
        return True

    def _is_elsewhere(self, worker: str) -> bool:
        return json.loads((self._workers / worker).read_text(encoding="utf-8"))["machine"] != self.machine

    def sweep(self) -> None:
        """Removes everything where nobody else is here; by the holder of the directory's lock, after `working`."""
        if not self.others():
            for folder in (self._claims, self._failed, self._workers):
                for path in _files(folder):
                    path.unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.is_dir()] if folder.is_dir() else []
