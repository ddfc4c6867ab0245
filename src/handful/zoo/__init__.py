"""The zoo: models that travel inside the package, so that everything can be tried without a download.

Importing this module loads no torch; the data and the classifiers are in `handful.zoo.digits`.
"""

from importlib.resources import files
from pathlib import Path

from handful.errors import RequestError

ZOO = ("digits",)
"""The names of the packaged models."""


def zoo_path(name: str) -> Path:
    """The folder of a packaged model, laid out as diffusers saves a pipeline (`unet/`, `scheduler/`) plus `handful.json`.

    Args:
        name: one of `ZOO`.

    Returns:
        The folder's path. The package must be installed as files, as pip does: weights are not read out of a zip.

    Raises:
        RequestError: no packaged model has this name.
    """
    if name not in ZOO:
        known = ", ".join(ZOO)
        raise RequestError("model", name, "is not a packaged model", f"Take one of: {known}.")
    return Path(str(files(__name__))) / name
