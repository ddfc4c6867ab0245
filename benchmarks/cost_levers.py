"""How far each lever brings Chamfer's operations down, as shares of classifier-free guidance's, on the full-size recipes.

    python benchmarks/cost_levers.py                     # a few minutes, without weights, exemplars or network
    python benchmarks/cost_levers.py --json levers.json

A table a model: how guidance looks at images down, on every how many steps across. The default is "exact, 1/8 size", every
10 of 40 steps. Nothing here says what a lever costs in quality: RESULTS.md does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from handful.cost.estimate import cost_of
from handful.recipe.file import overridden, read_mapping
from handful.recipe.schema import recipe_from

RECIPES = Path(__file__).parents[1] / "recipes"
MODELS = ("sd15", "sd35-medium", "dit-xl-2-256")
EVERY = (1, 2, 4, 8, 10)
TINY = "madebyollin/taesd"  # any tiny autoencoder: only its architecture is counted


def looks() -> dict[str, list[str]]:
    """Settings of the recipe by what to call them: how guidance looks at images, and by which jacobian."""
    table: dict[str, list[str]] = {}
    for jacobian in ("exact", "gaussian"):
        exactness = f"guidance.0.jacobian={jacobian}"
        for reduce in (1, 2, 4, 8):
            table[f"{jacobian}, 1/{reduce} size"] = [exactness, f"guidance.0.reduce={reduce}"]
        whole = [exactness, "guidance.0.reduce=1"]
        tiny, small = f"model.preview_decoder={TINY}", "guidance.0.features=dinov2-small"
        table[f"{jacobian}, tiny decoder"] = [*whole, tiny]
        table[f"{jacobian}, dinov2-small"] = [*whole, small]
        table[f"{jacobian}, dinov2@112"] = [*whole, "guidance.0.features=dinov2@112"]
        table[f"{jacobian}, tiny decoder, dinov2-small@112"] = [*whole, tiny, f"{small}@112"]
        table[f"{jacobian}, 1/8 size, chunks of 4"] = [exactness, "guidance.0.reduce=8", "chunk=4"]
    return table


def ratios(model: str, settings: list[str]) -> dict[str, Any]:
    """The share of classifier-free guidance's operations by `every`, and the peak, of one model.

    Counted on every step and shared out: a held direction costs nothing, so the extra goes with the number of guided steps.
    """
    settings = [*settings, "guidance.0.every=1"]
    found = cost_of(recipe_from(overridden(read_mapping(RECIPES / f"{model}-chamfer.yaml"), {}, settings=settings)))
    plain, cfg = found.plain.flops_per_image, found.cfg.flops_per_image
    extra = (found.recipe.flops_per_image - plain) / found.steps
    by_every = {str(every): (plain + found.steps // every * extra) / cfg for every in EVERY}
    return {"model": model, "ratio_to_cfg": by_every, "peak_bytes": found.recipe.peak_bytes, "cohort": found.cohort}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        print(
            f"\n| {model} | "
            + " | ".join(f"every {every}" for every in EVERY)
            + " | peak GB |\n"
            + "|---" * (len(EVERY) + 2)
            + "|"
        )
        for name, settings in looks().items():
            row = ratios(model, settings)
            rows.append({"levers": name, "settings": settings, **row})
            cells = [f"{share:.3f}" for share in row["ratio_to_cfg"].values()]
            print(f"| {name} | " + " | ".join(cells) + f" | {row['peak_bytes'] / 1e9:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
