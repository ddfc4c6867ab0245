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
from handful.data.images import read_image
from handful.data.sources import labelled_files
from handful.errors import RequestError
from handful.files.locks import held
from handful.generate.again import make_again
from handful.generate.job import prepare
from handful.generate.run import run
from handful.generate.share import claims_of
from handful.generate.workers import run_with_workers
from handful.recipe.file import read_recipe
from handful.runs.metadata import unused_images
from handful.runs.status import status, verify


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
    assert any("class 1: its cohort 1 keeps 1 image" in note for note in grown.notes)
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
    assert "class 1: it keeps 6 images made before; you asked for 1" in fewer.notes
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
    with pytest.raises(RequestError, match=r"'1' has 4 of 9; at least 5 of each class are needed.*smaller --k"):
        unused_images(out, needed=5)
    shutil.rmtree(photos)
    with pytest.raises(RequestError, match="no such folder"):
        unused_images(out)


def test_shards_hold_the_same_images_and_the_real_loaders_read_them(model: str, tmp_path: Path):
    import datasets
    import webdataset

    def made(name: str, **output: str) -> Path:
        handful.generate(tiny_recipe(model, per_class=3, output=output), tmp_path / name)
        return tmp_path / name

    plain = made("plain")
    wanted = [(plain / f"images/{name}/{index:06d}.png").read_bytes() for name in "01" for index in range(3)]
    tar, parquet = made("tar", format="webdataset"), made("parquet", format="parquet")
    samples = list(webdataset.WebDataset(sorted(map(str, (tar / "data").glob("*.tar"))), shardshuffle=False, empty_check=False))
    assert [sample["png"] for sample in samples] == wanted
    assert [int(sample["cls"]) for sample in samples] == [0, 0, 0, 1, 1, 1]
    cache = str(tmp_path / "hf")
    rows = datasets.load_dataset("parquet", data_files=str(parquet / "data/*.parquet"), split="train", cache_dir=cache)
    assert rows.features["label"].names == ["0", "1"]
    assert rows.cast_column("image", datasets.Image(decode=False))["image"][4]["bytes"] == wanted[4]
    folder = datasets.load_dataset("imagefolder", data_dir=str(plain), split="train", cache_dir=cache)
    assert sorted(folder["label"]) == ["0"] * 3 + ["1"] * 3
    for out in (tar, parquet):
        read = labelled_files(out)
        assert (read.counts, [read.content(place) for place in range(6)]) == ({"0": 3, "1": 3}, wanted)
        assert verify(out).whole
        assert handful.generate(out / "recipe.yaml", out).cohorts_resumed == 4
        shard = sorted((out / "data").iterdir())[0]
        whole = shard.read_bytes()
        shard.write_bytes(whole[:600])
        assert len(verify(out).damaged + verify(out).missing) == 2
        assert handful.generate(out / "recipe.yaml", out).cohorts_done == 1
        assert shard.read_bytes() == whole
    for kind, suffix in (("jpeg:95", "jpg"), ("webp:90", "webp"), ("webp-lossless", "webp")):
        out = made(kind.replace(":", ""), image=kind)
        image = read_image(out / f"images/0/000000.{suffix}", channels=1)
        exact = read_image(plain / "images/0/000000.png", channels=1)
        assert (image - exact).abs().max() < (1e-6 if kind == "webp-lossless" else 0.4)
    handful.generate(tiny_recipe(model, per_class=2, classes=["1"], output={"format": "parquet"}), tmp_path / "grows")
    with pytest.raises(
        RequestError, match=r"files have a fixed list of classes \(1\), so no class can be added.*another --out"
    ):
        handful.generate(tiny_recipe(model, per_class=2, classes=["0", "1"], output={"format": "parquet"}), tmp_path / "grows")
    with pytest.raises(RequestError, match=r"output.image.*jpeg:0.*no such image format"):
        tiny_recipe(model, output={"image": "jpeg:0"})


def test_one_image_is_made_again_and_status_and_verify_say_what_is_there(model: str, tmp_path: Path):
    out = tmp_path / "out"
    handful.generate(tiny_recipe(model, per_class=3), out)
    done = status(out)
    assert (done.images, done.images_done, done.cohorts_done, done.workers, done.failed) == (6, 6, 4, [], {})
    assert verify(out).whole
    target = out / "images/1/000002.png"
    whole = target.read_bytes()
    job = prepare(read_recipe(out / "recipe.yaml"), out)
    again = make_again(job, "1/2")
    assert (again.image, again.same, again.largest, again.restored) == ("images/1/000002.png", True, 0.0, False)
    target.unlink()
    (out / "images/0/000000.png").write_bytes(b"other")
    (out / "images/0/extra.png").write_bytes(b"more")
    found = verify(out)
    assert (found.missing, found.damaged) == (["images/1/000002.png"], ["images/0/000000.png"])
    assert found.extra == ["images/0/extra.png"]
    again = make_again(job, "1/2")
    assert again.same
    assert again.restored
    assert target.read_bytes() == whole
    with pytest.raises(RequestError, match="no such image"):
        make_again(job, "1/9")


@pytest.mark.slow
def test_two_processes_by_the_workers_option_make_the_bytes_of_one(model: str, tmp_path: Path):
    recipe = tiny_recipe(model, per_class=8)
    handful.generate(recipe, tmp_path / "one")
    summary = run_with_workers(prepare(recipe, tmp_path / "two"), recipe, 2)
    assert (summary.images, summary.cohorts_done, summary.failures) == (16, 8, [])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
