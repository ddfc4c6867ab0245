"""Small requests, and what a run directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handful.recipe.schema import Recipe, recipe_from


def digits_recipe(folder: Path, **changes: Any) -> Recipe:
    asked = {
        "model": {"name": "digits"},
        "exemplars": {"path": str(folder), "k": 4},
        "classes": ["1", "4"],
        "per_class": 6,
        "cohort": 4,
        "sampler": {"steps": 4},
    }
    return recipe_from(asked | changes)


def tiny_recipe(name: str, **changes: Any) -> Recipe:
    asked = {"model": {"name": name}, "per_class": 4, "cohort": 2, "sampler": {"steps": 3}}
    return recipe_from(asked | changes)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a run directory, but the lock (which is empty) and the card (which names its folder)."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("lock", "README.md")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
