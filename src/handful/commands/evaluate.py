"""`handful evaluate`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Json, Quiet, Workers, listed, named_folders, pairs, renamed, require_writable


def evaluate(
    synthetic: Annotated[Path, typer.Argument(help="Generated images: a run directory, or a folder per class.")],
    real: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Real images; geode:DIR, dollarstreet:DIR.  [those of the exemplars' folder that were not drawn]",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="dinov2, clip, efficientnet-lite0, fdd, fid, digits-judge, cifar10-judge, uci-judge, a directory, or "
            "FILE.py:FUNCTION.  [dinov2]",
            metavar="NAME",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="Say what is gained over this set, and what of it survives; repeatable."),
    ] = None,
    exemplars: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The exemplars: say how many generated images are copies of them.")
    ] = None,
    neighbours: Annotated[
        int | None,
        typer.Option(
            help="k of precision, recall, density and coverage.  [5; of GeoDE and DollarStreet 3]", min=1, metavar="K"
        ),
    ] = None,
    judge_class: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER=CLASS", help="Which of the judge's classes a folder is, by name or number; repeatable."),
    ] = None,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Judge again after mild transforms of both sets.")] = True,
    ceiling: Annotated[bool, typer.Option("--ceiling/--no-ceiling", help="Measure real against real too.")] = True,
    groups: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Measure by group too: a column, a CSV of image and group, or '.* in (.*)'."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Measure also: kernel_distance, frechet_infinity, authenticity, cmmd.")
    ] = None,
    clip: Annotated[str | None, typer.Option(metavar="NAME", help="A CLIP, for CLIPScore: image to its prompt.")] = None,
    workers: Workers = 1,
    save_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON there as well.")] = None,
    json_wanted: Json = False,
    quiet: Quiet = False,
    features: Annotated[str | None, typer.Option(hidden=True)] = None,
    k: Annotated[int | None, typer.Option("--k", hidden=True, min=1)] = None,
    report: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Judge a generated set against real images: precision, recall, density, coverage, F1, Frechet distance, Vendi score.

    Each is pooled and per class, with the value that one half of the real images gets against the other beside it. The
    judge should be unrelated to the network that guided: a gain that only such a network sees is not real. So all is judged
    again after JPEG, resampling, noise and a low-pass of real and generated images alike, and with a --baseline (the same
    model without guidance) each gain is told from chance and by how much of it survives.

    The judge's answers are kept by content: an interrupted evaluation goes on, and a second one starts at once.

    \b
    Examples:
      handful evaluate out --real digits-held-out/ --judge digits-judge
      handful evaluate out --real photos-held-out/ --judge dinov2 --json > result.json
      handful evaluate out --real photos-held-out/ --judge my_judge.py:load --exemplars photos/
      handful evaluate out --real digits-held-out/ --judge digits-judge --baseline out-none --baseline cfg=out-cfg
      handful evaluate out --real photos/ --judge cifar10-judge --judge-class plane=airplane --judge-class car=automobile
    """
    judge = renamed("--features", features, "--judge", judge) or "dinov2"
    neighbours = renamed("--k", k, "--neighbours", neighbours)
    save_json = renamed("--report", report, "--save-json", save_json)
    baselines, classes = named_folders(baseline or []), pairs("--judge-class", judge_class)
    if save_json is not None:
        require_writable(save_json)
    from handful.judge.evaluate import evaluate as judged
    from handful.report.tables import evaluation_table, gains_tables, group_tables, print_table, wrapped
    from handful.runs.kept import run_root
    from handful.runs.progress import Words, progress_for

    found = judged(
        synthetic,
        real,
        judge,
        neighbours=neighbours,
        audit=audit,
        ceiling=ceiling,
        baselines=baselines,
        exemplars=exemplars,
        judge_class=classes,
        groups=groups,
        metrics=listed(metrics) or (),
        clip=clip,
        workers=workers,
        progress=progress_for(quiet, Words("judging", "judged", "images")),
    )
    text = json.dumps(found.to_dict(), indent=None if json_wanted else 1, allow_nan=False)
    if json_wanted:
        print(text, flush=True)
    else:
        for number, table in enumerate([evaluation_table(found), *group_tables(found), *gains_tables(found)]):
            print("\n" * bool(number), end="")
            print_table(table)
        print("", *wrapped(found.verdict), sep="\n")
        if not quiet and run_root(synthetic) is not None:
            print(f"next: handful report {shlex.quote(str(synthetic))} (one page to look at)", file=sys.stderr)
    if save_json is not None:  # after the result is printed: a full disk takes nothing
        from handful.files.atomic import write_atomically

        write_atomically(save_json, (text + "\n").encode())
