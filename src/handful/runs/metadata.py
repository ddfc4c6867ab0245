"""What a run directory says of itself, for those who judge it: who guided, and by which exemplars."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class DrawnExemplars:
    """Which exemplars a recipe draws: so many a class (None: all) of a folder."""

    folder: Path
    k: int | None
    seed: int


def guided_by(run: str | Path, name: str, digest: str) -> bool:
    """Whether an extractor guided a run: one of that digest, or of that name with Softplus for ReLU.

    Args:
        run: A run directory or its `images`; any other folder was guided by nobody.
        name, digest: The extractor's.
    """
    told = _part(_part(_recipe(run), "provenance"), "features_sha256")
    # a classifier made smooth has another digest, but the judge of that name is still its own guide
    names = {re.sub(r" (softplus \S+|noisy)$", "", key) for key in told}
    return digest in told.values() or any(_same(name, other) for other in names)


def exemplars_of(run: str | Path) -> DrawnExemplars | None:
    """The exemplars that guided a run; None where there were none, or it is no run."""
    asked = _part(_recipe(run), "exemplars")
    if not asked.get("path"):
        return None
    folder = Path(run).expanduser() / Path(asked["path"]).expanduser()  # a relative path is relative to the recipe
    return DrawnExemplars(folder, asked.get("k", asked.get("per_class")), asked.get("seed") or 0)


def _recipe(run: str | Path) -> dict[str, Any]:
    run = Path(run).expanduser()
    file = (run.parent if run.name == "images" else run) / "recipe.yaml"
    if not file.is_file():
        return {}
    try:
        recipe = yaml.safe_load(file.read_text())
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _same(name: str, other: str) -> bool:
    return name == other or Path(name).expanduser().resolve() == Path(other).expanduser().resolve()
