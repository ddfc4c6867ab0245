"""What a sweep leaves beside its rows: the chosen recipe and the pictures."""

from __future__ import annotations

from collections.abc import Sequence

from handful.recipe.file import recipe_yaml
from handful.runs.job_directory import OwnedDirectory
from handful.sweep.choice import Choice, Pick, choose
from handful.sweep.pictures import over_k_png, pareto_png
from handful.sweep.planned import PlannedSet
from handful.sweep.request import SweepRequest
from handful.sweep.results import Mean, Row
from handful.sweep.store import CHOSEN, OVER_K, PARETO


def write_outputs(directory: OwnedDirectory, sets: Sequence[PlannedSet], rows: Sequence[Row], request: SweepRequest) -> None:
    """Writes chosen.yaml, pareto.png and over_k.png, as far as the rows allow; what they do not allow is removed."""
    choice = choose(rows, request)
    contents = {
        CHOSEN: chosen_yaml(choice, sets).encode() if choice.best else None,
        PARETO: pareto_png(rows, request),
        OVER_K: over_k_png(rows, request),
    }
    for name, content in contents.items():
        if content is None:
            (directory.path / name).unlink(missing_ok=True)
        else:
            directory.publish(name, content)


def chosen_yaml(choice: Choice, sets: Sequence[PlannedSet]) -> str:
    """The best setting's recipe, ready for `handful generate`, with what speaks for it as comments."""
    assert choice.best is not None
    recipe = next(each.recipe for each in sets if each.setting == choice.best.setting)
    return "".join(f"# {line}".rstrip() + "\n" for line in _reasons(choice.best, choice.objective)) + recipe_yaml(recipe)


def _reasons(best: Pick, objective: str) -> list[str]:
    lines = [
        f"Chosen by handful sweep: {best.setting}, for its mean {objective} over {len(best.validation.seeds)} seed(s).",
        f"  validation half (chosen by): {_shown(best.validation, objective)}",
    ]
    if best.test is not None:
        lines.append(f"  test half (reported on):     {_shown(best.test, objective)}")
    return [*lines, "", "  handful generate chosen.yaml --out out"]


def _shown(found: Mean, objective: str) -> str:
    mean, spread = found.mean[objective], found.spread[objective]
    return f"{objective} {mean:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
