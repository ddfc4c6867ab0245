"""`handful status` and `handful verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Json

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A run directory, the --out of generate.")]


def status(out: Out, json_wanted: Json = False) -> None:
    """Show how far a run is: images that are done, processes at work, what failed, the rate and the time left.

    \b
    Examples:
      handful status out
      watch -n 10 handful status out
    """
    from handful.runs.status import status as look
    from handful.runs.status import to_go_on

    found = look(out)
    print(json.dumps(found.as_dict()) if json_wanted else found.as_text())
    if not json_wanted and not found.workers and found.images_done < found.images:
        print(f"next: {to_go_on(out)}", file=sys.stderr)


def verify(out: Out, json_wanted: Json = False) -> None:
    """Check that every image of a run is there and unchanged: compares each with its SHA-256 in the manifest.

    \b
    Examples:
      handful verify out
    """
    from handful.runs.status import verify as check

    found = check(out)
    print(json.dumps(found.as_dict()) if json_wanted else found.as_text())
    if not found.whole:
        raise typer.Exit(1)
