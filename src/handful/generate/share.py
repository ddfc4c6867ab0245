"""Sharing a run's cohorts with other processes: from the start under the directory's lock to the end under it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from handful.errors import RequestError, RunError
from handful.generate.job import Job, check_against_stored
from handful.recipe.plan import Cohort
from handful.runs.claims import Claims
from handful.runs.progress import Progress
from handful.runs.provenance import CONTENTS
from handful.runs.run_directory import FINISHED, Plan

POLL = 0.5  # seconds between looks at what the others do, where nothing else is left


def claims_of(job: Job) -> Claims:
    """This process's view of who makes which cohort of a job."""
    told = [job.recipe.seed, [job.provenance[key] for key in CONTENTS], Plan.of(job.cohorts).to_json().decode()]
    return Claims(job.directory.own, hashlib.sha256(json.dumps(told).encode()).hexdigest(), timeouts=job.timeouts)


@contextmanager
def at_work(job: Job, claims: Claims, write: Callable[[bool], None]) -> Iterator[None]:
    """Is one of the processes that work on a run inside the block; the last one to leave sweeps up.

    Args:
        write: Writes what the directory says of the run; its argument says whether no other process works here.

    Raises:
        RequestError: Another recipe's run has begun here meanwhile, or others make another plan of it.
    """
    directory = job.directory
    with ExitStack() as stack:
        with directory.lock():
            stack.enter_context(claims.working())
            stack.enter_context(directory.working(claims.worker))
            alone = claims.start_afresh()
            check_against_stored(job, shared=not alone)  # again, now that nobody else can begin here
            if alone:
                directory.clear_others()
                (directory.path / FINISHED).unlink(missing_ok=True)
            elif (there := directory.plan()).sizes and there != Plan.of(job.cohorts):
                problem = "another process is generating a different number of images, or other classes, of this run into it"
                raise RequestError("out", directory.path, problem, "Wait until it has finished, or choose another --out.")
            job.refresh()
            write(alone)
        try:
            yield
        finally:
            stack.close()
            with suppress(RequestError, OSError), directory.lock(60):
                claims.sweep()


def work(
    job: Job,
    claims: Claims,
    pending: Sequence[Cohort],
    make: Callable[[Cohort, int], bool],
    progress: Progress,
    *,
    wait: bool = True,
) -> dict[str, str]:
    """Makes the cohorts that nobody else makes, until all are there.

    Args:
        pending: Those that are not there yet, in the order to try them.
        make: Makes and commits one that is claimed by the number given. It raises a RunError where it can't be made.
        progress: Is notified of those that others have made.
        wait: Stay until the others are done, and take over what they leave; else leave when nothing is left to claim.

    Returns:
        By cohort why it failed, here or elsewhere.
    """
    left, listed = list(pending), claims.claimed()
    if len(left) > 1 and claims.others():  # not all at the same end
        start = int.from_bytes(hashlib.sha256(claims.worker.encode()).digest()[:8], "big") % len(left)
        left = left[start:] + left[:start]
    failures: dict[str, str] = {}
    while left:
        later, moved = [], False
        marked, failed = job.directory.marked(), claims.failures()
        for cohort in left:
            key, made = cohort.key, False
            last = listed.get(key, -1)
            if last >= 0:
                if key in failed:
                    failures[key] = failed[key]
                elif key in marked or job.directory.is_marked(cohort):
                    progress.advance(cohort.count)
                elif claims.holder(key, last) is not None:
                    later.append(cohort)
                    continue
                else:
                    made = True
            else:
                made = True
            if not made:
                moved = True
                continue
            number = claims.claim(key, last)
            if number is None:
                listed = claims.claimed()
                later.append(cohort)
                continue
            moved = True
            if job.directory.is_marked(cohort):  # made, and its claim swept away, since the last look
                progress.advance(cohort.count)
                continue
            try:
                if not make(cohort, number):
                    later.append(cohort)
                    progress.advance(-cohort.count)  # its steps were counted
                    _return(job, claims, progress)
            except RunError as error:
                failures[key] = str(error)
                claims.fail(key, str(error))
                progress.note(f"failed: {error}")
            except BaseException:
                claims.release(key, number)
                raise
        left = later
        if left and not wait:
            break
        listed = claims.claimed()
        if left and not moved:
            claims.beat()  # it waits, and is there
            time.sleep(POLL)
    return failures


def _return(job: Job, claims: Claims, progress: Progress) -> None:
    """What a worker does that stood still for so long that others made what it had claimed.

    Raises:
        RequestError: Another recipe's run has begun here meanwhile.
    """
    progress.note("this process was inactive for so long that others took over its work; what it made after that is discarded")
    if not claims.is_listed():
        with job.directory.lock():
            check_against_stored(job, shared=True)
            claims.join()
