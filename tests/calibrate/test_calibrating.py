"""Calibration end to end: its files can be used and are the same whenever the same is asked; what makes no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from support.calibration import asked

from handful.calibrate import CalibrateSummary, calibrate, prepare
from handful.errors import RequestError
from handful.generate import generate
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.resolve import complete
from handful.recipe.schema import recipe_from
from handful.runs.progress import Progress

FILES = ("guidance.yaml", "calibration.parquet", "reliability.png", "calibration.json")


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> CalibrateSummary:
    out = tmp_path_factory.mktemp("calibration") / "out"
    return calibrate(prepare(asked(), out))


def test_the_guidance_block_is_a_recipes_and_generates(done: CalibrateSummary, tmp_path: Path):
    block = yaml.safe_load((done.out / "guidance.yaml").read_text())
    assert [term["method"] for term in block] == ["classifier"]
    assert block == done.result["guidance"]
    recipe = recipe_from(
        {"model": {"name": "digits"}, "classes": ["1", "4"], "per_class": 2, "sampler": {"steps": 4}, "guidance": block}
    )
    complete(recipe)
    assert generate(recipe, tmp_path / "out").images == 4
    chosen = done.result["chosen"]
    assert block[0]["softplus"] == chosen["softplus"]
    assert bool(block[0].get("temperatures")) == chosen["fitted"]


def test_the_rows_are_tidy_and_say_what_the_json_says(done: CalibrateSummary):
    rows = pq.ParquetFile(done.out / "calibration.parquet").read(use_threads=False).to_pylist()
    told = {each["candidate"]: each for each in done.result["candidates"]}
    assert len(rows) == len(told) * 4 == 2 * 2 * 3 * 4
    for name, each in told.items():
        mine = [row for row in rows if row["candidate"] == name]
        assert [row["step"] for row in mine] == [0, 1, 2, 3]
        assert all(row["n"] == 8 and 0 <= row["ece"] <= 1 and 0 <= row["roughness"] <= 1 for row in mine)
        assert np.mean([row["ece"] for row in mine]) == pytest.approx(each["integral_ece"])
    ratios = [row["sigma_over_alpha"] for row in rows[:4]]
    assert ratios == sorted(ratios, reverse=True)
    assert json.loads((done.out / "calibration.json").read_text()) == done.result


def test_the_picture_is_large_enough_to_read(done: CalibrateSummary):
    with Image.open(done.out / "reliability.png") as picture:
        assert picture.size[0] >= 1200
        assert picture.size[1] >= 800


def test_the_same_request_gives_the_same_files_there_and_elsewhere(done: CalibrateSummary, tmp_path: Path):
    before = contents(done.out)
    again = calibrate(prepare(asked(), done.out))
    assert again.kept and not done.kept  # noqa: PT018
    assert contents(done.out) == before
    calibrate(prepare(asked(), tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_a_calibration_that_was_interrupted_goes_on_and_ends_the_same(done: CalibrateSummary, tmp_path: Path):
    out = tmp_path / "out"
    job = prepare(asked(), out)
    seen: list[str] = []

    class Interrupting(Progress):
        def advance(self, amount: float, now: str = "") -> None:
            seen.append(now)
            if now == "4":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(job, Interrupting())
    kept = {file.name: file.stat().st_mtime_ns for file in (out / ".handful/seen").iterdir()}
    assert list(kept) == ["1-0000.safetensors"]
    calibrate(prepare(asked(), out))
    assert contents(out) == contents(done.out)
    assert not (out / ".handful/seen").exists(), "what only the work needed is gone"


def test_a_directory_with_something_else_is_refused_and_kept(done: CalibrateSummary, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="not from a calibration"):
        prepare(asked(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RequestError, match=r"recipe\.seed: 0 there, 1 now"):
        prepare(asked(seed=1), done.out)
    with pytest.raises(RequestError, match="betas"):
        prepare(asked(betas=(None, 3.0)), done.out)


@pytest.fixture
def unconditional(tmp_path: Path) -> str:
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    network.save_pretrained(tmp_path / "unconditional/unet")
    DDPMScheduler().save_pretrained(tmp_path / "unconditional/scheduler")
    return str(tmp_path / "unconditional")


def test_a_model_that_is_told_nothing_is_refused(unconditional: str, tmp_path: Path):
    with pytest.raises(RequestError, match="calibration needs the class that each image was generated for"):
        prepare(asked(model={"name": unconditional}, classes=None), tmp_path / "out")


def test_what_is_no_classifier_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="no logits"):
        prepare(asked(ClassifierRequest(classifier="pixels")), tmp_path / "out")


def test_a_single_image_of_a_class_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="per_class: 1"):
        prepare(asked(per_class=1), tmp_path / "out")
    with pytest.raises(RequestError, match=r"per_class: '1=4': a calibration makes as many images of each class"):
        prepare(asked(counts={"1": 4}), tmp_path / "out")


OTHERS = """
import torch
from torch import nn
from handful.features.registry import FeatureExtractor

