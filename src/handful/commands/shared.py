"""What commands share: the options that mean the same everywhere, and how lists are written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

ClassNames = Annotated[str | None, typer.Option(metavar="A,B,...", help="Names of all the model's classes, by label.")]
NullClass = Annotated[int | None, typer.Option(help='The model\'s label for "no class".')]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, of the networks.  [float32]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.  [auto]")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Run the code in a pickled network: only of people that you trust.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]


def listed(text: str | None) -> list[str] | None:
    """ "a, b" -> ["a", "b"], and '"a, b", c' -> ["a, b", "c"]; None stays None."""
    return None if text is None else [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]


def named_folders(given: list[str], field: str = "baseline") -> dict[str, Path]:
    """`DIR` or `NAME=DIR`, by name; a folder without a name goes by its own.

    Raises:
        RequestError: If two have one name, or a name or a folder is blank.
    """
    from handful.errors import RequestError

    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, folder = Path(text).expanduser().resolve().name, text
        if not name or not folder:
            raise RequestError(field, text, "this names no folder", "Write DIR or NAME=DIR.")
        if name in folders:
            raise RequestError(field, text, f"'{folders[name]}' is called {name} as well", f"Write {name}-2={folder}.")
        folders[name] = Path(folder)
    return folders
