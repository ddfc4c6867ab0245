"""`handful evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    synthetic: Annotated[Path, typer.Argument(help="Generated images: a run directory, or a folder per class.")],
    real: Annotated[Path, typer.Option(metavar="DIR", help="Real images, a folder per class; not the exemplars.")],
    features: Annotated[
        str, typer.Option(help="The judge: digits-judge, dinov2, clip, a directory, FILE.py:FUNCTION.", metavar="NAME")
    ] = "dinov2",
    k: Annotated[int, typer.Option("--k", help="Neighbour of precision, recall, density and coverage.", min=1)] = 5,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Judge again after mild transforms of both sets.")] = True,
    ceiling: Annotated[bool, typer.Option("--ceiling/--no-ceiling", help="Measure real against real too.")] = True,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON there as well.")] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")] = False,
) -> None:
    """Judge a generated set against real images: precision, recall, density, coverage, F1, Frechet distance, Vendi score.

    Each is pooled and per class, with the value that one half of the real images gets against the other beside it. The
    judge should be unrelated to what guided: a gain that only the guide's own family sees is adversarial.

    \b
    Examples:
      handful evaluate out --real digits-held-out/ --features digits-judge
      handful evaluate out --real photos-held-out/ --features dinov2 --json > result.json
      handful evaluate out --real photos-held-out/ --features my_judge.py:load
    """
    from handful.evaluate import evaluate as judge
    from handful.tables import evaluation_table, print_table

    found = judge(synthetic, real, features, k=k, audit=audit, ceiling=ceiling)
    text = json.dumps(found.to_dict(), indent=None if json_wanted else 1)
    if report is not None:
        from handful.images import write_atomically

        write_atomically(report, (text + "\n").encode())
    if json_wanted:
        print(text)
    else:
        print_table(evaluation_table(found))
