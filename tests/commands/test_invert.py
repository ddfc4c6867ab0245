"""`handful invert`, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from support.killed import killed
from support.pictures import save

from handful import cli, console
from handful.data.images import read_image, write_png
from handful.generate.invert import scaled_interval
from handful.guidance.inversion import Embeddings
from handful.zoo.digits import load_digits_split

QUICK = ("--steps", 8, "--epochs", 2)


def handful(*arguments: object) -> int:
    return console.answer(cli.app, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert handful("invert", *arguments, "--json") == 2
    return json.loads(capsys.readouterr().out)["error"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten inverted digits."""
    root = tmp_path_factory.mktemp("targets")
    for place, image in enumerate(load_digits_split().train_images[:10]):
        write_png(root / f"{place}.png", -image)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained models of 8 x 8 colour images, without labels and with three."""
    root = tmp_path_factory.mktemp("models")
    for name, labels in (("plain", None), ("labels", 3)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            UNet2DModel(
                sample_size=8,
                in_channels=3,
                out_channels=3,
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                num_class_embeds=labels,
            ).save_pretrained(root / name / "unet")
        DDPMScheduler().save_pretrained(root / name / "scheduler")
    return {name: str(root / name) for name in ("plain", "labels")}


def test_targets_become_a_file_that_generate_makes_many_images_of(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "sge.safetensors"
    assert handful("invert", targets, "--model", "digits", "--out", file, *QUICK) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"10 targets, 5 segments in {file} (fitted in ")
    assert "reconstruction: MSE 0." in said.out
    assert said.err.splitlines()[-2] == "fitting 10 epochs"
    assert "fitted 10 of 10 epochs" in said.err
    assert "segment 0, epoch 2 of 2, loss 0." in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["sge.safetensors"], "the partial file is gone"
    embeddings = Embeddings.load(file)
    assert (len(embeddings), embeddings.interval, embeddings.levels.steps) == (10, (1, 6), 8)

    options = ("--guidance", "inversion", "--embeddings", file, "--per-class", 20, "--classes", "babies")
    assert handful("generate", "--model", "digits", *options, "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / "images" / "babies").glob("*.png"))) == 20
    capsys.readouterr()
    assert handful("generate", "--model", "digits", *options, "--out", tmp_path / "other", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "sampler    ddim, the last 6 of 8 steps, trailing" in plan
    assert f"guidance   inversion, embeddings {file}, scale 1.0, exchange step" in plan


def test_json_stands_alone_and_the_same_request_keeps_its_file(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "sge.safetensors"
    arguments = ("invert", targets, "--model", "digits", "--out", file, *QUICK, "--segments", 2)
    assert handful(*arguments, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["targets"], first["segments"], len(first["losses"]), first["kept"]) == (10, 2, 2, False)
    assert (first["reconstruction"]["n"], first["reconstruction"]["window"]) == (10, 7)
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert handful(*arguments, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["resumed"], again["kept"]) == (True, True)
    assert again["reconstruction"] == first["reconstruction"]
    assert handful(*arguments) == 0
    assert "(from an earlier run; loss" in capsys.readouterr().out
    assert before == (file.stat().st_mtime_ns, file.read_bytes())
    assert handful(*arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("--seed", 1), "seed: 0 there, 1 now"),
        (("--no-clamp",), "clamp: True there, False now"),
        (("--condition", "3"), "label: 10 there, 3 now"),
        (("--dtype", "bfloat16"), "dtype: 'float32' there, 'bfloat16' now"),
    ],
)
def test_the_file_of_another_request_is_refused_and_left_alone(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: tuple[Any, ...], said: str
):
    file = tmp_path / "sge.safetensors"
    arguments = (targets, "--model", "digits", "--out", file, *QUICK)
    assert handful("invert", *arguments, "--quiet") == 0
    before = file.read_bytes()
    error = refused(capsys, *arguments, *other)
    assert error["field"] == "out"
    assert said in error["message"]
    assert file.read_bytes() == before


def test_a_file_that_is_none_of_ours_is_left_alone(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "thesis.txt"
    file.write_text("years of work")
    error = refused(capsys, targets, "--model", "digits", "--out", file)
    assert "it holds no sample-wise guidance embeddings" in error["message"]
    assert "nothing here has been changed" in error["message"]
    assert file.read_text() == "years of work"


def test_a_dry_run_says_the_plan_and_writes_nothing(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ("invert", targets, "--model", "digits", "--out", tmp_path / "sge.safetensors", "--dry-run")
    assert handful(*arguments) == 0
    said = capsys.readouterr().out
    assert "guided     steps 5 to 19 from the clean end, segments: 15, scale 2" in said
    assert "fit        difference, 10 epochs per segment" in said
    assert handful(*arguments, "--json", "--method", "adam") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["targets"], plan["epochs"], plan["interval"], plan["label"]) == (10, 120, [5, 20], 10)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["difference", "adam"])
def test_a_fit_that_was_killed_ends_with_the_same_bytes(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
):
    arguments = ["--model", "digits", "--method", method, "--epochs", "6", "--quiet"]
    assert handful("invert", targets, "--out", tmp_path / "one", *arguments) == 0
    other = tmp_path / "other"
    partial = tmp_path / "other.partial"
    killed(["invert", targets, "--out", other, *arguments], partial.exists)
    assert not other.exists(), "it was killed too late to prove anything"
    began = Embeddings.load(tmp_path / "one").segments * 6
    capsys.readouterr()
    assert handful("invert", targets, "--out", other, *arguments[:-1], "--json") == 0
    assert f"of {began} exist already)" in capsys.readouterr().err
    assert other.read_bytes() == (tmp_path / "one").read_bytes()
    assert not partial.exists()


def test_an_unfinished_fit_of_another_request_is_refused(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A clamp is no business of the fit's own checkpoint, and yet decides what is fitted."""
    from handful.generate.invert import InvertRequest, invert, prepare
    from handful.runs.progress import Progress

    class Stopped(Progress):
        def advance(self, amount: float, now: str = "") -> None:
            if now.startswith("segment 2"):
                raise KeyboardInterrupt

    out = tmp_path / "sge"
    with pytest.raises(KeyboardInterrupt):
        invert(prepare(InvertRequest({"name": "digits"}, steps=8, epochs=2), targets, out), Stopped())
    assert [path.name for path in tmp_path.iterdir()] == ["sge.partial"]
    error = refused(capsys, targets, "--model", "digits", "--out", out, *QUICK, "--no-clamp")
    assert "it belongs to a fit with other targets, settings or model" in error["message"]
    assert handful("invert", targets, "--model", "digits", "--out", out, *QUICK, "--quiet") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sge"]


