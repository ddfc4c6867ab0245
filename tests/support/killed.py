"""A command in a process of its own, killed without warning as a node that fails would be."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable


def killed(work: list[object] | Callable[[], object], ready: Callable[[], object], patience: float = 120) -> None:
    """Runs work in a fork of this process, which has imported all it needs, and kills it once `ready()` is true.

    Args:
        work: The arguments of a command of handful, or a function.
        ready: Asked every two milliseconds.
        patience: In seconds.

    Raises:
        AssertionError: If it ended before, or `ready()` did not become true in `patience` seconds.
    """
    process = multiprocessing.get_context("fork").Process(target=_silently, args=(work,))
    process.start()
    until = time.monotonic() + patience
    try:
        while not ready():
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < until, "it did not get so far"
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()


def _silently(work: list[object] | Callable[[], object]) -> None:
    from handful import cli, console

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if callable(work):
        work()
    else:
        console.answer(cli.app, [str(each) for each in work])
