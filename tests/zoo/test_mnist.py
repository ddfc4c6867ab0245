"""The packaged mnist: our network is the published one, its denoiser is a flow, and the UCI digits lie where MNIST's do."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from handful.core.noise import level, noised
from handful.core.samplers import dpmpp_2m, start
from handful.errors import RequestError
from handful.models import load, skeleton
from handful.zoo import zoo_path
from handful.zoo.mnist import load_uci_split

PUBLISHED = "0e53f061eb1df36dcea29afeae69c91d928a850ac0e16fd5f6f2cfc87bdbcc58"


def published(weights: dict[str, torch.Tensor], x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The network by plain operations on its weights, in float64, from the description of the model; no module of ours."""
    w = {name: value.double() for name, value in weights.items()}
    x_t, t = x_t.double(), t.double()
    patches = x_t.unfold(2, 7, 7).unfold(3, 7, 7).reshape(len(x_t), 16, 49)
    tokens = patches @ w["patch_embed.weight"].reshape(64, 49).T + w["patch_embed.bias"] + w["pos_embed"]
    angles = t[:, None] * torch.exp(-torch.arange(64, dtype=torch.float64) * math.log(10000) / 63)
    time = torch.stack([angles.sin(), angles.cos()], 1)
    x = torch.cat([tokens, time, w["y_encoder.weight"][labels].reshape(-1, 2, 64)], 1)
    for layer in range(4):
        p = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"transformer.{layer}.")}
        qkv = (x @ p["self_attn.in_proj_weight"].T + p["self_attn.in_proj_bias"]).reshape(len(x), 20, 3, 4, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).reshape(len(x), 20, 64)
        x = x + mixed @ p["self_attn.out_proj.weight"].T + p["self_attn.out_proj.bias"]
        x = F.layer_norm(x, (64,), p["norm1.weight"], p["norm1.bias"])
        hidden = x @ p["linear1.weight"].T + p["linear1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = F.layer_norm(x + hidden @ p["linear2.weight"].T + p["linear2.bias"], (64,), p["norm2.weight"], p["norm2.bias"])
    out = (x[:, :16] @ w["unpatch.weight"].reshape(64, 49)).reshape(-1, 4, 4, 7, 7)
    return out.transpose(2, 3).reshape(-1, 1, 28, 28) + w["unpatch.bias"]


@pytest.fixture(scope="module")
def denoiser():
    return load("mnist")


@pytest.mark.parametrize("gradient", [False, True])  # torch has a fused path without gradients, and another with them
def test_the_network_is_the_published_one(denoiser, gradient):
    draw = torch.Generator().manual_seed(0)
    x_t = torch.rand(6, 1, 28, 28, generator=draw).requires_grad_(gradient)
    t, labels = torch.tensor([0.0, 0.1, 0.5, 0.5, 0.9, 1.0]), torch.tensor([0, 3, 9, 10, 10, 7])
    with torch.set_grad_enabled(gradient):
        found = denoiser.network(x_t, t, labels)
    weights = load_file(zoo_path("mnist") / "model.safetensors")
    torch.testing.assert_close(found.double(), published(weights, x_t, t, labels), rtol=0, atol=1e-5)
    in_double = load("mnist").network.double()
    torch.testing.assert_close(
        in_double(x_t.double(), t.double(), labels), published(weights, x_t, t, labels), rtol=0, atol=1e-6
    )


def test_every_published_weight_counts_in_the_comparison():
    """By far more than the tolerance: so the agreement above is of the whole network, and no chance."""
    file = zoo_path("mnist") / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == PUBLISHED, "the weights are the published ones, unchanged"
    weights = load_file(file)
    draw = torch.Generator().manual_seed(0)
    asked = torch.rand(2, 1, 28, 28, generator=draw), torch.tensor([0.3, 0.9]), torch.tensor([3, 10])
    as_published = published(weights, *asked)
    for name, value in weights.items():
        changed = published({**weights, name: 1.01 * value}, *asked)
        assert (changed - as_published).abs().max() > 1e-4, name


def test_the_flow_is_the_networks_own_in_other_units(denoiser):
    draw = torch.Generator().manual_seed(1)
    images, eps, labels = torch.rand(4, 1, 28, 28, generator=draw), torch.randn(4, 1, 28, 28, generator=draw), torch.arange(4)
    path = denoiser.levels.spacing(10)
    for step in (0, 3, 9):  # 0: pure noise
        t = 1 - step / 10
        own = denoiser.network((1 - t) * images + t * eps, torch.full((4,), 1 - t), labels)
        scale = float(path[step].alpha + path[step].sigma)
        assert scale == pytest.approx(1)
        at = path[step]
        found = denoiser(noised(2 * images - 1, eps, at), at, denoiser.condition(labels))
        torch.testing.assert_close(found, 2 * own - 1, rtol=0, atol=1e-5)


def test_every_process_of_one_noise_to_signal_ratio_gives_one_estimate(denoiser):
    draw = torch.Generator().manual_seed(2)
    x0, eps = torch.rand(3, 1, 28, 28, generator=draw) * 2 - 1, torch.randn(3, 1, 28, 28, generator=draw)
    told = denoiser.condition([1, 2, 10])
    a, b = (denoiser(noised(x0, eps, at), at, told) for at in (level(1.0, 2.5), level(1 / 3.5, 2.5 / 3.5)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_it_draws_digits_with_ink_in_the_middle_and_knows_its_null_class(denoiser):
    path = denoiser.levels.spacing(6)
    noise = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        drawn = dpmpp_2m(denoiser, start(noise, path), path, denoiser.condition([0, 1, 2, 3]))
    assert drawn[:, :, 4:24, 4:24].mean() > drawn.mean() + 0.1
    assert drawn.mean((1, 2, 3)).argmin() == 1  # a one has the least ink
    outline = skeleton("mnist")
    assert outline.shape == (1, 28, 28)
    assert outline.classes == tuple("0123456789")
    assert outline.null_class == 10
    with pytest.raises(RequestError, match="revision"):
        skeleton("mnist", revision="main")


def test_the_uci_digits_are_split_once_and_lie_as_mnists_do():
    split = load_uci_split()
    assert len(split.train_images) == 900
    assert len(split.test_images) == 897
    assert split.train_labels.bincount().tolist() == [90] * 10
    images = torch.cat([split.train_images, split.test_images])
    assert images.shape[1:] == (1, 28, 28)
    assert images.min() == -1
    assert images.max() <= 1
    frame = images.clone()
    frame[:, :, 4:24, 4:24] = -1
    assert (frame == -1).all()
    assert len(images.flatten(1).unique(dim=0)) == len(load_uci_split().train_images) + 897  # none is in both parts
