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
    synthetic: Annotated[Path, typer.Argument(metavar="OUT", help="Generated images: a run directory, or a folder per class.")],
    real: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Real images, a folder per class; or geode:DIR, dollarstreet:DIR.  [images of the exemplars' folder that "
            "were not used as exemplars]",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="The network that judges: dinov2, clip, efficientnet-lite0, fdd, fid, digits-judge, cifar10-judge, "
            "uci-judge, a directory, or FILE.py:FUNCTION.  [dinov2]",
            metavar="NAME",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Another generated set, such as one without guidance: report the gains over it; may be repeated.",
        ),
    ] = None,
    exemplars: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The exemplars, a folder per class: count the generated images that are near copies of them."
        ),
    ] = None,
    neighbours: Annotated[
        int | None,
        typer.Option(
            help="Number of nearest neighbours in precision, recall, density and coverage.  [5; GeoDE and DollarStreet: 3]",
            min=1,
            metavar="K",
        ),
    ] = None,
    judge_class: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER=CLASS",
            help="Which of the judge's classes a folder shows, by name or number, such as plane=airplane; may be repeated.",
        ),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Judge again after mild transforms of both sets, such as JPEG.")
    ] = True,
    ceiling: Annotated[
        bool, typer.Option("--ceiling/--no-ceiling", help="Also measure real images against real images, as an upper limit.")
    ] = True,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Also measure each group: a column of the manifest, a CSV file with image and "
            "group, or a pattern of class names such as '.* in (.*)'.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Further metrics: kernel_distance, frechet_infinity, authenticity, cmmd."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A CLIP model (a directory or hub name): also measure CLIPScore, the match of each image with its prompt.",
        ),
    ] = None,
    workers: Workers = 1,
    save_json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result to this file, as JSON.")] = None,
    json_wanted: Json = False,
    quiet: Quiet = False,
    features: Annotated[str | None, typer.Option(hidden=True)] = None,
    k: Annotated[int | None, typer.Option("--k", hidden=True, min=1)] = None,
    report: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Judge a generated set against real images: precision, recall, density, coverage, F1, Frechet distance, Vendi score.

    Each is given for all images and per class. Beside it stands the value for real images: one half of them judged against the
    other half. The judge should be unrelated to the network that guided, because a gain that only that network sees is not
    real. All images, real and generated, are judged again after JPEG, resampling, noise and a low-pass filter. With a
    --baseline (the same model without guidance), each gain is tested against chance, and the share of it that survives these
    transforms is shown.

    The judge's features are cached: an interrupted evaluation continues, and a second one starts at once.

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
