"""`handful demo`."""

from __future__ import annotations

import json
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Quiet
from handful.errors import RequestError

MODELS = {"mnist": (3, 24), "digits": (3, 64), "cifar10": (1, 16)}  # seeds, images of each class


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A new directory, or that of an interrupted demo, which continues.  [demo for mnist, else demo-MODEL]",
        ),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="mnist, digits, or cifar10.")] = "mnist",
    seeds: Annotated[int | None, typer.Option(help="Number of repetitions, each with its own seed.  [3; cifar10: 1]")] = None,
    per_class: Annotated[
        int | None, typer.Option(help="Images to generate of each class.  [24; digits: 64; cifar10: 16]")
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE", help="For cifar10 only: your own copy of its test images, a folder per class or a parquet file."
        ),
    ] = None,
    json_wanted: Annotated[
        bool, typer.Option("--json", help="Print the rows as JSON on stdout, and nothing else there.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Generate images without guidance, with classifier-free guidance and with guidance by exemplars, and compare them.

    mnist: a published model of MNIST, and other people's digits: what 2, 4 or 16 real images of each class are worth alone, and
    with synthetic ones. digits: a small model that has collapsed onto typical digits. cifar10: a small model of photographs;
    its exemplars and the real images to compare with are packaged as features only. Each seed draws new noise and (except for
    cifar10) new exemplars. Writes run directories, contact_sheet.png, results.json and, for mnist, report.html.

    \b
    Examples:
      handful demo --seeds 1
      handful demo --out demo --json > rows.json
      handful demo --model digits
      handful demo --model cifar10 --real cifar10-test.parquet
    """
    if model not in MODELS:
        raise RequestError("--model", model, "there is no such demo", "Choose mnist, digits or cifar10.")
    if real is not None and model != "cifar10":
        raise RequestError("--real", real, f"the {model} demo uses its own packaged real digits", "Leave --real out.")
    from handful.demo.compared import means, table_of
    from handful.report.tables import WIDTH, print_table

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    made = import_module(f"handful.demo.{model}")
    usual = MODELS[model]
    out = out or Path("demo" if model == "mnist" else f"demo-{model}")
    sizes = {"seeds": usual[0] if seeds is None else seeds, "per_class": usual[1] if per_class is None else per_class}
    rows = made.demo(out, **sizes, **({} if real is None else {"real": real}), say=say)
    if json_wanted:
        print(json.dumps(rows))
        return
    mean = means(rows, tuple(made.COLUMNS))
    print_table(table_of(made.TITLE, mean, made.COLUMNS, made.NOTES))
    if hasattr(made, "answer"):
        print("\n" + textwrap.fill(made.answer(mean), WIDTH))
    page = out / "report.html"
    print(f"\nreport: {page}" if page.is_file() else "")
    print(f"pictures: {out / 'contact_sheet.png'}   rows: {out / 'results.json'}   sets: {out}/seed-*/METHOD/")
