"""Processes do a list's tasks in order; where they are killed, the one that asked goes on alone."""

from __future__ import annotations

import os
import signal
import time

import pytest

from handful.errors import RequestError
from handful.runs.processes import Processes


def by(worker: int, task: int) -> tuple[int, int]:
    time.sleep(0.01)
    return worker, task


@pytest.mark.slow
def test_tasks_come_back_in_order_and_are_done_here_when_the_workers_are_killed():
    notes: list[str] = []
    processes = Processes(2, os.getpid, note=notes.append)
    try:
        found = list(processes.map(by, range(8), os.getpid()))
        assert [task for _, task in found] == list(range(8))
        workers = {worker for worker, _ in found}
        assert os.getpid() not in workers
        rest = processes.map(by, range(8), os.getpid())
        assert next(rest)[1] == 0
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert [task for _, task in rest] == list(range(1, 8))
        assert list(processes.map(by, [5], os.getpid())) == [(os.getpid(), 5)]
        assert len(notes) == 1
        assert "continues alone" in notes[0]
    finally:
        processes.close()


def refused() -> None:
    raise RequestError("judge", "mine", "it differs", "Use another.")


@pytest.mark.slow
def test_what_a_process_refuses_at_its_start_is_refused_here():
    processes = Processes(1, refused, note=pytest.fail, beside=True)
    try:
        with pytest.raises(RequestError, match="it differs"):
            list(processes.map(by, [1], 0))
    finally:
        processes.close()
