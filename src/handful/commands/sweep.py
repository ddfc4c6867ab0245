"""`handful sweep`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful import console
from handful.commands.shared import AllowVersionChange, DryRun, Json, Quiet, hide_bars, print_notes
from handful.errors import counted

if TYPE_CHECKING:
    from handful.sweep import SweepResult


def sweep(
    request: Annotated[
        Path,
        typer.Argument(
            help="A sweep request: the methods and settings to compare, and what to choose by.", metavar="SWEEP.yaml"
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new directory, or that of an interrupted sweep, which continues.")
    ],
    only: Annotated[list[str] | None, typer.Option(metavar="METHOD", help="Only this method; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field of the request; may be repeated.")
    ] = None,
    dry_run: DryRun = False,
    allow_version_change: AllowVersionChange = False,
    json_wanted: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods, scales, numbers of exemplars (k) and seeds, and choose the setting that is best by one objective.

    Every set is an ordinary run directory in DIR/sets. Settings are chosen by one half of the real images and reported on
    the other. Writes results.parquet (a row for each set and half), chosen.yaml (a recipe of the best setting), pareto.png
    and, where several k were compared, over_k.png.

    \b
    Examples:
      handful sweep recipes/sweeps/digits.yaml --out sweep
      handful sweep recipes/sweeps/digits.yaml --out sweep --dry-run
      handful sweep recipes/sweeps/digits.yaml --out sweep --only chamfer --set 'seeds=[0, 1, 2, 3, 4]'
      handful sweep recipes/sweeps/digits.yaml --out sweep --set objective=utility --set 'within={cost_ratio: 1.15}'
      handful generate sweep/chosen.yaml --out out --per-class 1000

    The same command continues an interrupted sweep. Methods, scales, k and seeds may be added later; existing rows are kept.
    """
    from handful.sweep import read_sweep

    asked = read_sweep(request, settings or ())
    hide_bars(quiet)
    from handful.report.tables import print_table
    from handful.runs.progress import Words, progress_for
    from handful.sweep.checked import prepare_sweep
    from handful.sweep.printed import choice_table, plan_as_dict, plan_table, results_table
    from handful.sweep.work import run_sweep

    job = prepare_sweep(asked, out, only=only, allow_version_change=allow_version_change)
    print_notes(job.notes, quiet)
    if dry_run:
        if json_wanted:
            print(json.dumps(plan_as_dict(job)))
        else:
            print_table(plan_table(job))
        return
    result = run_sweep(job, progress_for(quiet, Words("sweeping", "finished", "sets")))
    failed = f"{len(result.failures)} of {counted(result.sets, 'set')} failed" if result.failures else None
    if json_wanted:
        print(json.dumps(_as_dict(result) | ({"error": console.error_object("run", failed)} if failed else {})))
    elif result.rows:
        choice = result.choice()
        print_table(results_table(result.rows, result.request, choice))
        print()
        print_table(choice_table(choice))
        print(
            f"\nsets: {result.done} measured, {result.resumed} already done, {len(result.failures)} failed; "
            f"{', '.join(result.files)} in {result.out}"
        )
    if failed:
        for failure in result.failures:
            print(f"error: {failure}", file=sys.stderr)
        print(f"error: {failed}; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


def _as_dict(result: SweepResult) -> dict[str, Any]:
    from handful.metrics.summary import plain

    return plain(
        {
            "out": str(result.out),
            "sets": result.sets,
            "done": result.done,
            "resumed": result.resumed,
            "failures": result.failures,
            "notes": result.notes,
            "files": result.files,
            "choice": result.choice().as_dict(),
            "rows": result.rows,
        }
    )
