"""From a recipe to a run directory: `generate(recipe, out)`, or `prepare` and `run` apart.

    job.py     all checks before the work      run.py     the work
    invert.py  fits embeddings to a few targets

Importing this package imports no torch, so that a misspelt recipe is refused at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handful.generate.job import Job as Job
    from handful.generate.job import prepare as prepare
    from handful.generate.run import RunSummary as RunSummary
    from handful.recipe.file import read_recipe as read_recipe
    from handful.recipe.schema import Recipe as Recipe
    from handful.runs.progress import Progress

_HOME = {
    "Job": "handful.generate.job",
    "prepare": "handful.generate.job",
    "Recipe": "handful.recipe.schema",
    "read_recipe": "handful.recipe.file",
    "RunSummary": "handful.generate.run",
}


def generate(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    order: Iterable[int] | None = None,
    allow_version_change: bool = False,
    cache: Path | None = None,
) -> RunSummary:
    """Generates a data set, or goes on where an interrupted run of the same recipe stopped.

    Args:
        recipe: What is asked for, or its YAML file.
        out: The run directory; new, empty, or with a run of this recipe.
        progress: Is notified of every step (`handful.runs.progress`); None: nobody is.
        order, cache: See `handful.generate.run.run`.
        allow_version_change: See `handful.generate.job.prepare`.

    Returns:
        What was done. Look at `failures`: cohorts that failed do not stop the others.

    Raises:
        RequestError: If it can't be done as asked; nothing has been written.
        RunError: If it failed at work.
    """
    from handful.generate.job import prepare
    from handful.generate.run import run
    from handful.recipe.file import read_recipe

    recipe = read_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    job = prepare(recipe, out, allow_version_change=allow_version_change)
    return run(job, progress, order=order, cache=cache)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Callable(ModuleType):
    """`handful.generate` is this package and, as the library's main verb, `handful.generate(recipe, out)` too."""

    def __call__(self, *args: Any, **options: Any) -> RunSummary:
        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable
