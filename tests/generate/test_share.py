"""Several processes on one run directory share its cohorts, and end with the bytes of one; runs grow and keep what is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support.runs import contents, digits_recipe, tiny_recipe

import handful
from handful.errors import RequestError
from handful.files.locks import held
from handful.generate.job import prepare
from handful.generate.run import run
from handful.generate.share import claims_of
from handful.runs.metadata import unused_images


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., str]) -> str:
    return tiny_model(2)


def test_several_workers_make_each_cohort_once_and_the_bytes_of_one(model: str, tmp_path: Path):
    recipe = tiny_recipe(model, per_class=8)
    handful.generate(recipe, tmp_path / "one")
    jobs = [prepare(recipe, tmp_path / "three") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:  # flock and claims are per opened file: threads stand for processes
        made = list(pool.map(run, jobs))
    assert sum(each.cohorts_done for each in made) == 8
    assert all(each.cohorts_done + each.cohorts_elsewhere + each.cohorts_resumed == 8 for each in made)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_what_a_dead_worker_claimed_and_left_half_written_is_made_by_the_next(model: str, tmp_path: Path):
    recipe = tiny_recipe(model)
    handful.generate(recipe, tmp_path / "one")
    job = prepare(recipe, tmp_path / "other")
    dead = claims_of(job)
    block = dead.working(beat=1e6)
    block.__enter__()
    dead.claim("0-0000")
    (job.directory.own / "tmp" / dead.worker).mkdir(parents=True)
    (job.directory.own / "tmp" / dead.worker / "half").write_bytes(b"x")
    assert dead._lock is not None
    dead._lock.release()
    dead._stop.set()
    assert run(job).cohorts_done == 4
    assert contents(tmp_path / "other") == contents(tmp_path / "one")


def test_a_directory_that_is_locked_for_long_is_said(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = prepare(tiny_recipe(model), tmp_path / "out")
    job.directory.own.mkdir(parents=True)
    lock = job.directory.lock
    monkeypatch.setattr(job.directory, "lock", lambda seconds=0: lock(0))
    with held(job.directory.own / "lock"), pytest.raises(RequestError, match="another process"):
        run(job)


def test_a_run_grows_and_keeps_what_is_there_byte_for_byte(model: str, tmp_path: Path):
    out = tmp_path / "out"
    handful.generate(tiny_recipe(model, per_class=3, classes=["1"]), out)
    before = {name: data for name, data in contents(out).items() if name.startswith("images/1/")}
    grown = handful.generate(tiny_recipe(model, per_class={"0": 2, "1": 6}), out)
    assert (grown.images, grown.cohorts_resumed, grown.cohorts_done) == (8, 2, 3)
    assert any("cohort 1 of 1 images stays" in note for note in grown.notes)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    handful.generate(tiny_recipe(model, per_class=2, classes=["0", "1"]), tmp_path / "direct")
    direct = contents(tmp_path / "direct")
    for name in ("images/0/000000.png", "images/0/000001.png", "images/1/000000.png", "images/1/000001.png"):
        assert after[name] == direct[name], "128 begins with the cohorts of 64"
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (sorted(stored["classes"]), stored["counts"]) == (["0", "1"], {"0": 2, "1": 6})

    fewer = handful.generate(tiny_recipe(model, per_class=1, classes=["1"]), out)
    assert (fewer.images, fewer.cohorts_done) == (8, 0)
    assert any("6 images are there and stay; 1 are asked for" in note for note in fewer.notes)
    assert contents(out) == after
    with pytest.raises(RequestError, match="seed: 0 there, 1 now"):
        handful.generate(tiny_recipe(model, per_class=9, seed=1), out)


def test_a_directory_of_which_nothing_is_made_yet_binds_nobody(model: str, tmp_path: Path):
    out = tmp_path / "out"
    handful.generate(tiny_recipe(model), out)
    for marker in (out / ".handful" / "cohorts").iterdir():
        marker.unlink()
    assert handful.generate(tiny_recipe(model, seed=1), out).cohorts_done == 4
    assert yaml.safe_load((out / "recipe.yaml").read_text())["seed"] == 1


def test_the_images_that_guided_nothing_are_known_by_content(digits_folder: Path, tmp_path: Path):
    photos = tmp_path / "photos"
    shutil.copytree(digits_folder, photos)
    out = tmp_path / "out"
    handful.generate(digits_recipe(photos, classes=["1"], per_class=2), out)
    left = unused_images(out)
    assert left.counts == {"1": 4}, "of eight, four guided"
    taken = {path.name for path in (photos / "1").iterdir()} - {Path(name).name for name in left.names}
    shutil.copy(photos / "1" / sorted(taken)[0], photos / "1" / "copy.png")
    assert unused_images(out).counts == {"1": 4}, "a copy of an exemplar under another name is no test image"
    with pytest.raises(RequestError, match=r"'1' has 4 of 9, and 5 of each class are needed.*smaller --k"):
        unused_images(out, needed=5)
    shutil.rmtree(photos)
    with pytest.raises(RequestError, match="no such folder"):
        unused_images(out)
