"""Where and how a loaded model runs: device, precision, and what diffusers offers to save memory or time, passed through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from handful.core.denoiser import Denoiser, NetworkDenoiser
from handful.core.memory import is_out_of_memory
from handful.core.noise import Levels
from handful.core.samplers import start
from handful.errors import HandfulError, RequestError, first_line


@dataclass(frozen=True)
class Placement:
    """How to run a model; every field but device and dtype is a call of diffusers' or torch's own.

    Attributes:
        attention: `set_attention_backend` of the denoising network; None leaves it.
        compile: `torch.nn.Module.compile` of the denoising network.
        offload: `enable_model_cpu_offload` or `enable_sequential_cpu_offload` of the pipeline.
        vae_slicing, vae_tiling: `enable_slicing` and `enable_tiling` of the autoencoder.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    attention: str | None = None
    compile: bool = False
    offload: Literal["none", "model", "sequential"] = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False


def check_placement(denoiser: NetworkDenoiser, asked: Placement) -> None:
    """Refuses what this family or machine can't do; the denoiser may be a skeleton."""
    for name in ("vae_slicing", "vae_tiling"):
        if getattr(asked, name) and not hasattr(denoiser, "vae"):
            raise RequestError(f"model.{name}", True, "this model has no autoencoder", "Leave it out.")
    if asked.offload != "none":
        if not getattr(denoiser, "can_offload", False):
            raise RequestError("model.offload", asked.offload, "this model is not a diffusers pipeline", "Leave it out.")
        if asked.device.type == "cpu":
            raise RequestError("model.offload", asked.offload, "the model runs on the CPU already", "Leave it out.")
    if asked.attention is not None:
        _check_attention(denoiser, asked.attention)


@torch.no_grad()
def try_once(denoiser: Denoiser, levels: Levels, told: Sequence[Any]) -> None:
    """Asks a model for one image at the first level of a path, so that what it can't do is known before the long work.

    Args:
        told: The label or the prompt of that image, alone in a list.

    Raises:
        RequestError: If it raises anything, or its answer is not one image.
    """
    device = getattr(denoiser, "device", None) or next(denoiser.parameters(), torch.empty(0)).device
    noise = torch.randn(1, *denoiser.shape, generator=torch.Generator().manual_seed(0)).to(device)
    kind = type(getattr(denoiser, "network", denoiser)).__name__
    try:
        answer = denoiser(start(noise, levels), levels[0], denoiser.condition(told))
        if denoiser.code_sha256 is not None:  # a user's own code may decode in ways of its own
            shape = tuple(denoiser.decode(answer).shape)
            if shape != (1, *denoiser.image_shape):
                raise ValueError(f"it decodes to {shape}, but its image_shape is {denoiser.image_shape}")
    except HandfulError:
        raise
    except Exception as error:  # a network may raise anything
        remedy = "Build its denoiser in FILE.py:FUNCTION, which may return any handful.core.denoiser.Denoiser."
        if is_out_of_memory(error):
            remedy = "Use model.dtype bfloat16, or model.offload."
        problem = f"it fails on one image of shape {denoiser.shape} ({type(error).__name__}: {first_line(error)})"
        raise RequestError("model", kind, problem, remedy) from error
    if answer.shape != noise.shape:
        problem = f"for one image of shape {denoiser.shape} it returns {tuple(answer.shape)}"
        raise RequestError("model", kind, problem, "Correct its `shape`, or what it predicts.")


def _check_attention(denoiser: NetworkDenoiser, name: str) -> None:
    """Refuses a name that diffusers does not know, and a network whose layers it passes over in silence."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise RequestError("model.attention", name, "this network has no choice of attention back ends", "Leave it out.")
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise RequestError("model.attention", name, "diffusers has no such back end", f"Choose one of: {', '.join(known)}.")


def place(denoiser: NetworkDenoiser, asked: Placement) -> None:
    """Moves a loaded model to where it shall run; to compile it is left to whoever has tried it."""
    pipeline: Any = getattr(denoiser, "pipeline", None)
    network: Any = getattr(denoiser, "network", denoiser)  # a denoiser of the user's own may be without
    if asked.offload == "none":
        denoiser.place(asked.device, asked.dtype)
    if asked.attention is not None:
        try:
            network.set_attention_backend(asked.attention)
        except Exception as error:  # an unknown name, a missing package, another device: each back end has its own
            problem = f"diffusers refuses it ({first_line(error)})"
            remedy = "Name a back end that works on this machine, or leave it out."
            raise RequestError("model.attention", asked.attention, problem, remedy) from error
    vae: Any = getattr(denoiser, "vae", None)
    if asked.vae_slicing:
        vae.enable_slicing()
    if asked.vae_tiling:
        vae.enable_tiling()
    if asked.offload != "none":
        denoiser.offloaded_to = asked.device
        if (preview_vae := getattr(denoiser, "preview_vae", None)) is not None:  # small, and no part of the pipeline
            preview_vae.to(asked.device)
        getattr(pipeline, f"enable_{asked.offload}_cpu_offload")(device=asked.device)
