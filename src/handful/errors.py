"""handful's own errors, and how the command line reports each.

A `RequestError` is said before any work starts (exit code 2), a `RunError` is a failure at work (exit code 1). Errors
of the operating system (a full disk, a lost network folder) are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePath

# Values are shown to recognise them, not to reproduce them: a prompt list or a tensor must not fill the terminal.
_LONGEST_VALUE = 200


class HandfulError(Exception):
    """The base of handful's own errors: catch this to catch both kinds."""


class RequestError(HandfulError, ValueError):
    """The request can't be done; nothing has been started. The command line exits with 2. What "refuses" raises it.

    Reads as `field: value: problem. remedy`, for instance
    `exemplars: '/x/y': the folder is empty. Put 2 to 32 images into a folder per class.`

    Args:
        field: what was asked for, as the user named it (a recipe's key, an option, an argument).
        value: what was given. Paths and texts are quoted, bytes only counted, and long values shortened.
        problem: what is wrong with it; without a full stop.
        remedy: what to do; one or more sentences, with their full stops.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        # All four go to `args`, so that the error survives pickling on its way back from a worker process.
        super().__init__(field, value, problem, remedy)
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        given = "" if self.value is None else f"{_shown(self.value)}: "  # nothing was given
        return f"{self.field}: {given}{self.problem}. {self.remedy}"


class RunError(HandfulError, RuntimeError):
    """Something failed at work, after a valid request. The command line exits with 1."""


class Note(UserWarning):
    """Something the user should know that is no fault: the command line says `note:` where others are a `warning:`."""


def _shown(value: object) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value)} bytes>"
    shown = repr(str(value)) if isinstance(value, PurePath) else repr(value)
    if isinstance(value, (PurePath, str)) and len(shown) <= 5 * _LONGEST_VALUE:
        return shown  # half a path helps nobody
    return shown if len(shown) <= _LONGEST_VALUE else shown[: _LONGEST_VALUE - 3] + "..."


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def did_you_mean(given: str, known: Iterable[str], kind: str) -> str:
    """A remedy for an unknown name: the nearest known one, and the list of them (20 at most)."""
    known = list(known)
    near = get_close_matches(given, known, n=1)
    return (f"Did you mean '{near[0]}'? " if near else "") + f"{kind}: {some_of(known, 20) or 'none'}."


def some_of(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first ones, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, one: str) -> str:
    """A number with its noun: `1 image`, `2,000 images`, `1 class`, `3 copies`.

    Args:
        number: How many.
        one: The noun for one of them.
    """
    many = f"{one[:-1]}ies" if one.endswith("copy") else one + ("es" if one.endswith("s") else "s")
    return f"{number:,} {one if number == 1 else many}"
