"""The packaging tool: whatever layout weights come in, the package gets the same; nothing damaged gets in."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import package_cifar10 as tool

from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError, RunError
from handful.files.sealed import unseal
from handful.models import load
from handful.zoo.cifar10 import CLASSES, KIND, VERSION


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network of 8 x 8 images and eleven labels, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    ).save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / tool.WEIGHTS)


def test_float_weights_are_rounded_to_bfloat16_and_the_difference_is_told(trained, tmp_path):
    told = tool.install_model(trained, tmp_path)
    assert "rounded from float32 to bfloat16" in told
    assert {value.dtype for value in weights_of(tmp_path).values()} == {torch.bfloat16}
    rounded = {name: value.bfloat16() for name, value in weights_of(trained).items()}
    assert all(torch.equal(rounded[name], value) for name, value in weights_of(tmp_path).items())
    denoiser = load(tmp_path)
    assert tuple(denoiser.classes) == CLASSES
    assert denoiser.null_class == 10
    assert tool.install_model(tmp_path, tmp_path / "again") == "The weights came as bfloat16, and are as they came."
    assert (tmp_path / "again" / "unet" / tool.WEIGHTS).read_bytes() == (tmp_path / "unet" / tool.WEIGHTS).read_bytes()


def test_a_flat_directory_with_weights_in_parts_is_the_same_model(trained, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(trained / "unet" / "config.json", flat)
    shutil.copy(trained / "scheduler" / "scheduler_config.json", flat)
    held = save({name: value.bfloat16() for name, value in weights_of(trained).items()})
    size = len(held) // 11 + 1  # twelve parts: part10 is not the second
    for place in range(0, len(held), size):
        (flat / f"ema.safetensors.part{place // size}").write_bytes(held[place : place + size])
    tool.install_model(flat, tmp_path / "a")
    tool.install_model(trained, tmp_path / "b")
    first, second = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json", f"unet/{tool.WEIGHTS}", "cut"])
def test_an_incomplete_or_damaged_model_is_refused_and_the_package_kept(trained, tmp_path, missing):
    source, zoo = tmp_path / "source", tmp_path / "zoo"
    shutil.copytree(trained, source)
    tool.install_model(trained, zoo)
    before = {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}
    if missing == "cut":
        file = source / "unet" / tool.WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (source / missing).unlink()
    with pytest.raises(RequestError, match="--model"):
        tool.install_model(source, zoo)
    assert {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()} == before


def test_weights_of_another_network_are_refused_and_the_package_kept(trained, tmp_path):
    source, zoo = tmp_path / "source", tmp_path / "zoo"
    shutil.copytree(trained, source)
    config = json.loads((source / "unet" / "config.json").read_text())
    (source / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 16]}))
    tool.install_model(trained, zoo)
    before = (zoo / "unet" / "config.json").read_bytes()
    with pytest.raises(RequestError, match="--model"):
        tool.install_model(source, zoo)
    assert (zoo / "unet" / "config.json").read_bytes() == before


def test_classifiers_become_float16_and_others_are_refused(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    for depth in (20, 56):
        save_file(tool.CifarResNet(depth).state_dict(), given / f"resnet{depth}.safetensors")
    tool.install_classifiers(given, tmp_path / "zoo")
    held = load_file(tmp_path / "zoo" / "guide" / "model.safetensors")
    original = load_file(given / "resnet20.safetensors")
    assert all(torch.equal(value, original[name].half()) for name, value in held.items() if value.is_floating_point())
    shutil.copy(given / "resnet20.safetensors", given / "resnet56.safetensors")
    with pytest.raises(RequestError, match="does not hold a ResNet-56"):
        tool.install_classifiers(given, tmp_path / "other")


def test_of_real_images_only_features_are_kept_the_first_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "EXEMPLARS", 2)
    monkeypatch.setattr(tool, "REAL", 1)
    draw = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        rows = []
        for place in range(3):
            for label, name in enumerate(CLASSES):
                stream = io.BytesIO()
                pixels = torch.randint(256, (32, 32, 3), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(stream, "PNG")
                rows.append({"image": {"bytes": stream.getvalue(), "path": f"{name}/{place}.png"}, "label": label})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    tool.install_features(tmp_path, tmp_path / "zoo")
    exemplars = ExemplarFeatures.load(tmp_path / "zoo" / "exemplars.safetensors")
    assert exemplars.counts == dict.fromkeys(CLASSES, 2)
    assert exemplars.held() == (
        "cifar10-guide at reduce 1, cifar10-judge at reduce 1, cifar10-guide softplus 3 at reduce 1, "
        "cifar10-guide softplus 3 at reduce 2"
    )
    for judge, width in (("judge", 64), ("simclr", 128)):
        settings, tensors = unseal(tmp_path / "zoo" / f"real-{judge}.safetensors", KIND, VERSION, field="", remedy="")
        assert settings["labels"] == list(CLASSES)
        assert {tuple(value.shape) for name, value in tensors.items() if name.startswith("features/")} == {(10, width)}
    assert json.loads((tmp_path / "zoo" / "judge" / "config.json").read_text())["network"] == {"depth": 56}


def test_the_cards_sections_are_replaced_and_nothing_else(tmp_path):
    (tmp_path / "README.md").write_text("# card\n<!-- trained -->\nold\n<!-- /trained -->\nkept \\1\n")
    tool.write_card(tmp_path, {"trained": "new \\1 text"})
    assert (tmp_path / "README.md").read_text() == "# card\n<!-- trained -->\nnew \\1 text\n<!-- /trained -->\nkept \\1\n"
    with pytest.raises(RunError, match="measured"):
        tool.write_card(tmp_path, {"measured": "x"})


def test_what_is_needed_is_said_first(capsys):
    assert tool.main([]) == 2
    assert capsys.readouterr().err.startswith("error: --model: it is needed")
    assert tool.main(["--only", "features"]) == 2
