"""A run ends with the same bytes however it was interrupted, ordered or resumed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.killed import killed
from support.runs import contents, digits_recipe, tiny_recipe

import handful
from handful.data.images import read_image
from handful.errors import RunError
from handful.features.registry import load_extractor
from handful.generate.run import prepare, run
from handful.models.unet2d import UNet2DDenoiser
from handful.runs import run_directory as directory_module
from handful.runs.progress import Progress


def manifest(out: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(out / "manifest.parquet").read(use_threads=False).to_pylist()


def test_a_run_directory_holds_what_was_asked_made_and_measured(digits_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    summary = handful.generate(digits_recipe(digits_folder), out)
    assert (summary.images, summary.cohorts_done, summary.cohorts_resumed, summary.cohorts_failed) == (12, 4, 0, 0)
    assert summary.images_per_second == pytest.approx(12 / summary.seconds)
    json.dumps(summary.as_dict())

    rows = manifest(out)
    assert [(row["class"], row["label"], row["index"], row["cohort"]) for row in rows] == [
        (name, int(name), index, index // 4) for name in ("1", "4") for index in range(6)
    ]
    assert {row["status"] for row in rows} == {"done"}
    extractor = load_extractor("pixels")
    for row in rows[:2]:
        image = read_image(out / row["file"], channels=1)
        nearest = read_image(digits_folder / row["nearest_exemplar"], channels=1, size=(8, 8))
        distance = torch.linalg.vector_norm(extractor(image[None]) - extractor(nearest[None]))
        assert row["nearest_exemplar_distance"] == pytest.approx(float(distance), rel=1e-4)
        assert json.loads(row["guidance"])[0]["method"] == "chamfer"
        assert math.isfinite(row["energy_chamfer"])
    assert rows[0]["energy_chamfer"] == rows[3]["energy_chamfer"] != rows[4]["energy_chamfer"], "one energy a cohort"

    lines = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    assert lines[0] == {"file_name": "1/000000.png", "label": "1"}
    assert sorted(line["file_name"] for line in lines) == sorted(
        str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.png")
    )
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert stored["guidance"][0]["features"] == "pixels"
    assert stored["model"]["null_class"] == 10
    assert stored["provenance"]["torch"] == version("torch")
    assert len(stored["provenance"]["levels"]["sigma"]) == 5
    assert (out / "contact_sheet.png").is_file()
    assert not (out / ".handful" / "tmp").exists()


def test_its_own_recipe_makes_it_again(digits_folder: Path, tmp_path: Path):
    handful.generate(digits_recipe(digits_folder), tmp_path / "one")
    handful.generate(tmp_path / "one" / "recipe.yaml", tmp_path / "other")
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    recipes = one.pop("recipe.yaml"), other.pop("recipe.yaml")
    assert one == other
    asked = [{key: value for key, value in yaml.safe_load(text).items() if key != "provenance"} for text in recipes]
    assert asked[0] == asked[1]


def test_the_order_of_cohorts_changes_no_byte(digits_folder: Path, tmp_path: Path):
    recipe = digits_recipe(digits_folder)
    handful.generate(recipe, tmp_path / "one")
    handful.generate(recipe, tmp_path / "other", order=[3, 1, 0, 2])
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_cohort_does_not_depend_on_how_many_follow(digits_folder: Path, tmp_path: Path):
    handful.generate(digits_recipe(digits_folder, per_class=4), tmp_path / "few")
    handful.generate(digits_recipe(digits_folder, per_class=8, classes=["4"]), tmp_path / "many")
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    for index in range(4):
        assert few[f"images/4/{index:06d}.png"] == many[f"images/4/{index:06d}.png"]
    assert few["images/4/000000.png"] != many["images/4/000004.png"]


@pytest.mark.parametrize("sampler", [{"name": "ddpm"}, {"name": "ddim", "eta": 0.5}, {"name": "heun"}, {"clamp": True}])
def test_every_sampler_runs_and_repeats_its_bytes(tiny_model: Callable[..., str], tmp_path: Path, sampler: dict):
    recipe = tiny_recipe(tiny_model(2), sampler={"steps": 3, **sampler})
    handful.generate(recipe, tmp_path / "one")
    handful.generate(recipe, tmp_path / "other", order=[3, 2, 1, 0])
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_run_killed_in_the_middle_ends_with_the_bytes_of_an_undisturbed_one(digits_folder: Path, tmp_path: Path):
    recipe = digits_recipe(digits_folder, classes=list("0123"), cohort=2, sampler={"steps": 18})
    handful.generate(recipe, tmp_path / "undisturbed")
    request = tmp_path / "r.yaml"
    request.write_text(yaml.safe_dump(recipe.as_dict()))
    out, marker = tmp_path / "killed", tmp_path / "killed" / ".handful" / "cohorts" / "0-0000.parquet"
    killed(["generate", request, "--out", out, "--quiet"], marker.exists)
    assert not (out / "manifest.parquet").exists(), "it was killed too late to prove anything"
    summary = handful.generate(recipe, out)
    assert summary.cohorts_resumed >= 1
    assert summary.cohorts_done >= 1
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_run_goes_on_with_as_many_threads_as_it_began_with(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another number of threads adds up in another order, and now and then another last bit."""
    recipe, out, forward, seen = tiny_recipe(tiny_model(2)), tmp_path / "out", UNet2DDenoiser.forward, set()

    def watched(*given: Any) -> Any:
        seen.add(torch.get_num_threads())
        return forward(*given)

    threads = torch.get_num_threads()
    handful.generate(recipe, out)
    wanted = contents(out)
    shutil.rmtree(out / "images/1")
    torch.set_num_threads(threads + 1)
    try:
        job = prepare(recipe, out)  # which asks the model for one image already
        monkeypatch.setattr(UNet2DDenoiser, "forward", watched)
        assert run(job).cohorts_done == 2
        assert torch.get_num_threads() == threads + 1, "the caller's again"
    finally:
        torch.set_num_threads(threads)
    assert seen == {threads}
    assert contents(out) == wanted


