"""Running a Python file of the user's: `FILE.py:FUNCTION`, for a feature extractor or a model of one's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from handful.errors import HandfulError, RequestError, first_line


def run_user_file(path: Path, attribute: str, field: str) -> Any:
    """Runs a file and calls `attribute` in it without arguments; a module or another value is taken as it is.

    Args:
        field: What was asked for, to name in errors.

    Returns:
        What the function returns; None if the file has nothing of that name.

    Raises:
        RequestError: If there is no such file, or running it fails.
    """
    name = f"handful_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        problem = "there is no such Python file"
        raise RequestError(field, f"{path}:{attribute}", problem, "Write FILE.py:FUNCTION with the path of an existing file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes and pickles look their module up
    try:
        spec.loader.exec_module(module)
        made = getattr(module, attribute, None)
        return made() if callable(made) and not isinstance(made, nn.Module) else made
    except HandfulError:
        raise  # says itself what is wrong, and better
    except (Exception, SystemExit) as error:  # whatever the user's own code raises, sys.exit too
        remedy = f"Fix {path}: run python {path} to see where it fails."
        if isinstance(error, ModuleNotFoundError):
            remedy = "Install it, or put the folder that holds it on PYTHONPATH."
        raise RequestError(
            field, f"{path}:{attribute}", f"running it failed ({type(error).__name__}: {first_line(error)})", remedy
        ) from error
