"""The zoo: models that travel inside the package, so that everything can be tried without a download.

Importing this module loads no torch; data and classifiers are in `handful.zoo.digits`, `.cifar10` and `.mnist`.
"""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from handful.errors import RequestError

ZOO = ("digits", "cifar10", "mnist")
"""The names of the packaged models."""

JUDGES = {"digits": "digits-judge", "cifar10": "cifar10-judge", "mnist": "uci-judge"}
"""Who judges a packaged model's images."""

EXEMPLARS = {"cifar10-exemplars": ("cifar10", "exemplars.safetensors")}
"""Packaged exemplars, as features alone: what a recipe calls them -> model and file."""


def judge_of(model: str, guides: Iterable[str | None]) -> str:
    """The judge for a model's images: the packaged one, or a network unrelated to those that guided."""
    return JUDGES.get(model) or ("clip" if any(str(name).startswith("dinov2") for name in guides) else "dinov2")


def zoo_path(name: str) -> Path:
    """The folder of a packaged model, as diffusers saves a pipeline (`unet/`, `scheduler/`) plus `handful.json`; `mnist`
    has weights of its own kind.

    Args:
        name: one of `ZOO`.

    Returns:
        The folder's path. The package must be installed as files, as pip does: weights are not read out of a zip.

    Raises:
        RequestError: no packaged model has this name.
    """
    if name not in ZOO:
        known = ", ".join(ZOO)
        raise RequestError("model", name, "is not a packaged model", f"Use one of: {known}.")
    return Path(str(files(__name__))) / name


def exemplars_path(name: str) -> Path:
    """The file of packaged exemplars, one of `EXEMPLARS`; see `handful.data.shared_exemplars`."""
    model, file = EXEMPLARS[name]
    return zoo_path(model) / file
