"""A `UNet2DModel` of the packaged models, in torch alone: importing diffusers' own takes as long as all the rest together.

The same layers, names and operations in the same order as diffusers' class, of what the packaged configs ask for; a test
holds its answers to diffusers', bit by bit. The network is that of Ho et al. 2020 (arXiv 2006.11239), appendix B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What diffusers' class can do and this one can't: these fields have these values.
FIXED = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}


class Config(dict[str, Any]):
    """A config as diffusers has it: its keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def fits(config: dict[str, Any]) -> bool:
    """Whether a config is of a network that `PlainUNet` is."""
    blocks = {*config.get("down_block_types", ("",)), *config.get("up_block_types", ("",))}
    return blocks <= {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"} and all(
        key in config and config[key] == value for key, value in FIXED.items()
    )


class _Resnet(nn.Module):
    def __init__(self, inside: int, outside: int, time: int, config: Config) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1, self.norm2 = nn.GroupNorm(groups, inside, eps), nn.GroupNorm(groups, outside, eps)
        self.conv1, self.conv2 = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outside)
        self.conv_shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        # diffusers divides by its output_scale_factor, which is 1
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class _Attention(nn.Module):
    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.heads = channels // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.group_norm(x.view(n, c, h * w).transpose(1, 2).transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            each(tokens).view(n, -1, self.heads, c // self.heads).transpose(1, 2) for each in (self.to_q, self.to_k, self.to_v)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, c)
        return self.to_out[0](seen).transpose(-1, -2).reshape(n, c, h, w) + x


class _Resample(nn.Module):
    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:  # in memory as diffusers has it, or the last bits of large batches would differ
            x = F.interpolate(x.contiguous() if len(x) >= 64 else x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class _Block(nn.Module):
    """Resnets, attention behind each if asked for, then a change of the resolution if asked for."""

    def __init__(self, widths: list[tuple[int, int]], config: Config, time: int, *, attends: bool, resample: str = "") -> None:
        super().__init__()
        outside = widths[-1][1]
        self.resnets = nn.ModuleList([_Resnet(inside, out, time, config) for inside, out in widths])
        if attends:
            self.attentions = nn.ModuleList([_Attention(out, config) for _, out in widths])
        if resample:
            setattr(self, f"{resample}samplers", nn.ModuleList([_Resample(outside, up=resample == "up")]))

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        attentions = getattr(self, "attentions", [nn.Identity() for _ in self.resnets])
        return list(zip(self.resnets, attentions, strict=True))


class _Middle(nn.Module):
    def __init__(self, channels: int, config: Config, time: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([_Resnet(channels, channels, time, config) for _ in range(2)])
        self.attentions = nn.ModuleList([_Attention(channels, config)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time)), time)


class _Time(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, waves: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves)))


class PlainUNet(nn.Module):
    """The network of a config that `fits`; called as diffusers' `UNet2DModel`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config = Config(config)
        widths, layers = config.block_out_channels, config.layers_per_block
        first, time = widths[0], 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = _Time(first, time)
        classes = config.num_class_embeds
        # Not drawn at random: on the meta device that alone imports torch._dynamo, a second.
        self.class_embedding = nn.Embedding.from_pretrained(torch.zeros(classes, time), freeze=False) if classes else None
        self.down_blocks = nn.ModuleList()
        for place, (kind, out) in enumerate(zip(config.down_block_types, widths, strict=True)):
            steps = [(widths[max(0, place - 1)], out), *[(out, out)] * (layers - 1)]
            resample = "down" if place < len(widths) - 1 else ""
            self.down_blocks.append(_Block(steps, config, time, attends="Attn" in kind, resample=resample))
        self.mid_block = _Middle(widths[-1], config, time)
        self.up_blocks = nn.ModuleList()
        back = widths[::-1]
        for place, (kind, out) in enumerate(zip(config.up_block_types, back, strict=True)):
            below, skip = back[max(0, place - 1)], back[min(place + 1, len(back) - 1)]
            steps = [((below if i == 0 else out) + (skip if i == layers else out), out) for i in range(layers + 1)]
            resample = "up" if place < len(back) - 1 else ""
            self.up_blocks.append(_Block(steps, config, time, attends="Attn" in kind, resample=resample))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Noisy images (n, c, h, w), times (n,) and labels (n,) -> what is predicted, alone in a tuple."""
        time = self.time_embedding(waves(timestep, self.conv_in.out_channels).to(self.conv_in.weight.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels should be provided when doing class conditioning")
            time = time + self.class_embedding(class_labels)
        x = self.conv_in(sample)
        kept = [x]
        for block in self.down_blocks:
            assert isinstance(block, _Block)
            for resnet, attention in block.layers():
                x = attention(resnet(x, time))
                kept.append(x)
            for down in getattr(block, "downsamplers", ()):
                x = down(x)
                kept.append(x)
        x = self.mid_block(x, time)
        for block in self.up_blocks:
            assert isinstance(block, _Block)
            for resnet, attention in block.layers():
                x = attention(resnet(torch.cat([x, kept.pop()], dim=1), time))
            for up in getattr(block, "upsamplers", ()):
                x = up(x)
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)


def waves(time: Tensor, width: int) -> Tensor:
    """Times (n,) -> cosines and sines (n, width), float32 (Vaswani et al. 2017)."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / half
    angles = time[:, None].float() * torch.exp(exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
