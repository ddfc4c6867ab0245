"""DiT's own checkpoints: our network's answers against the original's formulas in plain torch, on its own names."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.pipelines_dit import tiny_dit
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu, softmax

from handful.core.samplers import ddim, start
from handful.errors import RequestError
from handful.models import load, skeleton

WIDTH, HEADS, BLOCKS, PATCH, SIDE, CLASSES = 32, 4, 2, 2, 8, 10
State = dict[str, Tensor]


def state() -> State:
    """Random weights under the original's names; positions as it has them, sines and cosines of row and column."""
    draw = torch.Generator().manual_seed(0)
    tokens = (SIDE // PATCH) ** 2
    shapes = {
        "x_embedder.proj.weight": (WIDTH, 4, PATCH, PATCH),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.linear.weight": (PATCH**2 * 8, WIDTH),
    }
    for block in range(BLOCKS):
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc1.weight": (4 * WIDTH, WIDTH),
            f"blocks.{block}.mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            f"blocks.{block}.adaLN_modulation.1.weight": (6 * WIDTH, WIDTH),
        }
    made = {name: torch.randn(shape, generator=draw) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    made |= {
        name.replace("weight", "bias"): torch.randn(len(weight), generator=draw) / 4
        for name, weight in made.items()
        if not name.startswith("y_")
    }
    made["pos_embed"] = torch.randn(1, tokens, WIDTH, generator=draw)  # not those that diffusers would make
    return made


def original(held: State, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """The network of `facebookresearch/DiT`, written down anew: (n, 4, SIDE, SIDE) -> (n, 8, SIDE, SIDE)."""

    def affine(name: str, at: Tensor) -> Tensor:
        return linear(at, held[f"{name}.weight"], held[f"{name}.bias"])

    def modulated(at: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(at, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    n, h = len(x), SIDE // PATCH
    patches = x.reshape(n, 4, h, PATCH, h, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(n, h * h, -1)
    tokens = linear(patches, held["x_embedder.proj.weight"].flatten(1), held["x_embedder.proj.bias"]) + held["pos_embed"]
    angles = time[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    embedded = affine("t_embedder.mlp.2", silu(affine("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = silu(embedded + held["y_embedder.embedding_table.weight"][labels])
    for block in range(BLOCKS):
        at = f"blocks.{block}"
        shift, scale, gate, shift2, scale2, gate2 = affine(f"{at}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = affine(f"{at}.attn.qkv", modulated(tokens, shift, scale))
        q, k, v = qkv.reshape(n, h * h, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), -1) @ v
        tokens = tokens + gate[:, None] * affine(f"{at}.attn.proj", mixed.transpose(1, 2).reshape(n, h * h, WIDTH))
        inner = gelu(affine(f"{at}.mlp.fc1", modulated(tokens, shift2, scale2)), approximate="tanh")
        tokens = tokens + gate2[:, None] * affine(f"{at}.mlp.fc2", inner)
    shift, scale = affine("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = affine("final_layer.linear", modulated(tokens, shift, scale)).reshape(n, h, h, PATCH, PATCH, 8)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(n, 8, SIDE, SIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dit")
    tiny_dit(root / "pipeline")
    torch.save(state(), root / "DiT.pt")
    # as training writes it: the averaged weights are taken
    other = {name: -tensor for name, tensor in state().items()}
    torch.save({"model": other, "ema": state(), "opt": {"state": {}}, "args": Namespace(model="DiT")}, root / "trained.pt")
    for name in ("DiT", "trained"):
        (root / f"{name}.json").write_text(json.dumps({"num_heads": HEADS}))
    return root


@pytest.mark.parametrize("name", ["DiT.pt", "trained.pt"])
def test_its_answers_are_those_of_the_originals_formulas(name: str, folder: Path):
    denoiser = load(folder / name, vae=folder / "pipeline")
    assert (denoiser.shape, denoiser.null_class, denoiser.image_shape) == ((4, SIDE, SIDE), CLASSES, (3, 16, 16))
    x, times, labels = torch.randn(3, 4, SIDE, SIDE), torch.tensor([999, 500, 3]), torch.tensor([0, 7, CLASSES])
    with torch.no_grad():
        found = denoiser.call(x, times, denoiser.condition(labels))
        levels = denoiser.levels.spacing(3)
        images = denoiser.decode(ddim(denoiser, start(x, levels), levels, denoiser.condition(labels)))
    wanted = original(state(), x, times, labels)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert images.shape == (3, 3, 16, 16)
    assert "SiT" in denoiser.notes[0]


def test_its_outline_reads_no_weights(folder: Path):
    outline = skeleton(folder / "DiT.pt", vae=folder / "pipeline" / "vae")
    assert all(each.is_meta for each in outline.network.parameters())
    assert outline.shape == (4, SIDE, SIDE)


def test_what_it_lacks_is_refused_with_the_next_step(folder: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"holds no autoencoder.*--vae"):
        load(folder / "DiT.pt")
    bare = tmp_path / "bare.pt"
    torch.save(state(), bare)
    with pytest.raises(RequestError, match=r"number of heads.*num_heads"):
        load(bare, vae=folder / "pipeline")
    (tmp_path / "bare.json").write_text(json.dumps({"num_heads": HEADS}))
    torch.save({**state(), "blocks.0.norm.weight": torch.zeros(3)}, bare)
    with pytest.raises(RequestError, match=r"blocks\.0\.norm\.weight, which a DiT does not have"):
        load(bare, vae=folder / "pipeline")
    torch.save({name: tensor for name, tensor in state().items() if "blocks.1.mlp.fc2.bias" not in name}, bare)
    with pytest.raises(RequestError, match="1 differ"):
        load(bare, vae=folder / "pipeline")
