"""`handful evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Json, named_folders


def evaluate(
    synthetic: Annotated[Path, typer.Argument(help="Generated images: a run directory, or a folder per class.")],
    real: Annotated[Path, typer.Option(metavar="DIR", help="Real images, a folder per class; not the exemplars.")],
    features: Annotated[
        str, typer.Option(help="The judge: digits-judge, dinov2, clip, a directory, FILE.py:FUNCTION.", metavar="NAME")
    ] = "dinov2",
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="Say what is gained over this set, and what of it survives; repeatable."),
    ] = None,
    exemplars: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The exemplars: say how many generated images are copies of them.")
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Neighbour of precision, recall, density and coverage.", min=1)] = 5,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Judge again after mild transforms of both sets.")] = True,
    ceiling: Annotated[bool, typer.Option("--ceiling/--no-ceiling", help="Measure real against real too.")] = True,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON there as well.")] = None,
    json_wanted: Json = False,
) -> None:
    """Judge a generated set against real images: precision, recall, density, coverage, F1, Frechet distance, Vendi score.

    Each is pooled and per class, with the value that one half of the real images gets against the other beside it. The
    judge should be unrelated to what guided: a gain that only the guide's own family sees is adversarial. So all is judged
    again after JPEG, resampling, noise and a low-pass of real and generated images alike, and with a --baseline (the same
    model without guidance) each gain is told from chance and by how much of it survives.

    \b
    Examples:
      handful evaluate out --real digits-held-out/ --features digits-judge
      handful evaluate out --real photos-held-out/ --features dinov2 --json > result.json
      handful evaluate out --real photos-held-out/ --features my_judge.py:load --exemplars photos/
      handful evaluate out --real digits-held-out/ --features digits-judge --baseline out-none --baseline cfg=out-cfg
    """
    from handful.judge.evaluate import evaluate as judge
    from handful.report.tables import evaluation_table, gains_tables, print_table

    baselines = named_folders(baseline or [])
    found = judge(synthetic, real, features, k=k, audit=audit, ceiling=ceiling, baselines=baselines, exemplars=exemplars)
    text = json.dumps(found.to_dict(), indent=None if json_wanted else 1, allow_nan=False)
    if report is not None:
        from handful.data.images import write_atomically

        write_atomically(report, (text + "\n").encode())
    if json_wanted:
        print(text)
        return
    for number, table in enumerate([evaluation_table(found), *gains_tables(found)]):
        print("\n" * bool(number), end="")
        print_table(table)
