"""Processes that work for one: their share of the threads, a list's tasks in order, and their end with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import torch

from handful.errors import HandfulError

State = TypeVar("State")
Task = TypeVar("Task")
Found = TypeVar("Found")
_AHEAD = 2  # tasks of each process that wait or are done: what they hold stays bounded
_state: Any = None  # of a process of `Processes`


def threads_each(workers: int) -> int:
    """Threads of each of so many processes: as OMP_NUM_THREADS says, else a share of the processors."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max(1, (os.cpu_count() or 1) // workers)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, also where that was killed without warning."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)  # as if it were killed too: whatever it was at is safe to be left

        threading.Thread(target=watch, daemon=True).start()


class Processes:
    """Processes that do tasks for this one, until `close`.

    Args:
        workers: How many; 1: this process does all, or with `beside` another one does, with as many threads.
        ready: Called once in each process with `arguments`; its answer is passed to each task.
        note: Is called once, with a text, if they are killed: this process continues alone then.
        beside: See `workers`.
    """

    def __init__(
        self, workers: int, ready: Callable[..., Any], *arguments: Any, note: Callable[[str], None], beside: bool = False
    ) -> None:
        self._workers, self._note, self._pool = workers, note, None
        if workers > 1 or beside:
            context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
            asked = (torch.get_num_threads() if beside else threads_each(workers), ready, arguments)
            self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=asked)

    def close(self) -> None:
        """Ends them."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, do: Callable[[State, Task], Found], tasks: Iterable[Task], here: State) -> Iterator[Found]:
        """What `do` finds of each task, in order; `here` is the state for tasks that this process does itself.

        Raises:
            Exception: What `do` raised, or `ready` refused.
        """
        waiting: deque[tuple[Task, Future[Found] | None]] = deque()
        for task in tasks:
            future = None
            with suppress(BrokenProcessPool):
                future = self._pool and self._pool.submit(_do, do, task)
            waiting.append((task, future))
            if len(waiting) > (_AHEAD * self._workers if self._pool else 0):
                yield self._result(do, here, *waiting.popleft())
        while waiting:
            yield self._result(do, here, *waiting.popleft())

    def _result(self, do: Callable[[State, Task], Found], here: State, task: Task, future: Future[Found] | None) -> Found:
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            if self._pool is not None:
                self._note("a worker was killed, or could not start: this process continues alone")
                self._pool = None
        return do(here, task)


def _begin(threads: int, ready: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _state
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        _state = ready(*arguments)
    except HandfulError as error:  # raised here, it would be said as if the process was killed
        _state = error


def _do(do: Callable[[Any, Any], Any], task: Any) -> Any:
    if isinstance(_state, HandfulError):
        raise _state
    return do(_state, task)
