"""guided-diffusion's checkpoints (ADM: Dhariwal & Nichol 2021, arXiv 2105.05233), converted at load into `UNet2DModel`.

A checkpoint is a bare state dict. Names and shapes give the network's structure (`Architecture`). The rest (`Settings`: image
size, attention heads and order, noise schedule) is known of the published checkpoints; for others it comes from a JSON file
of the same name beside them.

The two networks compute the same but for names and three things: the rows of a legacy checkpoint's qkv come head by head
(all of q, k, v of one head, then the next), a fixed number of heads is set on the network after it is made, and the time
embedding has the base width where the first level is narrower (512 pixels). The spacing "linspace" walks the levels of
guided-diffusion's own `timestep_respacing N`, "leading" those of its `ddimN`.
"""

from __future__ import annotations

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from handful.core.noise import VP
from handful.errors import RequestError, counted
from handful.models.door import what_tensors_say
from handful.models.options import OF_PIPELINES, ModelOptions, refuse_options, refuse_resolution
from handful.models.pipelines import on_meta
from handful.models.source import Source
from handful.models.unet2d import UNet2DDenoiser

State = Mapping[str, Tensor]
Count = Annotated[int, Field(ge=1)]

GROUPS = 32  # of every group norm

# Options that this family has no use for.
UNUSED = (*OF_PIPELINES, "trust_pickle")


@dataclass(frozen=True)
class Architecture:
    """What the names and shapes of a state dict give.

    Attributes:
        base: Channels of the time embedding's input; the levels' are multiples of it.
        channels: Of each level, from the image's resolution down.
        attention: Whether each level has attention.
        blocks: Residual blocks a level.
        labels: Number of classes; 0 where it takes none.
        in_channels, out_channels: Of the image; twice as many out where it learned the variance.
        scale_shift: The time scales the second norm as well as shifting it.
        resample: Levels change by a convolution, or by a residual block.
    """

    base: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    blocks: int
    labels: int = 0
    in_channels: int = 3
    out_channels: int = 6
    scale_shift: bool = True
    resample: Literal["conv", "resnet"] = "resnet"


class Settings(BaseModel):
    """What a state dict does not contain, in guided-diffusion's words; the keys of the JSON file beside a checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image_size: Count | None = None
    num_head_channels: Count | None = None
    num_heads: Count | None = None
    new_attention_order: bool | None = None
    schedule: Literal["linear", "cosine"] | None = None
    steps: Annotated[int, Field(ge=2)] | None = None
    classes: list[str] = []
    null_class: int | None = None


def _published(base: int, multiples: tuple[float, ...], blocks: int, deepest: range, labels: int) -> Architecture:
    channels = tuple(int(multiple * base) for multiple in multiples)
    return Architecture(base, channels, tuple(level in deepest for level in range(len(channels))), blocks, labels)


def _settings(
    size: int, *, num_heads: int | None = None, new: bool = False, schedule: Literal["linear", "cosine"] = "linear"
) -> Settings:
    return Settings(
        image_size=size,
        num_heads=num_heads,
        num_head_channels=None if num_heads else 64,
        new_attention_order=new,
        schedule=schedule,
        steps=1000,
    )


# The flags of guided-diffusion's README; its LSUN networks are built as its unconditional 256-pixel one, and the finetuned
# unconditional 512-pixel one that others made of it as the 512-pixel one. The last is P2-weighting's (Choi et al. 2022) and
# DPS's (Chung et al. 2023) of FFHQ and other small data sets.
PUBLISHED: dict[Architecture, Settings] = {
    _published(192, (1, 2, 3, 4), 3, range(1, 4), 1000): _settings(64, new=True, schedule="cosine"),
    _published(256, (1, 1, 2, 3, 4), 2, range(2, 5), 1000): _settings(128, num_heads=4),
    _published(256, (1, 1, 2, 2, 4, 4), 2, range(3, 6), 1000): _settings(256),
    _published(256, (1, 1, 2, 2, 4, 4), 2, range(3, 6), 0): _settings(256),
    _published(256, (0.5, 1, 1, 2, 2, 4, 4), 2, range(4, 7), 1000): _settings(512),
    _published(256, (0.5, 1, 1, 2, 2, 4, 4), 2, range(4, 7), 0): _settings(512),
    _published(128, (1, 1, 2, 2, 4, 4), 1, range(4, 5), 0): _settings(256),
}

# A module's name in ADM -> in UNet2DModel: those outside blocks, and those inside one.
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_INSIDE = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}


def skeleton(source: Source, options: ModelOptions) -> UNet2DDenoiser:
    """The denoiser without its weights, on the meta device: of the checkpoint, only names and shapes are read."""
    return _denoiser(source, options, "meta")


def load(source: Source, options: ModelOptions) -> UNet2DDenoiser:
    """Loads a checkpoint, by torch's weights-only loader."""
    return _denoiser(source, options, "cpu")


