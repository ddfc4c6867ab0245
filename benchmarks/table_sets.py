"""The generated sets behind `tables.py`: what is compared, made once for each seed, shared by several processes.

Everything is the package's own: the provisional model `cifar10`, the guide `cifar10-guide`; the exemplars are drawn anew for
each seed from the first 64 training images of each class.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10
from torch import Tensor

import handful
from handful.cost.estimate import cost_of
from handful.data.images import LabelledImages, read_folder, write_atomically
from handful.recipe.schema import Recipe, recipe_from
from handful.zoo.cifar10 import CLASSES, SIZE

POOL = 64  # training images a class that exemplars are drawn from
GUIDE = "cifar10-guide"


@dataclass(frozen=True)
class Setting:
    """How a set is made.

    Attributes:
        guidance: Terms of a recipe.
        k: Exemplars a class.
        steps: Of the sampler.
    """

    guidance: tuple[dict[str, Any], ...] = ()
    k: int = 0
    steps: int = 18

    def recipe(self, pool: Path, per_class: int, seed: int) -> Recipe:
        exemplars = {"path": str(pool.resolve()), "per_class": self.k, "seed": seed} if self.k else {}
        return recipe_from(
            {
                "model": {"name": "cifar10", "dtype": "bfloat16"},
                "sampler": {"steps": self.steps},
                "exemplars": exemplars,
                "guidance": list(self.guidance),
                "per_class": per_class,
                "cohort": min(per_class, 50),
                "seed": seed,
            }
        )


def write_pool(out: Path) -> Path:
    """The images that exemplars are drawn from, as a folder per class."""
    pool = out / "exemplars"
    with claimed(out / ".locks" / "exemplars", wait=True):
        cifar10.write_images("train", pool, POOL)
    return pool


def exemplars_of(pool: Path, k: int, seed: int) -> dict[str, Tensor]:
    """The exemplars that a set of this seed is guided by, class -> (k, 3, 32, 32)."""
    drawn = handful.Exemplars.from_folder(pool, channels=3, size=SIZE, k=k, seed=seed)
    return {name: drawn.images[name] for name in CLASSES}


def make(setting: Setting, pool: Path, folder: Path, per_class: int, seed: int) -> tuple[LabelledImages, dict[str, float]]:
    """Generates a set, or takes the one that lies there.

    Returns:
        Its images; and what it cost: `operations`, floating-point operations over those of plain sampling in as many steps;
        `seconds` of sampling (of the first time, where it was made before).
    """
    recipe = setting.recipe(pool, per_class, seed)
    note = folder.parent / f"{folder.name}.json"
    with claimed(folder.parent / f".{folder.name}.lock", wait=True):  # another table's process may make the same set
        summary = handful.generate(recipe, folder)
        if summary.failures:
            raise RuntimeError(f"{folder}: {summary.failures[0]}")
        if not note.is_file():
            made_now = summary.cohorts_done / (summary.cohorts_done + summary.cohorts_resumed)
            cost = {
                "operations": cost_of(recipe).recipe.flops_per_image
                / cost_of(Setting(steps=setting.steps).recipe(pool, per_class, seed)).recipe.flops_per_image,
                "seconds": summary.seconds / made_now if made_now else float("nan"),
            }
            write_atomically(note, json.dumps(cost).encode())
    return read_folder(folder, channels=3, size=SIZE), json.loads(note.read_text())


@contextmanager
def claimed(lock: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on what the lock stands for."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