class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)
    def forward(self, x):
        return self.linear(x.flatten(1))

class Constant(nn.Module):
    def forward(self, x):
        return 0 * x.flatten(1)[:, :10]

class Detached(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 10)

def three():
    torch.manual_seed(0)
    network = Three()
    return FeatureExtractor("three", network, channels=1, size=(8, 8), classify=network)

def constant():
    network = Constant()
    return FeatureExtractor("constant", network, channels=1, size=(8, 8), classify=network)

def detached():
    network = Detached()
    return FeatureExtractor("detached", network, channels=1, size=(8, 8), classify=network)
"""


@pytest.fixture
def others(tmp_path: Path) -> Path:
    file = tmp_path / "others.py"
    file.write_text(OTHERS)
    return file


def test_other_classes_need_a_mapping_which_is_checked(others: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="--class NAME=NUMBER"):
        prepare(asked(ClassifierRequest(classifier=f"{others}:three")), tmp_path / "out")
    with pytest.raises(RequestError, match="0 to 2"):
        prepare(asked(ClassifierRequest(classifier=f"{others}:three", classes={"1": 0, "4": 3})), tmp_path / "out")
    job = prepare(
        asked(ClassifierRequest(classifier=f"{others}:three", classes={"1": 0, "4": 2}), betas=None), tmp_path / "out"
    )
    assert job.targets == {"1": 0, "4": 2}
    assert list(job.classifiers) == [None], "without a ReLU there is no Softplus"
    assert any("softplus is left out" in note for note in job.notes)


def test_a_softplus_that_was_asked_for_and_can_not_be_had_is_refused(others: Path, tmp_path: Path):
    classifier = ClassifierRequest(classifier=f"{others}:three", classes={"1": 0, "4": 2})
    with pytest.raises(RequestError, match="--betas"):
        prepare(asked(classifier), tmp_path / "out")


def test_a_constant_classifier_is_measured_and_told_that_it_can_not_guide(others: Path, tmp_path: Path):
    job = prepare(asked(ClassifierRequest(classifier=f"{others}:constant"), betas=(None,)), tmp_path / "out")
    result = calibrate(job).result
    assert any("can't guide" in note for note in result["notes"])
    assert all(not each["guides"] and each["roughness"] is None for each in result["candidates"])
    plain = result["candidates"][0]
    assert plain["confidence"] == pytest.approx(0.1)
    # it names every image 0, and none was asked to be: |0 - 1/10|
    assert plain["integral_ece"] == pytest.approx(0.1, abs=1e-6)
    assert yaml.safe_load((tmp_path / "out/guidance.yaml").read_text())[0]["method"] == "classifier"


def test_a_classifier_that_lets_no_gradient_through_is_refused_before_the_work(others: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="no gradient"):
        prepare(asked(ClassifierRequest(classifier=f"{others}:detached"), betas=(None,)), tmp_path / "out")


def test_few_images_are_pointed_out_with_what_chance_would_show(done: CalibrateSummary):
    assert any("with only 8 images per step" in note for note in done.result["notes"])
    assert all(each["chance"] is not None for each in done.result["candidates"])


def test_the_plan_counts_the_work(tmp_path: Path):
    plan = prepare(asked(), tmp_path / "out").plan()
    assert (plan["images"], plan["steps"], plan["denoiser_evaluations"]) == (8, 4, 32)
    assert plan["classifier_evaluations"] == 32 * 2 * 2
    assert plan["gradients"] == 8 * 4 * plan["candidates"]
    assert plan["trial_sets"] == 0
    assert not (tmp_path / "out").exists()