def _denoiser(source: Source, options: ModelOptions, device: str) -> UNet2DDenoiser:
    file = source.file
    if file is None:
        raise ValueError("source: a checkpoint of guided-diffusion is a single file")
    refuse_options(options, *UNUSED)
    state = state_of(file, device)
    told = _architecture(file, state)
    settings = _settings_of(file, told)
    heads = _heads(file, told, settings)
    network = _network(told, settings, heads)
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = _converted(state, told, settings, heads)
    wrong = [old for old, new, tensor in found if wanted.pop(new, None) != tensor.shape]
    if wrong or wanted:
        raise _refused(
            file,
            f"its tensors are not those of guided-diffusion's UNet ({len(wrong) + len(wanted)} differ, first "
            f"{(wrong or list(wanted))[0]})",
        )
    schedule = _levels(settings)
    denoiser = UNet2DDenoiser(
        network,
        "eps",
        schedule,
        classes=settings.classes if options.classes is None else options.classes,
        null_class=settings.null_class if options.null_class is None else options.null_class,
    )
    refuse_resolution(denoiser.shape[1:], options)
    if device != "meta":  # all is checked; only now the weights are read out of the mapped file
        dtype = options.dtype or torch.float32
        network.load_state_dict({new: tensor.to(dtype, copy=True) for _, new, tensor in found}, assign=True)
        network.requires_grad_(False)
    return denoiser


# --- the file ----------------------------------------------------------------------------------------------------------


