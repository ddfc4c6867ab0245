"""What commands share: the options that mean the same everywhere, and how lists are written."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from handful.errors import RequestError

T = TypeVar("T")

ClassNames = Annotated[
    str | None, typer.Option(metavar="A,B,...", help="Names of all classes of the model, in the order of its labels.")
]
Classes = Annotated[str | None, typer.Option(metavar="A,B,...", help="Only these classes.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.  [18]")]
Seed = Annotated[int | None, typer.Option(help="Random seed of all noise.  [0]")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other field of the recipe; may be repeated.")
]
AllowVersionChange = Annotated[bool, typer.Option("--allow-version-change", help="Continue what other library versions began.")]
NullClass = Annotated[int | None, typer.Option(help='The model\'s label for "no class".')]
Dtype = Annotated[str | None, typer.Option(help="Precision of the networks: float32, bfloat16 or float16.  [float32]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.  [auto]")]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Load pickled networks, which can run any code: only for files from people you trust."),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="24GB",
        help="Choose chunk, vae_slicing, vae_tiling and offload so that the predicted peak memory stays below this.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, on stderr.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes on this machine that compute features.", metavar="N")]


def print_notes(notes: Iterable[str], quiet: bool = False) -> None:
    """Prints what the user should know to stderr."""
    for note in () if quiet else notes:
        print(f"note: {note}", file=sys.stderr)


def hide_bars(quiet: bool) -> None:
    """With --quiet, hides the bars that libraries show while they load."""
    if quiet:
        from handful.models.libraries import hide_loading_bars

        hide_loading_bars()


def lora_option(text: str) -> dict[str, str | float]:
    """`FILE:0.8` -> its path and weight; a file's own name may hold colons."""
    path, _, weight = text.rpartition(":")
    try:
        return {"path": path, "weight": float(weight)} if path else {"path": text}
    except ValueError:
        return {"path": text}


def listed(text: str | None) -> list[str] | None:
    """ "a, b" -> ["a", "b"], and '"a, b", c' -> ["a, b", "c"]; None stays None."""
    return None if text is None else [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def label_pairs(text: str) -> dict[str, int | str]:
    """ "cat=281,dog=n02099601" -> {"cat": 281, "dog": "n02099601"}."""
    found = pairs("--labels", listed(text))
    return {name: int(label) if label.isdecimal() else label for name, label in found.items()}


def named_folders(given: list[str], field: str = "baseline") -> dict[str, Path]:
    """`DIR` or `NAME=DIR`, by name; a folder without a name goes by its own.

    Raises:
        RequestError: If two have one name, or a name or a folder is blank.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, folder = Path(text).expanduser().resolve().name, text
        if not name or not folder:
            raise RequestError(field, text, "the name or the folder is empty", "Write DIR or NAME=DIR.")
        if name in folders:
            raise RequestError(field, text, f"'{folders[name]}' has the name '{name}' too", f"Write {name}-2={folder}.")
        folders[name] = Path(folder)
    return folders


def renamed(old: str, given: T | None, new: str, value: T | None) -> T | None:
    """The value of an option that had another name in the last release; its old name still works, with a note.

    Raises:
        RequestError: If both are given.
    """
    if given is None:
        return value
    if value is not None:
        raise RequestError(old, given, f"this is the former name of {new}, which is given too", f"Leave {old} out.")
    print(f"note: {old} is now called {new}", file=sys.stderr)
    return given


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """`A=B` texts, by what stands before the last =.

    Raises:
        RequestError: If one is no pair, or one name has two values.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        if not name or not value:
            raise RequestError(option, text, "there is nothing on one side of =", "Write NAME=VALUE.")
        if found.setdefault(name, value) != value:
            raise RequestError(option, text, f"{name} is given twice; it is {found[name]} already", "Give each name once.")
    return found


def require_writable(file: Path) -> None:
    """Refuses, before the long work, a file that could not be written after it.

    Raises:
        RequestError: If its folder is missing or read-only, or it is a folder itself.
    """
    if file.is_dir():
        raise RequestError("--save-json", file, "this is a folder", "Name a file in it.")
    if file.exists() and not file.is_file():  # a device or a pipe, which a whole file would replace
        raise RequestError(
            "--save-json", file, "this is not a regular file", "Name another file, or use --json to print the result."
        )
    if not file.parent.is_dir():
        raise RequestError("--save-json", file, f"there is no folder '{file.parent}'", "Create it, or name another file.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise RequestError("--save-json", file, "you may not write this file", "Name another file.")
