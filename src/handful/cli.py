"""The command line. Each command is a file of `handful.commands`, which imports what it needs when it runs.

Results go to stdout (with --json one object, alone), everything else to stderr. A command raises; `console.py` turns what
it raises into one line and an exit code.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from handful import __version__, console
from handful.commands.calibrate import calibrate
from handful.commands.cost import cost
from handful.commands.demo import demo
from handful.commands.doctor import doctor
from handful.commands.evaluate import evaluate
from handful.commands.exemplars import exemplars
from handful.commands.generate import generate
from handful.commands.invert import invert
from handful.commands.report import report
from handful.commands.status import status, verify
from handful.commands.sweep import sweep
from handful.commands.utility import utility

# What people want: the commands for it, each with a line for somebody who has never used it.
COMMANDS: dict[str, dict[Any, str]] = {
    "Make": {
        generate: "Make new images of your classes with a pretrained model.",
        invert: "Prepare a model for a new kind of image, from about ten of them.",
        exemplars: "Save features of your real images, to share in their place.",
    },
    "Judge": {
        evaluate: "How good and how varied are the new images? Is the gain real?",
        utility: "Is it worth it? Train classifiers with and without the new images.",
        report: "One page to look at: images, copies, metrics, cost.",
    },
    "Choose": {
        sweep: "Try methods and settings, and take the best.",
        calibrate: "Find the settings with which your own classifier guides best.",
        cost: "What will it cost? Count before anything runs.",
    },
    "Inspect": {
        demo: "See it work on packaged images, without any of your own.",
        status: "How far is a run, and which processes work on it?",
        verify: "Are all images of a run there, and unchanged?",
        doctor: "What is installed, what is missing, and what to do.",
    },
}
QUICKSTART = """\
handful: turn a handful of real images into a training set.

  photos/cat/1.jpg, photos/cat/2.jpg, photos/dog/1.jpg ...     a folder per class

  handful generate --model MODEL --exemplars photos --k 8 --out out
  handful evaluate out --judge JUDGE
  handful report out

MODEL is a directory or hub name of a diffusion model, or a packaged one: mnist, digits, cifar10.
JUDGE is another network, which measures the images: dinov2, clip, or a packaged one: uci-judge (for mnist), digits-judge,
cifar10-judge.
To see it work first: handful demo
All commands: handful --help"""


class _Grouped(TyperGroup):
    """Lists the commands by what people want."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        named = {group: {command.__name__: text for command, text in of.items()} for group, of in COMMANDS.items()}
        for group, of_group in named.items():
            with formatter.section(group):
                formatter.write_dl(list(of_group.items()))


class _Command(TyperCommand):
    """Says so where an option that takes one value is given twice: the last one counts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = Counter(id(each) for each in self.make_parser(ctx).parse_args(args=list(args))[2])
        quiet, rest = bool({"-q", "--quiet"} & set(args)), super().parse_args(ctx, args)
        for each in self.params:
            once = not getattr(each, "multiple", True) and not getattr(each, "is_flag", False)
            if once and given[id(each)] > 1 and not quiet:
                print(f"note: {each.opts[0]} is given {given[id(each)]} times; the last one counts", file=sys.stderr)
        return rest


app = typer.Typer(
    cls=_Grouped,
    invoke_without_command=True,
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
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Turn a handful of real images into a training set.

    Guides pretrained diffusion models by a few real images of each class, without training them, and measures whether
    what comes out has the quality and the diversity of real data.
    """
    if ctx.invoked_subcommand is None:
        print(QUICKSTART)


for _of_group in COMMANDS.values():
    for _command, _text in _of_group.items():
        app.command(short_help=_text, cls=_Command)(_command)


def main() -> NoReturn:
    """The console script: runs a command and exits with its code."""
    console.main(app)


if __name__ == "__main__":
    main()
