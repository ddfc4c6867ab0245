"""Whether the libraries beside torch are usable here, asked before they fail deep inside an import."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from handful.errors import RequestError, first_line


def hide_loading_bars() -> None:
    """No bars of diffusers and transformers for the rest of the process, as beside --quiet and in log files."""
    check_libraries()
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@cache
def check_libraries() -> None:
    """Refuses an environment in which diffusers and transformers can't be imported.

    handful needs no torchvision; but where one is installed, diffusers and transformers import it, and a build for another
    torch breaks them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a missing operator, a missing library: each build fails in its own way
        import torch

        try:
            found = f"torchvision {version('torchvision')}"
        except PackageNotFoundError:
            found = "torchvision"
        problem = f"it is installed, but does not work with torch {torch.__version__} ({first_line(error)}), and diffusers and "
        remedy = (
            "Uninstall it (pip uninstall torchvision): handful does not need it. Or install the build that fits this torch."
        )
        raise RequestError("environment", found, problem + "transformers import it", remedy) from error
