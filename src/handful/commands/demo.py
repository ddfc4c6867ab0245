"""`handful demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory; an interrupted demo goes on there.")] = Path(
        "demo"
    ),
    seeds: Annotated[int, typer.Option(help="Repetitions, exemplars drawn anew in each.")] = 3,
    per_class: Annotated[int, typer.Option(help="Images to generate of each class.")] = 64,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Generate digits without guidance, with classifier-free guidance and with Chamfer guidance, and compare them.

    Every set is judged on held-out real digits by a classifier that guided nothing, and a small classifier trained on it
    alone is tested on them. Writes run directories, contact_sheet.png and results.json.

    \b
    Examples:
      handful demo --seeds 1
      handful demo --out demo --json > rows.json
    """
    from handful.demo import demo as run_demo
    from handful.demo import means
    from handful.tables import demo_table, print_table

    rows = run_demo(out, seeds=seeds, per_class=per_class, say=lambda text: None if quiet else print(text, file=sys.stderr))
    if json_wanted:
        print(json.dumps(rows))
        return
    print_table(demo_table(means(rows)))
    print(f"\npictures: {out / 'contact_sheet.png'}   rows: {out / 'results.json'}   sets: {out}/seed-*/METHOD/")