def test_a_single_folder_inside_is_taken_and_of_several_none(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        write_png_copy(targets / "0.png", tmp_path / "real" / name / "0.png")
    error = refused(capsys, tmp_path / "real", "--model", "digits", "--out", tmp_path / "sge")
    assert error["field"] == "targets"
    assert "it holds 2 folders of images" in error["message"]
    (tmp_path / "real" / "b" / "0.png").unlink()
    (tmp_path / "real" / "b").rmdir()
    assert handful("invert", tmp_path / "real", "--model", "digits", "--out", tmp_path / "sge", *QUICK, "--json") == 0
    assert json.loads(capsys.readouterr().out)["targets"] == 1, "one target is enough"


def write_png_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def test_targets_of_other_sizes_and_colours_are_taken_with_a_note(
    targets: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "mixed"
    write_png_copy(targets / "0.png", root / "0.png")
    write_png_copy(targets / "0.png", root / "copy.png")
    save(root / "large.png", np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert handful("invert", root, "--model", "digits", "--out", tmp_path / "gray", *QUICK) == 0
    said = capsys.readouterr().err
    assert "note: targets: 1 of 3 have another size than 8 x 8: cropped and resized" in said
    assert "note: targets: 1 of 3 have colours, and are converted to gray" in said
    assert "note: targets: the same image more than once: 0.png = copy.png" in said
    assert handful("invert", root, "--model", models["plain"], "--out", tmp_path / "colour", *QUICK) == 0
    assert "note: targets: 2 of 3 are gray, but the model makes colour images" in capsys.readouterr().err
    kept = Embeddings.load(tmp_path / "colour")
    assert torch.equal(kept.x0[2], read_image(root / "large.png", channels=3, size=(8, 8)))
    assert torch.equal(kept.x0[0], kept.x0[1])
    assert kept.targets[0] == kept.targets[1] != kept.targets[2]


def test_a_model_of_labels_without_null_class_must_be_told_one(
    targets: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = (targets, "--model", models["labels"], "--out", tmp_path / "sge", *QUICK)
    assert refused(capsys, *arguments)["field"] == "condition"
    assert "It knows: 0, 1, 2" in refused(capsys, *arguments, "--condition", "cat")["message"]
    assert "It knows: cat, dog, owl" in refused(capsys, *arguments, "--class-names", "cat,dog,owl", "--condition", "cow")[
        "message"
    ].replace("'", "")
    assert handful("invert", *arguments, "--class-names", "cat,dog,owl", "--condition", "dog", "--quiet") == 0
    assert Embeddings.load(tmp_path / "sge").fitted["told"]["label"] == 1
    arguments = (*arguments[:4], tmp_path / "null", *QUICK)
    assert handful("invert", *arguments, "--null-class", 2, "--quiet") == 0
    told = Embeddings.load(tmp_path / "null").fitted["told"]
    assert (told["label"], told["null_class"]) == (2, 2)
    assert (
        "this model is unconditional"
        in refused(capsys, targets, "--model", models["plain"], "--out", tmp_path / "x", "--condition", "cat")["message"]
    )


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        (("--segments", 16), "segments", "15 guided steps can be cut into 1 to 15 segments"),
        (("--interval", "20,5"), "interval", "the paper's is (5, 20) of 25"),
        (("--interval", "5"), "--interval", "not two whole numbers"),
        (("--method", "newton"), "method", "Ways: adam, difference"),
        (("--lr", "-1"), "lr", "above 0"),
        (("--score-scale", "0"), "score_scale", "above 0"),
        (("--epochs", 0), "epochs", "1 or more"),
        (("--spread-weight", "nan"), "spread_weight", "finite"),
        (("--perturbation", "-1"), "perturbation", "0 or more"),
        (("--chunk", 0), "chunk", "greater than or equal to 1"),
        (("--spacing", "karras"), "spacing", "trailing, leading"),
        (("--device", "gpu"), "model.device", "there is no such device"),
        (("--dtype", "int8"), "model.dtype", "there is no such choice"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_anything_is_fitted(
    targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], field: str, said: str
):
    error = refused(capsys, targets, "--model", "digits", "--out", tmp_path / "sge", *options)
    assert error["field"] == field
    assert said in error["message"]
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_read_or_written_are_refused(targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "there is no folder" in refused(capsys, targets, "--model", "digits", "--out", tmp_path / "a" / "sge")["message"]
    assert "this is a folder" in refused(capsys, targets, "--model", "digits", "--out", tmp_path)["message"]
    assert refused(capsys, tmp_path / "none", "--model", "digits", "--out", tmp_path / "x")["field"] == "targets"
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    assert "not an image" in refused(capsys, tmp_path / "bad", "--model", "digits", "--out", tmp_path / "x")["message"]
    assert "no such directory" in refused(capsys, targets, "--model", "digit", "--out", tmp_path / "x")["message"]


@pytest.mark.parametrize(("steps", "interval"), [(25, (5, 20)), (50, (10, 40)), (10, (2, 8)), (4, (0, 3)), (1, (0, 1))])
def test_the_papers_interval_is_scaled_to_the_steps(steps: int, interval: tuple[int, int]):
    assert scaled_interval(steps) == interval
