"""Tiny ADM checkpoints: random state dicts with guided-diffusion's names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A tiny ADM: guided-diffusion's flags by its words; sizes are of groups of 32 channels."""

    new_order: bool = False
    scale_shift: bool = True
    resblock_updown: bool = True
    classes: int = 0
    heads: int | None = None  # else head channels of 8
    learned: bool = True
    base: int = 32
    multiples: tuple[float, ...] = (1, 2, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1, 2)  # levels
    colours: int = 3

    def heads_of(self, channels: int) -> int:
        return self.heads or channels // 8

    def settings(self) -> dict[str, Any]:
        heads = {"num_heads": self.heads} if self.heads else {"num_head_channels": 8}
        return {"image_size": 8, **heads, "new_attention_order": self.new_order, "schedule": "linear", "steps": 1000}


def layout(v: Variant) -> Iterator[tuple[str, str, int, int]]:
    """The layers in the order they are run: (name, kind, channels in, channels out)."""
    width = [int(m * v.base) for m in v.multiples]
    resample = ("down", "up") if v.resblock_updown else ("down conv", "up conv")
    now, skips = width[0], [width[0]]
    block = 0
    for level, channels in enumerate(width):
        for _ in range(v.blocks):
            block += 1
            yield f"input_blocks.{block}.0", "res", now, channels
            now = channels
            if level in v.attention:
                yield f"input_blocks.{block}.1", "attention", now, now
            yield "", "push", now, now
            skips.append(now)
        if level < len(width) - 1:
            block += 1
            yield f"input_blocks.{block}.0", resample[0], now, now
            yield "", "push", now, now
            skips.append(now)
    yield "middle_block.0", "res", now, now
    yield "middle_block.1", "attention", now, now
    yield "middle_block.2", "res", now, now
    block = -1
    for level in reversed(range(len(width))):
        for i in range(v.blocks + 1):
            block += 1
            yield f"output_blocks.{block}.0", "pop res", now + skips.pop(), width[level]
            now, layer = width[level], 1
            if level in v.attention:
                yield f"output_blocks.{block}.1", "attention", now, now
                layer = 2
            if level and i == v.blocks:
                yield f"output_blocks.{block}.{layer}", resample[1], now, now


def checkpoint(v: Variant, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Random weights in a state dict of ADM's names and shapes."""
    draw = torch.Generator().manual_seed(seed)
    state: State = {}

    def add(name: str, out: int, *rest: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(out, *rest, generator=draw, dtype=torch.float64) / math.prod(rest) ** 0.5
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(out, generator=draw, dtype=torch.float64)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(channels, generator=draw, dtype=torch.float64)
        state[f"{name}.bias"] = 0.3 * torch.randn(channels, generator=draw, dtype=torch.float64)

    embed = 4 * v.base
    add("time_embed.0", embed, v.base)
    add("time_embed.2", embed, embed)
    if v.classes:
        add("label_emb", v.classes, embed, bias=False)
        state["label_emb.weight"] *= embed**0.5
    first = int(v.multiples[0] * v.base)
    add("input_blocks.0.0", first, v.colours, 3, 3)
    for name, kind, before, after in layout(v):
        if kind == "attention":
            norm(f"{name}.norm", after)
            add(f"{name}.qkv", 3 * after, after, 1)
            state[f"{name}.qkv.weight"] *= 1.5  # so that softmax has something to choose
            add(f"{name}.proj_out", after, after, 1)
        elif kind in ("down conv", "up conv"):
            add(f"{name}.{'op' if kind == 'down conv' else 'conv'}", after, before, 3, 3)
        elif kind != "push":
            norm(f"{name}.in_layers.0", before)
            add(f"{name}.in_layers.2", after, before, 3, 3)
            add(f"{name}.emb_layers.1", after * (1 + v.scale_shift), embed)
            norm(f"{name}.out_layers.0", after)
            add(f"{name}.out_layers.3", after, after, 3, 3)
            if before != after:
                add(f"{name}.skip_connection", after, before, 1, 1)
    norm("out.0", first)
    add("out.2", v.colours * (1 + v.learned), first, 3, 3)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def saved(folder: Path, v: Variant, state: Any = None, settings: Any = None, name: str = "tiny.pt", **words: Any) -> Path:
    file = folder / name
    torch.save(checkpoint(v) if state is None else state, file, **words)
    file.with_suffix(".json").write_text(json.dumps(v.settings() if settings is None else settings))
    return file
