"""Processes beside this one that hang, run out of disk, or want something else; and a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.runs import contents, tiny_recipe

import handful
from handful.errors import HandfulError, RequestError, RunError
from handful.files.locks import held
from handful.generate.job import prepare
from handful.generate.run import run
from handful.recipe.schema import Recipe
from handful.runs.claims import Timeouts
from handful.runs.progress import Progress

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model(2)


class Sick(Progress):
    """Falls ill when the work begins, or at its first step."""

    def __init__(self, begins: Callable[[], object] = bool, steps: Callable[[], object] = bool) -> None:
        self._begins, self._steps, self.notes, self.done = begins, [steps], list[str](), 0.0

    def begin(self, total: int, done: int) -> None:
        self._begins()

    def advance(self, amount: float, now: str = "") -> None:
        self.done += amount
        if self._steps:
            self._steps.pop()()

    def note(self, text: str) -> None:
        self.notes.append(text)


def _work(recipe: Recipe, out: Path, progress: Sick, answer: Connection) -> None:
    try:
        summary = run(prepare(recipe, out, timeouts=Timeouts(heartbeat=1.5)), progress)
        answer.send([f"{summary.cohorts_done} cohorts, {progress.done:.3f} images", *progress.notes])
    except HandfulError as error:
        answer.send([str(error)])


def beside(recipe: Recipe, out: Path, progress: Sick) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_work, args=(recipe, out, progress, there))
    process.start()
    return process, here


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_where_a_file_system_has_no_locks_marker_files_stand_for_them(
    number: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out = tiny_recipe(model), tmp_path / "out"
    handful.generate(recipe, tmp_path / "one")

    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # what the operating system answers there
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(run, [prepare(recipe, out) for _ in range(2)]))
    assert sum(each.cohorts_done for each in made) == 4
    assert contents(out) == contents(tmp_path / "one")

    def hold(ready: Connection) -> None:
        with held(out / ".handful" / "lock"):
            ready.send(True)
            signal.pause()

    here, there = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(there,))
    holder.start()
    assert here.recv()
    holder.kill()
    holder.join()
    assert handful.generate(recipe, out).cohorts_resumed == 4, "the lock of one that was killed is taken"


def test_the_others_finish_when_one_has_no_disk_left(model: str, tmp_path: Path):
    recipe, out = tiny_recipe(model, per_class=8), tmp_path / "out"
    handful.generate(recipe, tmp_path / "one")
    full = Sick(begins=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))  # less than a cohort's marker
    process, answer = beside(recipe, out, full)
    summary = run(prepare(recipe, out))
    process.join(60)
    (told,) = answer.recv()
    assert "the disk is full" in told
    assert "repeat the same command" in told
    assert (summary.images, summary.failures) == (16, [])
    assert contents(out) == contents(tmp_path / "one")


def test_a_process_that_stands_still_is_overtaken_and_does_no_harm_when_it_goes_on(model: str, tmp_path: Path):
    recipe, out = tiny_recipe(model), tmp_path / "out"
    handful.generate(recipe, tmp_path / "one")
    process, answer = beside(recipe, out, Sick(steps=lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    assert os.WIFSTOPPED(os.waitpid(process.pid or 0, os.WUNTRACED)[1])
    try:
        with pytest.raises(RequestError, match=r"another recipe:\n  seed: 0 there, 1 now"):  # nothing is made yet
            handful.generate(tiny_recipe(model, seed=1), out)
        summary = run(prepare(recipe, out, timeouts=Timeouts(heartbeat=1.5)))
        assert (summary.cohorts_done, summary.images) == (4, 8)
        assert contents(out) == contents(tmp_path / "one")
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)
    process.join(60)
    made, *notes = answer.recv()
    assert made == "0 cohorts, 8.000 images", "those of the others count, and not its own beside them"
    assert any("was inactive for so long" in note for note in notes)
    assert contents(out) == contents(tmp_path / "one"), "and nothing of it is left"


def test_a_directory_that_is_removed_while_it_is_generated_is_no_success(model: str, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(RunError, match="files were removed from it"):
        run(prepare(tiny_recipe(model), out), Sick(steps=lambda: shutil.rmtree(out)))
