"""Methods x scales x k x seeds as one resumable job: `sweep(request, out)`, or `prepare_sweep` and `run_sweep` apart.

    request.py   what is asked for, and its YAML     planned.py   which sets, and the recipe of each
    checked.py   all checks before the work          work.py      the work
    real.py      the real images in two halves       store.py     the directory, resume, whose it is
    results.py   rows and means                      choice.py    what the objective prefers
    printed.py, pictures.py, outputs.py              what is printed and written

Importing this package imports no torch, so that a misspelt request is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handful.sweep.request import MethodRequest as MethodRequest
from handful.sweep.request import SweepRequest, read_sweep, sweep_from
from handful.sweep.request import UtilityRequest as UtilityRequest

if TYPE_CHECKING:
    from handful.runs.progress import Progress
    from handful.sweep.checked import SweepJob as SweepJob
    from handful.sweep.checked import prepare_sweep as prepare_sweep
    from handful.sweep.choice import Choice as Choice
    from handful.sweep.planned import Setting as Setting
    from handful.sweep.results import Mean as Mean
    from handful.sweep.results import read_results as read_results
    from handful.sweep.work import SweepResult as SweepResult
    from handful.sweep.work import run_sweep as run_sweep

_HOME = {
    "Choice": "choice",
    "Mean": "results",
    "Setting": "planned",
    "SweepJob": "checked",
    "SweepResult": "work",
    "prepare_sweep": "checked",
    "read_results": "results",
    "run_sweep": "work",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *("MethodRequest", "SweepRequest", "UtilityRequest", "read_sweep", "sweep", "sweep_from", *_HOME)
]


def sweep(
    request: SweepRequest | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    only: Sequence[str] | None = None,
    order: Iterable[int] | None = None,
    allow_version_change: bool = False,
    cache: Path | None = None,
) -> SweepResult:
    """Generates and measures all sets of a sweep, or goes on where an interrupted one stopped.

    Args:
        request: What is asked for, plain data as in its YAML file, or that file.
        out: The sweep's directory; new, empty, or with a sweep that this one goes on with.
        progress: Is notified of every set (`handful.runs.progress`); None: nobody is.
        only: Names of methods to work on; None: all.

    Returns:
        Rows, means and choice. Look at `failures`: sets that failed do not stop the others.

    Raises:
        RequestError: If it can't be done as asked; nothing has been written.
        RunError: If it failed at work.
    """
    from handful.sweep.checked import prepare_sweep
    from handful.sweep.work import run_sweep

    if isinstance(request, (str, Path)):
        request = read_sweep(request)
    elif isinstance(request, Mapping):
        request = sweep_from(request)
    job = prepare_sweep(request, out, only=only, allow_version_change=allow_version_change)
    return run_sweep(job, progress, order=order, cache=cache)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
