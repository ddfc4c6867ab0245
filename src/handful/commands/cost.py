"""`handful cost`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Fit, Json, Settings


def cost(
    recipe: Annotated[Path, typer.Argument(help="A recipe; the options below override it.", metavar="RECIPE.yaml")],
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Images guided together.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images of each class.")] = None,
    settings: Settings = None,
    fit: Fit = None,
    json_wanted: Json = False,
) -> None:
    """Predict what a recipe costs, before anything runs: operations per image, parameters, peak memory.

    Sampling without guidance and classifier-free guidance of the same model are shown for comparison. No weights and no
    exemplars are read, and no image is made. Published models are known by their hub names; others need their configs, in a
    directory or the hub.

    \b
    Examples:
      handful cost recipes/sd15-chamfer.yaml
      handful cost recipes/sd15-chamfer.yaml --set guidance.0.jacobian=gaussian --set chunk=8
      handful cost recipes/sd15-chamfer.yaml --fit 24GB
      handful cost recipe.yaml --json
    """
    from handful.cost.estimate import cost_of
    from handful.cost.fit import fitted
    from handful.recipe.file import overridden, read_mapping
    from handful.recipe.schema import recipe_from
    from handful.report.tables import cost_tables, print_table

    flags = {"sampler.steps": steps, "cohort": cohort, "per_class": per_class}
    asked, notes = recipe_from(overridden(read_mapping(recipe), flags, settings=settings or ())), []
    if fit is not None:
        asked, notes = fitted(asked, fit)
    found = cost_of(asked)
    found.notes.extend(notes)
    if json_wanted:
        print(json.dumps(found.as_dict()))
        return
    for index, table in enumerate(cost_tables(found)):
        print("\n" * (index > 0), end="")
        print_table(table)
    for note in found.notes:
        print(f"\n{note}")
