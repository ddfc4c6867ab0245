"""`--engine ray`: cohorts are mapped by Ray Data over a pool of actors, which share a run as any other processes do.

Each actor loads the model once, claims the cohorts that it is given and writes them itself; the driver checks the request
before, and writes what sums the run up after. An actor or node that dies loses at most its cohort: Ray gives it to another
one, which takes the claim over. The run directory must be on a file system that all nodes see.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handful.errors import RequestError, RunError
from handful.generate.job import Job, prepare
from handful.generate.run import RunSummary, Worker, run
from handful.generate.share import claims_of
from handful.recipe.schema import Recipe
from handful.runs.claims import Timeouts
from handful.runs.progress import Progress

_BLOCKS = 2000  # a block is what is tried again together


class CohortActor:
    """An actor: one of the processes that work on a run."""

    def __init__(self, recipe: Recipe, out: str, allow_version_change: bool, timeouts: Timeouts) -> None:
        job = prepare(recipe, out, allow_version_change=allow_version_change, timeouts=timeouts)
        self.worker = Worker(job).__enter__()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes the cohorts at some places of the plan, unless others make them."""
        for place in batch["id"].tolist():
            self.worker.make_one(int(place))
        return batch


def run_by_ray(
    job: Job,
    recipe: Recipe,
    workers: int,
    progress: Progress | None = None,
    *,
    address: str | None = None,
    gpus: float | None = None,
) -> RunSummary:
    """Runs a job by Ray.

    Args:
        workers: The largest number of actors.
        progress: Is notified of each finished cohort.
        address: Of a Ray cluster; None: one that this process is connected to, else one of this machine alone.
        gpus: Of each actor, a fraction too; None: one where the job computes on CUDA.

    Raises:
        RequestError: Ray is not installed, or no cluster answers at the address.
        RunError: As `run`.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError:
        raise RequestError("--engine", "ray", "Ray is not installed", "pip install 'handful[ray]'") from None
    progress = progress or Progress()
    started = not ray.is_initialized()
    if started:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            told = str(error).splitlines()[0]
            remedy = "Start one (ray start --head), or leave --ray-address out."
            raise RequestError("--ray-address", address, f"no Ray cluster answers ({told})", remedy) from None
    began, done = time.perf_counter(), sum(cohort.count for cohort in job.cohorts if cohort.key in job.done)
    progress.begin(job.images, done)
    try:
        pending = [place for place, cohort in enumerate(job.cohorts) if cohort.key not in job.done]
        if pending:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            for handler in logging.getLogger("ray.data").handlers if started else ():
                if isinstance(handler, logging.StreamHandler):  # its log file has all
                    handler.setLevel(logging.ERROR)
            context.max_errored_blocks = -1  # what a dead node leaves is made at the end
            context.max_consecutive_actor_init_deaths = 3  # one that is killed while it loads is started again
            options = {"num_gpus": (1 if gpus is None else gpus) if job.device.type == "cuda" else 0, "num_cpus": 1}
            places = ray.data.from_items([{"id": place} for place in pending], override_num_blocks=min(len(pending), _BLOCKS))
            mapped = places.map_batches(
                CohortActor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
                fn_constructor_args=(recipe, str(Path(job.directory.path)), job.allow_version_change, job.timeouts),
                **options,
            )
            _wait(job, mapped.materialize, progress)
            _leave(job)
    except RayError as error:
        raise RunError(f"Ray: {str(error).splitlines()[0]}") from error
    finally:
        progress.end()
        if started:
            ray.shutdown()
    # What is left where nodes died is made here; then, or at once, what sums the run up is written.
    rest = prepare(recipe, job.directory.path, allow_version_change=job.allow_version_change, timeouts=job.timeouts)
    summary = run(rest, progress if len(rest.done) < len(rest.cohorts) else None)
    summary.seconds = time.perf_counter() - began
    summary.cohorts_resumed = len(job.done)
    summary.cohorts_done = len(job.cohorts) - len(job.done) - summary.cohorts_failed
    return summary


def _wait(job: Job, work: Callable[[], Any], progress: Progress) -> None:
    """Waits for Ray, as long as anybody is at work; it would wait for an actor that stands still for ever."""
    counts = {cohort.key: cohort.count for cohort in job.cohorts if cohort.key not in job.done}
    claims, at_work = claims_of(job), time.monotonic()
    errors: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1)
        for key in job.directory.marked() & set(counts):
            progress.advance(counts.pop(key))
        if counts and claims.others():
            at_work = time.monotonic()
        elif time.monotonic() - at_work > (job.timeouts.step if counts else job.timeouts.heartbeat):
            progress.note("note: the Ray actors make no progress; this process makes the remaining images")
            return
    if errors:
        raise errors[0]


def _leave(job: Job, seconds: float = 10) -> None:
    """Waits until the actors have left, so that no file of theirs is there when the run is done; not for ever."""
    claims, end = claims_of(job), time.monotonic() + seconds
    while claims.others() and time.monotonic() < end:
        time.sleep(0.05)


def _knock(address: str | None) -> None:
    """Ray itself tries for minutes where nobody listens."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host or "127.0.0.1", int(port)), timeout=5).close()
