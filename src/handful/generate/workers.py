"""`--workers N`: processes of this machine that share a run's cohorts, each on a GPU or a share of the processors."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from handful.errors import HandfulError, RunError
from handful.generate.job import Job, prepare
from handful.generate.run import RunSummary, run
from handful.recipe.schema import Recipe
from handful.runs.claims import Timeouts
from handful.runs.processes import end_with_parent, threads_each
from handful.runs.progress import Progress


def run_with_workers(job: Job, recipe: Recipe, workers: int, progress: Progress | None = None) -> RunSummary:
    """Runs a job by processes of its own; this one watches them, and makes what they leave should all of them die.

    They end with this process, also where it is killed.

    Args:
        job: From `prepare`, for what it has checked; its weights are not used.
        workers: How many, 1 or more. With several GPUs each takes the next one; else each takes a share of the processors'
            threads, unless OMP_NUM_THREADS says how many.

    Returns:
        The summary of all together.

    Raises:
        RequestError, RunError: What a worker raised, where no other one finished the run.
    """
    progress, directory = progress or Progress(), job.directory
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    done = sum(cohort.count for cohort in job.cohorts if cohort.key in job.done)
    began, processes, ends = time.perf_counter(), [], []
    progress.begin(job.images, done)
    try:
        for number in range(workers):
            here, there = context.Pipe(duplex=False)
            asked = (recipe, directory.path, job.allow_version_change, job.timeouts, there)
            process = context.Process(target=_worker, args=asked, daemon=True, name=f"worker {number}")
            with _environment(number, workers):
                process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        _watch(job, processes, progress)
    finally:
        progress.end()
        for process in processes:
            process.terminate() if process.is_alive() else None
        for process in processes:
            process.join(10)
            process.kill()  # one that stands still does not hear of SIGTERM
            process.join()
    answers = [_answer(end) for end in ends]
    found = [answer for answer in answers if isinstance(answer, RunSummary)]
    errors = [answer for answer in answers if isinstance(answer, HandfulError | OSError)]
    if errors and not found:
        raise errors[0]
    if not found:
        progress.note("all workers were killed; this process makes the remaining images")
        return run(
            prepare(recipe, directory.path, allow_version_change=job.allow_version_change, timeouts=job.timeouts), progress
        )
    for answer in answers:
        if not isinstance(answer, RunSummary):
            why = f"failed ({answer})" if answer else "was killed, or made no progress"
            progress.note(f"note: a worker {why}; the other workers made its share")
    whole = max(found, key=lambda each: each.images)
    seconds = time.perf_counter() - began
    made = sum(each.cohorts_done for each in found)
    return RunSummary(
        directory.path,
        images=whole.images,
        cohorts_done=len(job.cohorts) - len(job.done) - whole.cohorts_failed,
        cohorts_resumed=len(job.done),
        cohorts_failed=whole.cohorts_failed,
        seconds=seconds,
        images_per_second=(whole.images - done) / seconds if made else None,
        failures=whole.failures,
        notes=[*job.notes, *job.changes],
    )


def _watch(job: Job, processes: Sequence[BaseProcess], progress: Progress) -> None:
    """Until all have ended; those that stand still when all others have, and nothing is left, are not waited for."""
    counts = {cohort.key: cohort.count for cohort in job.cohorts if cohort.key not in job.done}
    ended: float | None = None
    while any(process.is_alive() for process in processes):
        for key in job.directory.marked() & set(counts):
            progress.advance(counts.pop(key))
        if counts or all(process.is_alive() for process in processes):
            ended = None
        elif ended is None:
            ended = time.monotonic()
        elif time.monotonic() - ended > job.timeouts.heartbeat:
            return
        for process in processes:
            process.join(0.25 / len(processes))


@contextmanager
def _environment(number: int, workers: int) -> Iterator[None]:
    """What a worker inherits: its GPU where there are several, else its share of the threads."""
    gpus = torch.cuda.device_count()
    ours = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus > 1 else {}
    if not gpus:
        ours["OMP_NUM_THREADS"] = str(threads_each(workers))
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _worker(recipe: Recipe, out: Path, allow_version_change: bool, timeouts: Timeouts, answer: Connection) -> None:
    end_with_parent()
    try:
        answer.send(run(prepare(recipe, out, allow_version_change=allow_version_change, timeouts=timeouts)))
    except (HandfulError, OSError) as error:
        answer.send(error)
    except KeyboardInterrupt:
        return
    except Exception as error:
        answer.send(RunError(f"a worker failed: {type(error).__name__}: {error}"))


def _answer(end: Connection) -> object:
    with suppress(EOFError, OSError):  # it was killed
        return end.recv()
    return None