class _Killed(BaseException):
    pass


def test_wherever_it_stops_it_ends_with_the_same_bytes(tiny_model: Callable[..., str], tmp_path: Path):
    """Stops before every single rename of a run, leaving all as it is, as a kill does."""
    recipe = tiny_recipe(tiny_model(2))
    handful.generate(recipe, tmp_path / "undisturbed")
    wanted, rename = contents(tmp_path / "undisturbed"), os.replace
    for stop in range(len(wanted)):
        out, count = tmp_path / f"stopped-{stop}", iter(range(10**6))

        def renaming(source: Any, target: Any, stop: int = stop, count: Iterator[int] = count) -> None:
            if next(count) == stop:
                raise _Killed
            rename(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(directory_module.os, "replace", renaming)
            # once at the start of a run; not at its end, which a kill does not reach
            patch.setattr(directory_module.RunDirectory, "_clear", lambda self: None)
            with pytest.raises(_Killed):
                handful.generate(recipe, out)
        handful.generate(recipe, out)
        assert contents(out) == wanted


def test_damaged_or_missing_files_are_made_again(tiny_model: Callable[..., str], tmp_path: Path):
    recipe, out = tiny_recipe(tiny_model(2)), tmp_path / "out"
    handful.generate(recipe, out)
    wanted = contents(out)
    (out / "images/0/000001.png").write_bytes(b"damaged")
    (out / "images/1/000000.png").unlink()
    (out / ".handful/cohorts/1-0001.parquet").write_bytes(b"damaged")
    (out / "manifest.parquet").unlink()
    summary = handful.generate(recipe, out)
    assert (summary.cohorts_done, summary.cohorts_resumed) == (3, 1)
    assert contents(out) == wanted
    assert handful.generate(recipe, out).cohorts_done == 0


def test_a_failed_cohort_is_told_the_others_go_on_and_it_is_tried_again(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(2)
    recipe, out = tiny_recipe(model), tmp_path / "out"
    handful.generate(recipe, tmp_path / "undisturbed")
    forward = UNet2DDenoiser.forward

    def diverging(self: Any, x_t: Any, level: Any, condition: Any) -> Any:
        x0 = forward(self, x_t, level, condition)
        return x0 * float("nan") if level.index == 1 and int(condition.labels[0]) == 1 else x0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DDenoiser, "forward", diverging)
        summary = handful.generate(recipe, out)
    assert (summary.cohorts_done, summary.cohorts_failed, summary.images) == (2, 2, 4)
    for part in (model, "class '1'", "cohort 0", "step 2 of 3", "NaN"):
        assert part in summary.failures[0]
    assert [row["status"] for row in manifest(out)] == ["done"] * 4 + ["failed"] * 4
    assert len((out / "images/metadata.jsonl").read_text().splitlines()) == 4
    summary = handful.generate(recipe, out)
    assert (summary.cohorts_done, summary.cohorts_resumed, summary.cohorts_failed) == (2, 2, 0)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_model_of_nan_fails_every_cohort_and_writes_no_image(tiny_model: Callable[..., str], tmp_path: Path):
    summary = handful.generate(tiny_recipe(tiny_model(2, broken=True)), tmp_path / "out")
    assert (summary.images, summary.cohorts_failed, summary.images_per_second) == (0, 4, None)
    assert "step 1 of 3" in summary.failures[0]
    assert not (tmp_path / "out" / "images").exists()


def test_an_unconditional_model_takes_the_exemplars_classes(
    tiny_model: Callable[..., str], digits_folder: Path, tmp_path: Path
):
    exemplars = {"path": str(digits_folder), "per_class": 2}
    guidance = [{"method": "chamfer", "features": "pixels"}]
    recipe = tiny_recipe(tiny_model(), exemplars=exemplars, classes=["7", "8"], guidance=guidance)
    handful.generate(recipe, tmp_path / "out")
    assert {(row["class"], row["label"]) for row in manifest(tmp_path / "out")} == {("7", None), ("8", None)}


def test_the_last_label_becomes_the_null_class_and_cfg_works(
    tiny_model: Callable[..., str], digits_folder: Path, tmp_path: Path
):
    named = {"a": "2", "b": "3"}
    for name, digit in named.items():
        shutil.copytree(digits_folder / digit, tmp_path / "real" / name)
    recipe = tiny_recipe(tiny_model(3), exemplars={"path": str(tmp_path / "real")}, guidance=[{"method": "cfg"}])
    summary = handful.generate(recipe, tmp_path / "out")
    assert any("null class: label 2" in note for note in summary.notes)
    stored = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    assert (stored["model"]["null_class"], stored["model"]["classes"]) == (2, ["a", "b"])
    assert any("null class" in note for note in stored["provenance"]["notes"])
    assert manifest(tmp_path / "out")[0]["nearest_exemplar"] is None, "no features to measure by"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_is_finished_and_goes_on_later(tiny_model: Callable[..., str], tmp_path: Path, small_disk: Path):
    recipe = tiny_recipe(tiny_model(2), per_class=8)
    handful.generate(recipe, tmp_path / "undisturbed")
    out, filler = small_disk / "out", small_disk / "filler"

    class Filling(Progress):
        """Takes the space away once the work has begun, after all checks."""

        def begin(self, total: int, done: int) -> None:
            filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 60 * 1024))

    with pytest.raises(RunError, match=r"disk is full.*repeat the same command"):
        handful.generate(recipe, out, progress=Filling())
    markers = list((out / ".handful/cohorts").iterdir())
    assert 1 <= len(markers) < 8
    assert not list(out.rglob("tmp"))
    filler.unlink()
    assert handful.generate(recipe, out).cohorts_resumed == len(markers)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_full_disk_is_told_from_other_errors(tmp_path: Path):
    for number, kind in ((errno.ENOSPC, RunError), (errno.EDQUOT, RunError), (errno.EIO, OSError)):
        with pytest.raises(kind), directory_module.explain_full_disk(tmp_path):
            raise OSError(number, os.strerror(number))


def test_progress_adds_up_to_the_images(tiny_model: Callable[..., str], tmp_path: Path):
    class Counting(Progress):
        total, done, ended = 0, 0.0, 0

        def begin(self, total: int, done: int) -> None:
            self.total, self.done = total, done

        def advance(self, amount: float) -> None:
            self.done += amount

        def end(self) -> None:
            self.ended += 1

    for broken in (False, True):
        progress = Counting()
        recipe = tiny_recipe(tiny_model(2, broken=broken))
        handful.generate(recipe, tmp_path / str(broken), progress=progress)
        assert (progress.total, progress.ended) == (8, 1)
        assert progress.done == pytest.approx(8)
