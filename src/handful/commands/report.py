"""`handful report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Json


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="A run directory; further ones are compared with it.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The HTML file to write.  [report.html in the first directory]")
    ] = None,
    json_wanted: Json = False,
) -> None:
    """Write one page that shows a run: images beside their exemplars, copies, metrics, cost, and the recipe.

    The page is one file: it loads nothing from elsewhere and can be mailed. Further directories, and the baselines of
    handful evaluate, are shown beside the run, image by image from the same noise. The results of handful evaluate and
    handful utility are read from the run directory.

    \b
    Examples:
      handful report out
      handful report out out-none out-cfg --out comparison.html
    """
    from handful.report.html import report as write

    file = write(runs, out)
    print(json.dumps({"report": str(file), "bytes": file.stat().st_size}) if json_wanted else f"open {file}")
