"""Where and how a loaded model runs: device, precision, and what diffusers offers to save memory or time, passed through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from handful.core.denoiser import NetworkDenoiser
from handful.errors import RequestError, first_line


@dataclass(frozen=True)
class Placement:
    """How to run a model; every field but device and dtype is a call of diffusers' or torch's own.

    Attributes:
        device, dtype: Of the networks.
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
    """Refuses what this family or machine can't do; the denoiser may be a skeleton.

    Raises:
        RequestError: Naming the field.
    """
    for name in ("vae_slicing", "vae_tiling"):
        if getattr(asked, name) and not hasattr(denoiser, "vae"):
            raise RequestError(f"model.{name}", True, "this model has no autoencoder", "Leave it out.")
    if asked.offload != "none":
        if not hasattr(denoiser, "vae"):
            raise RequestError("model.offload", asked.offload, "this model is no pipeline", "Leave it out.")
        if asked.device.type == "cpu":
            raise RequestError("model.offload", asked.offload, "the model runs on the CPU anyway", "Leave it out.")
    if asked.attention is not None:
        _check_attention(denoiser, asked.attention)


def _check_attention(denoiser: NetworkDenoiser, name: str) -> None:
    """Refuses a name that diffusers does not know, and a network whose layers it passes over in silence."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise RequestError("model.attention", name, "this network's attention has no choice of back ends", "Leave it out.")
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        raise RequestError("model.attention", name, "diffusers has no such back end", f"Choose one of: {', '.join(known)}.")


def place(denoiser: NetworkDenoiser, asked: Placement) -> None:
    """Moves a loaded model to where it shall run.

    Raises:
        RequestError: If diffusers or torch refuse.
    """
    pipeline: Any = getattr(denoiser, "pipeline", None)
    network: Any = getattr(denoiser, "network", denoiser)  # a denoiser of the user's own may be without
    if asked.offload == "none":
        denoiser.place(asked.device, asked.dtype)
    if asked.attention is not None:
        try:
            network.set_attention_backend(asked.attention)
        except Exception as error:  # an unknown name, a missing package, another device: each back end has its own
            raise RequestError(
                "model.attention",
                asked.attention,
                f"diffusers refuses it ({first_line(error)})",
                "Name a back end that this machine has, or leave it out.",
            ) from error
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
    if asked.compile:
        network.compile()
