"""The command line. Each command is a file of `handful.commands`, which imports what it needs when it runs.

Results go to stdout (with --json one object, alone), everything else to stderr. A command raises; `console.py` turns what
it raises into one line and an exit code.
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from handful import __version__, console
from handful.commands.calibrate import calibrate
from handful.commands.cost import cost
from handful.commands.demo import demo
from handful.commands.evaluate import evaluate
from handful.commands.exemplars import exemplars
from handful.commands.generate import generate
from handful.commands.invert import invert
from handful.commands.report import report
from handful.commands.sweep import sweep
from handful.commands.utility import utility

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"handful {__version__}")
        raise typer.Exit


@app.callback()
def _handful(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    """Turn a handful of real images into a training set.

    Guides pretrained diffusion models by a few real images of each class, without training them, and measures whether
    what comes out has the quality and the diversity of real data.
    """


app.command(short_help="Generate a labelled image set from exemplars.")(generate)
app.command(short_help="Fit a few images of a new domain, to generate many.")(invert)
app.command(short_help="Find which pre-conditioning suits a classifier that guides.")(calibrate)
app.command(short_help="Judge a generated set against real images.")(evaluate)
app.command(short_help="Train with and without the images: is it worth it?")(utility)
app.command(short_help="Write one page that shows a run.")(report)
app.command(short_help="Compare methods x scales x k x seeds, and choose.")(sweep)
app.command(short_help="Keep exemplars as features alone, to share.")(exemplars)
app.command(short_help="Say what a recipe costs, before anything runs.")(cost)
app.command(short_help="The main job on packaged digits, end to end.")(demo)


def main() -> NoReturn:
    """The console script: runs a command and exits with its code."""
    console.main(app)


if __name__ == "__main__":
    main()
