"""`handful demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Quiet
from handful.errors import RequestError


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory; an interrupted demo goes on there.  [demo, or demo-cifar10]"),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="digits, or cifar10.")] = "digits",
    seeds: Annotated[int | None, typer.Option(help="Repetitions.  [3; cifar10: 1]")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images to generate of each class.  [64; cifar10: 16]")] = None,
    real: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE", help="cifar10: your own copy of its test images, a folder per class or a parquet file."
        ),
    ] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, alone on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Generate images without guidance, with classifier-free guidance and with guidance by exemplars, and compare them.

    digits: every set is judged on held-out real digits by a classifier that guided nothing, and a small classifier trained on
    it alone is tested on them; each seed draws exemplars anew. cifar10: a provisional model of photographs; exemplars and the
    real images that two judges compare with are packaged as features alone. Writes run directories, contact_sheet.png and
    results.json.

    \b
    Examples:
      handful demo --seeds 1
      handful demo --out demo --json > rows.json
      handful demo --model cifar10
      handful demo --model cifar10 --real cifar10-test.parquet
    """
    from handful.report.tables import demo_table, print_table

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    from handful.demo.digits import means

    if model == "digits":
        if real is not None:
            raise RequestError("--real", real, "the demo of digits has real digits of its own", "Leave it out.")
        from handful.demo.digits import demo as run_digits

        out = out or Path("demo")
        rows = run_digits(out, seeds=3 if seeds is None else seeds, per_class=64 if per_class is None else per_class, say=say)
        shown = demo_table(means(rows))
    elif model == "cifar10":
        from handful.demo.cifar10 import COLUMNS, table
        from handful.demo.cifar10 import demo as run_cifar10

        out = out or Path("demo-cifar10")
        rows = run_cifar10(
            out, seeds=1 if seeds is None else seeds, per_class=16 if per_class is None else per_class, real=real, say=say
        )
        shown = table(means(rows, tuple(COLUMNS)))
    else:
        raise RequestError("--model", model, "there is no demo of it", "Choose digits or cifar10.")
    if json_wanted:
        print(json.dumps(rows))
        return
    print_table(shown)
    print(f"\npictures: {out / 'contact_sheet.png'}   rows: {out / 'results.json'}   sets: {out}/seed-*/METHOD/")
