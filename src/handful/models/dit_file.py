"""DiT's own checkpoints (`.pt` of facebookresearch/DiT), converted into diffusers' `DiTTransformer2DModel`.

A file holds the transformer alone: the autoencoder is named beside it (`--vae`), and the levels are those of its training,
1000 linear betas. diffusers' class has other frequencies of the time and another epsilon than the original (Peebles & Xie's
`models.py`: 10000^(-i/128), not 10000^(-i/127)); here they are set as the original has them, so that the network's answers
are the original's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from handful.errors import RequestError, first_line
from handful.models.adm import state_of
from handful.models.options import ModelOptions
from handful.models.pipelines import component_on_meta, load_component, on_meta
from handful.models.source import Source

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of the published S, B, L and XL: the file does not say
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCHEDULER |= {"num_train_timesteps": 1000, "clip_sample": False}
TIMES = "the file is taken for a DiT. SiT files have the same tensor names, but predict a flow and would give only noise here"
OWN = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight", "pos_embed")
VAE = "Name it: --vae stabilityai/sd-vae-ft-ema, or its directory."
# Names of the original, as patterns, and of diffusers'.
RENAMED = {
    r"x_embedder\.": "pos_embed.",
    r"pos_embed": "pos_embed.pos_embed",
    r"blocks\.(\d+)\.attn\.proj\.": r"transformer_blocks.\1.attn1.to_out.0.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"transformer_blocks.\1.ff.net.0.proj.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"transformer_blocks.\1.ff.net.2.",
    r"blocks\.(\d+)\.adaLN_modulation\.1\.": r"transformer_blocks.\1.norm1.linear.",
    r"final_layer\.adaLN_modulation\.1\.": "proj_out_1.",
    r"final_layer\.linear\.": "proj_out_2.",
}
# What every block of diffusers' has a copy of.
SHARED = {
    "t_embedder.mlp.0.": "timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "timestep_embedder.linear_2.",
    "y_embedder.": "class_embedder.",
}


def is_dit(source: Source) -> bool:
    """Whether a file holds DiT's tensors; only their names are read."""
    assert source.file is not None
    try:
        return set(OWN) <= set(state_of(source.file, "meta"))
    except RequestError:  # its own family says what is wrong
        return False


def parts(source: Source, options: ModelOptions, *, meta: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """The transformer, the autoencoder and the scheduler's config, on the meta device or with weights."""
    assert source.file is not None
    if "vae" not in source.parts:
        raise RequestError("model", source.name, "it is DiT's own checkpoint, which holds no autoencoder", VAE)
    state = state_of(source.file, "meta" if meta else "cpu")
    config = _config(source, state)
    network = on_meta("DiTTransformer2DModel", config)
    timed: list[Any] = [module for module in network.modules() if hasattr(module, "downscale_freq_shift")]
    for module in timed:
        module.downscale_freq_shift = 0
    held = _converted(source, state, config["num_layers"])
    positions = held.pop("pos_embed.pos_embed")
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = sorted(name for name in {*wanted, *held} if name not in held or wanted.get(name) != tuple(held[name].shape))
    if wrong:
        problem = f"its tensors are not those of a DiT ({len(wrong)} differ, first {wrong[0]})"
        raise RequestError("model", source.name, problem, "Give a checkpoint of facebookresearch/DiT.")
    if not meta:
        dtype = options.dtype or torch.float32
        network.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in held.items()}, assign=True)
        embedding: Any = network.get_submodule("pos_embed")
        embedding.pos_embed = positions.to(dtype, copy=True)
    network.eval().requires_grad_(False)
    there = source.parts["vae"]
    inside = "" if there.read_json("config.json") else "vae"
    kind = str((there.read_json("config.json") or source.config("vae")).get("_class_name", "AutoencoderKL"))
    vae = component_on_meta(source, "vae", kind) if meta else load_component(there, options, inside, kind)
    return network, vae, source.scheduler() if "scheduler" in source.parts else dict(SCHEDULER)


def _config(source: Source, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of diffusers' class; what the tensors don't show comes from the published widths, or the JSON file beside it."""
    assert source.file is not None
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    beside = source.file.with_suffix(".json")
    heads = HEADS.get(width)
    if beside.is_file():
        try:
            heads = json.loads(beside.read_text())["num_heads"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            problem = f"num_heads can't be read ({type(error).__name__}: {first_line(error)})"
            raise RequestError("model", str(beside), problem, 'Write {"num_heads": 16}.') from error
    if not isinstance(heads, int) or heads < 1 or width % heads:
        problem = f"no published DiT has the width {width}, and the number of heads can't be read from its tensors"
        remedy = f'Write it into {beside}: {{"num_heads": 16}}; it divides {width}.'
        raise RequestError("model", source.name, problem, remedy)
    side = math.isqrt(state["pos_embed"].shape[1])
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + max(blocks, default=-1),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": len(state["y_embedder.embedding_table.weight"]) - 1,
        "norm_eps": 1e-6,
    }


def _converted(source: Source, state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """The tensors by diffusers' names; of queries, keys and values, which the original has in one, a third each."""
    held: dict[str, Tensor] = {}
    for name, tensor in state.items():
        shared = next((old for old in SHARED if name.startswith(old)), None)
        fused = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if shared is not None:
            for block in range(blocks):
                held[f"transformer_blocks.{block}.norm1.emb.{SHARED[shared]}{name.removeprefix(shared)}"] = tensor
        elif fused:
            for key, part in zip("qkv", tensor.chunk(3), strict=False):
                held[f"transformer_blocks.{fused[1]}.attn1.to_{key}.{fused[2]}"] = part
        else:
            old = next((old for old in RENAMED if re.match(old, name)), None)
            if old is None:
                problem = f"it holds {name}, which a DiT does not have"
                raise RequestError("model", source.name, problem, "Give a checkpoint of facebookresearch/DiT.")
            held[re.sub(f"^{old}", RENAMED[old], name)] = tensor
    return held