def state_of(file: Path, device: str) -> State:
    """The tensors of a checkpoint by ADM's names; mapped, not read, where the file's format allows it."""
    try:
        # the format before torch 1.6 is no zip archive, and can't be mapped
        with torch.serialization.safe_globals([Namespace]):  # how a training was started: names and values alone
            held = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds for damaged files
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            problem = f"its pickle contains {asked[1]}, so reading it would run code"
            remedy = "If you trust it, load it in Python and save only its tensors: torch.save(network.state_dict(), FILE)."
            raise RequestError("model", str(file), problem, remedy) from error
        problem = f"it can't be read ({type(error).__name__}): it is damaged, or not a checkpoint of torch"
        remedy = "Copy the file again, and compare its size with the original's."
        raise RequestError("model", str(file), problem, remedy) from error
    for key in ("state_dict", "ema", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise _refused(file, "it holds no state dict")
    return {str(name).removeprefix("module."): tensor for name, tensor in held.items()}


def _architecture(file: Path, state: State) -> Architecture:
    if "conv_in.weight" in state:
        problem = "it is diffusers' own state dict, not one of guided-diffusion"
        raise RequestError("model", str(file), problem, "Give the directory that diffusers' save_pretrained wrote.")
    outputs = 1 + max((int(name.split(".")[1]) for name in state if re.match(r"output_blocks\.\d+\.", name)), default=-1)
    if "input_blocks.0.0.weight" in state and not outputs:
        remedy = "Give the diffusion checkpoint that goes with it, such as 64x64_diffusion.pt."
        raise RequestError("model", str(file), "it is a classifier (the first half of a UNet), not a diffusion model", remedy)
    needed = (
        "input_blocks.0.0.weight",
        "time_embed.0.weight",
        "middle_block.1.qkv.weight",
        "out.2.weight",
        "input_blocks.1.0.emb_layers.1.weight",
    )
    if needed[0] not in state and (told := what_tensors_say(state)) is not None:
        raise RequestError("model", str(file), f"it is {told[0]}", told[1])
    for name in needed:
        if name not in state or state[name].ndim < 2:
            raise _refused(file, f"it has no {name}")
    if not all(tensor.ndim for tensor in state.values()):
        raise _refused(file, "it holds single numbers")
    in_channels, out_channels = state["input_blocks.0.0.weight"].shape[1], state["out.2.weight"].shape[0]
    if in_channels not in (1, 3):
        problem = f"its network takes {counted(in_channels, 'channel')}, not 1 or 3" + (
            ": it is an upsampler, which needs a small image as input" if in_channels == 6 else ""
        )
        raise RequestError("model", str(file), problem, "Give a checkpoint that generates images from noise alone.")
    # each level but the first ends, on the way up, in a layer that doubles the resolution
    up = [name for name in state if re.fullmatch(r"output_blocks\.\d+\.[12]\.(conv\.weight|in_layers\.0\.weight)", name)]
    levels = len(up) + 1
    blocks = outputs // levels - 1
    if blocks < 1 or outputs % levels:
        raise _refused(file, f"its {outputs} output blocks don't make {counted(levels, 'level')}")
    first = [1 + level * (blocks + 1) for level in range(levels)]  # the first block of each level on the way down
    for name in (f"input_blocks.{i}.0.in_layers.2.weight" for i in first):
        if name not in state:
            raise _refused(file, f"it has no {name}")
    channels = tuple(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first)
    if any(c % GROUPS for c in channels):
        raise _refused(file, f"its levels of {channels} channels have no norms in {GROUPS} groups")
    return Architecture(
        base=state["time_embed.0.weight"].shape[1],
        channels=channels,
        attention=tuple(f"input_blocks.{i}.1.qkv.weight" in state for i in first),
        blocks=blocks,
        labels=len(state["label_emb.weight"]) if "label_emb.weight" in state else 0,
        in_channels=in_channels,
        out_channels=out_channels,
        scale_shift=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * channels[0],
        resample="conv" if up and up[0].endswith("conv.weight") else "resnet",
    )


def _settings_of(file: Path, told: Architecture) -> Settings:
    """What is known of the published checkpoint of this architecture, and over it what the JSON file beside it says."""
    beside = file.with_suffix(".json")
    known, said = PUBLISHED.get(told, Settings()), Settings()
    if beside.is_file():
        try:
            said = Settings.model_validate_json(beside.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            remedy = f"Its keys are {', '.join(Settings.model_fields)}."
            raise RequestError("model", str(beside), f"{key}: {first['msg']}", remedy) from error
        if said.num_heads and said.num_head_channels:
            remedy = "Keep one of them: in guided-diffusion num_head_channels, unless it is -1, overrules num_heads."
            raise RequestError("model", str(beside), "it gives both num_heads and num_head_channels", remedy)
        if said.num_heads or said.num_head_channels:
            known = known.model_copy(update={"num_heads": None, "num_head_channels": None})
    settings = known.model_copy(update=said.model_dump(exclude_unset=True))
    missing = [name for name in ("image_size", "new_attention_order", "schedule", "steps") if getattr(settings, name) is None]
    if settings.num_heads is None and settings.num_head_channels is None:
        missing.insert(0, "num_head_channels (or num_heads)")
    if missing:
        example = _settings(256).model_dump(exclude_none=True, exclude_defaults=True)
        raise RequestError(
            "model",
            str(file),
            f"it matches no published checkpoint (base {told.base}, levels of {told.channels} channels, "
            f"{counted(told.blocks, 'block')} each, {counted(told.labels, 'class')}), and it does not say {', '.join(missing)}",
            f"Write them into {beside}, as it was trained, for instance: {json.dumps(example)}; the schedule is linear or "
            "cosine, and num_heads goes in num_head_channels' stead where their number is fixed.",
        )
    halvings = len(told.channels) - 1
    if settings.image_size and settings.image_size % 2**halvings:
        problem = (
            f"the network halves the size {counted(halvings, 'time')}, which image_size {settings.image_size} does not allow"
        )
        raise RequestError("model", str(beside), problem, f"Give a multiple of {2**halvings}.")
    return settings


def _heads(file: Path, told: Architecture, settings: Settings) -> dict[int, int]:
    """Attention heads by the number of channels they share."""
    at = [*(c for c, attends in zip(told.channels, told.attention, strict=True) if attends), told.channels[-1]]
    for channels in at:
        if channels % (settings.num_heads or settings.num_head_channels or 1):
            name = "num_heads" if settings.num_heads else "num_head_channels"
            problem = f"{name} {getattr(settings, name)} does not divide the {counted(channels, 'channel')} of an attention"
            raise RequestError("model", str(file.with_suffix(".json")), problem, "Give what it was trained with.")
    return {channels: settings.num_heads or channels // (settings.num_head_channels or 1) for channels in at}


def _levels(settings: Settings) -> VP:
    assert settings.steps is not None
    if settings.schedule == "cosine":
        return VP.cosine(settings.steps)
    # the same noise in fewer or more steps: guided-diffusion scales Ho et al.'s betas by 1000 / steps
    return VP.linear(settings.steps, 0.1 / settings.steps, 20 / settings.steps)


def _refused(file: Path, problem: str) -> RequestError:
    remedy = "Give its state dict as it was published, such as 256x256_diffusion.pt."
    return RequestError("model", str(file), f"{problem}, so it is no diffusion checkpoint of guided-diffusion", remedy)


# --- the network -------------------------------------------------------------------------------------------------------


def _network(told: Architecture, settings: Settings, heads: dict[int, int]) -> nn.Module:
    """The same network as a `UNet2DModel` on the meta device."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down, up = plain[told.resample]
    network: Any = on_meta(
        "UNet2DModel",
        {
            "sample_size": settings.image_size,
            "in_channels": told.in_channels,
            "out_channels": told.out_channels,
            "time_embedding_dim": 4 * told.base,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "block_out_channels": told.channels,
            "layers_per_block": told.blocks,
            "down_block_types": tuple("AttnDownBlock2D" if attends else down for attends in told.attention),
            "up_block_types": tuple("AttnUpBlock2D" if attends else up for attends in reversed(told.attention)),
            "downsample_type": told.resample,
            "upsample_type": told.resample,
            "downsample_padding": 1,
            "resnet_time_scale_shift": "scale_shift" if told.scale_shift else "default",
            "attention_head_dim": settings.num_head_channels,
            "norm_num_groups": GROUPS,
            "attn_norm_num_groups": GROUPS,
            "norm_eps": 1e-5,
            "num_class_embeds": told.labels or None,
        },
    )
    if told.channels[0] != told.base:  # UNet2DModel takes the embedding's width from its first level
        with torch.device("meta"):
            network.time_proj = Timesteps(told.base, flip_sin_to_cos=True, downscale_freq_shift=0)
            network.time_embedding = TimestepEmbedding(told.base, 4 * told.base)
    if settings.num_heads:  # UNet2DModel fixes the channels of a head, not their number
        for module in network.modules():
            if isinstance(module, Attention):
                module.heads = module.sliceable_head_dim = heads[module.inner_dim]
                module.scale = (module.inner_dim / module.heads) ** -0.5
    return network


def _places(told: Architecture) -> Iterator[tuple[str, str]]:
    """The blocks: their names in ADM, and in UNet2DModel."""
    last = len(told.channels) - 1
    for level, attends in enumerate(told.attention):
        first = 1 + level * (told.blocks + 1)
        for i in range(told.blocks):
            yield f"input_blocks.{first + i}.0", f"down_blocks.{level}.resnets.{i}"
            if attends:
                yield f"input_blocks.{first + i}.1", f"down_blocks.{level}.attentions.{i}"
        if level < last:
            yield f"input_blocks.{first + told.blocks}.0", f"down_blocks.{level}.downsamplers.0"
    yield from zip(
        ("middle_block.0", "middle_block.1", "middle_block.2"),
        ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        strict=True,
    )
    for level, attends in enumerate(reversed(told.attention)):
        for i in range(told.blocks + 1):
            block = f"output_blocks.{level * (told.blocks + 1) + i}"
            yield f"{block}.0", f"up_blocks.{level}.resnets.{i}"
            if attends:
                yield f"{block}.1", f"up_blocks.{level}.attentions.{i}"
        if level < last:
            yield f"{block}.{1 + attends}", f"up_blocks.{level}.upsamplers.0"


def _converted(state: State, told: Architecture, settings: Settings, heads: dict[int, int]) -> list[tuple[str, str, Tensor]]:
    """The tensors by ADM's name, with UNet2DModel's and in its shape; a name that it does not know stays."""
    places, converted = dict(_places(told)), []
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in _OUTSIDE:
            converted.append((name, f"{_OUTSIDE[module]}.{kind}", tensor))
            continue
        block = next((place for place in places if module.startswith(place + ".")), None)
        inside = "" if block is None else module.removeprefix(block + ".")
        if block is None or (inside != "qkv" and inside not in _INSIDE):
            converted.append((name, name, tensor))
        elif inside == "qkv":
            rows = tensor.flatten(1) if tensor.ndim > 1 else tensor  # (3 c, c, 1) or (3 c,)
            channels = len(rows) // 3
            if not settings.new_attention_order and len(rows) == 3 * channels and channels in heads:
                rows = rows.unflatten(0, (heads[channels], 3, -1)).transpose(0, 1).flatten(0, 2)
            converted += [
                (name, f"{places[block]}.to_{to}.{kind}", part)
                for to, part in zip("qkv", rows.split(max(1, channels)), strict=False)
            ]
        else:
            one_wide = inside == "proj_out" and tensor.ndim > 1
            converted.append((name, f"{places[block]}.{_INSIDE[inside]}.{kind}", tensor.flatten(1) if one_wide else tensor))
    return converted
