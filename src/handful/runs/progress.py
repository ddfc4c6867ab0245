"""How far a long job is: a bar on a terminal, a plain line every few seconds elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Words:
    """What a job does: `doing` so many `units`, then it has `done` them."""

    doing: str
    done: str
    units: str


IMAGES = Words("generating", "generated", "images")


class Progress:
    """Is notified of a job's progress, and shows nothing. Subclasses override what they want to show.

    `begin(total, done)` once, then `advance(amount)` with fractions as they come, `note(text)` any time, `end()` once.
    """

    def begin(self, total: int, done: int) -> None:
        """The job has `total` units (images), of which `done` were there before."""

    def advance(self, amount: float, now: str = "") -> None:
        """So many more units are done; `now` says where the job is, in a few words."""

    def note(self, text: str) -> None:
        """Something the user should see now, in one line."""

    def end(self) -> None:
        """The job is over, well or not."""


class Lines(Progress):
    """Plain lines: `generated 128 of 640 images, 12.3 images/s, 42 s left`.

    Args:
        seconds: At most one line in so many seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        words: Words = IMAGES,
    ) -> None:
        self._stream, self._seconds, self._clock, self._words = stream or sys.stderr, seconds, clock, words
        self._total, self._before, self._now = 0, 0, ""
        self._done = self._began = self._last = 0.0

    def begin(self, total: int, done: int) -> None:
        self._total, self._before, self._done = total, done, 0.0
        self._began = self._last = self._clock()
        there = f" ({done} of {total} exist already)" if done else ""
        self._say(f"{self._words.doing} {total - done} {self._words.units}{there}")

    def advance(self, amount: float, now: str = "") -> None:
        self._done, self._now = self._done + amount, now
        if self._clock() - self._last >= self._seconds:
            self._last = self._clock()
            self._say(self._line())

    def note(self, text: str) -> None:
        self._say(text)

    def end(self) -> None:
        if self._done:
            self._say(self._line())

    def _line(self) -> str:
        rate = self._done / max(1e-9, self._clock() - self._began)
        left = max(0.0, self._total - self._before - self._done)
        words = self._words
        text = f"{words.done} {self._before + round(self._done)} of {self._total} {words.units}, {pace(rate, words.units)}"
        text += f", {duration(left / rate)} left" if left >= 0.5 and rate else ""
        return text + (f"; {self._now}" if self._now else "")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Bar(Progress):
    """A bar with rate and time left, for terminals."""

    def __init__(self, words: Words = IMAGES) -> None:
        self._words = words
        self._bar: Any = None
        self._task: Any = None

    def begin(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        units = self._words.units

        class Whole(MofNCompleteColumn):
            """Counts whole units, though the bar moves with every step."""

            def render(self, task: Any) -> Any:
                from rich.text import Text

                return Text(f"{int(task.completed + 1e-6)}/{int(task.total or 0)} {units}", style="progress.download")

        rate = TextColumn("{task.fields[rate]}")
        self._bar = RichProgress(
            TextColumn(self._words.doing),
            BarColumn(),
            Whole(),
            rate,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._began, self._made = time.monotonic(), 0.0
        self._task = self._bar.add_task("", total=total, completed=done, rate="")
        self._bar.start()

    def advance(self, amount: float, now: str = "") -> None:
        self._made += amount
        rate = self._made / max(1e-9, time.monotonic() - self._began)
        told = pace(rate, self._words.units) + (f"; {now}" if now else "")
        self._bar.update(self._task, advance=amount, rate=told)

    def note(self, text: str) -> None:
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def progress_for(quiet: bool = False, words: Words = IMAGES) -> Progress:
    """What suits this stderr: nothing, a bar, or lines."""
    if quiet:
        return Progress()
    return Bar(words) if sys.stderr.isatty() else Lines(words=words)


def pace(rate: float, units: str) -> str:
    """`12.3 images/s`, or `29 s each` where one takes longer than a second."""
    return f"{rate:.3g} {units}/s" if rate >= 1 or rate <= 0 else f"{duration(1 / rate)} each"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
