"""What train_cifar10.py trains: the network, its noise levels, the loss of a step and its rate, and the model it becomes."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save
from torch import Tensor, nn
from training_data import Data, seed_of
from training_state import Settings

from handful.core.noise import VP
from handful.data.images import write_atomically
from handful.errors import RequestError
from handful.models import load
from handful.models.plain_unet import PlainUNet

TRAINING_LEVELS = 1000
NULL_SHARE = 0.1


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=TRAINING_LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def new_network(given: argparse.Namespace, classes: int) -> UNet2DModel:
    """By default four stages, attention on the middle two (16 x 16 and 8 x 8 of 32 x 32 images)."""
    kinds = ["Attn" if stage in given.attention else "" for stage in range(len(given.stages))]
    width = given.width
    torch.manual_seed(seed_of(given.seed, "weights", 0))
    return UNet2DModel(
        sample_size=given.size,
        in_channels=given.channels,
        out_channels=given.channels,
        layers_per_block=given.layers,
        block_out_channels=tuple(width * multiple for multiple in given.stages),
        num_class_embeds=classes + 1,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=math.gcd(width, 32),
        attention_head_dim=math.gcd(width, 64),
        dropout=given.dropout,
    )


def network_from(name: str, data: Data) -> UNet2DModel:
    """The network of `--init`, ready to train; refused where it is not what this trains."""
    try:
        denoiser: Any = load(name)
    except RequestError as error:
        raise RequestError("--init", name, f"{error.field}: {error.problem}", error.remedy) from error
    network, remedy = denoiser.network, "Name another model, or leave --init out."
    if isinstance(network, PlainUNet):  # the packaged one, as diffusers' own class
        made: Any = UNet2DModel.from_config(dict(network.config))
        made.load_state_dict(network.state_dict())
        network = made
    if not isinstance(network, UNet2DModel) or denoiser.prediction != "v":
        raise RequestError("--init", name, "it is no UNet2DModel that predicts v", remedy)
    ours, theirs = VP(scheduler().alphas_cumprod).alpha, getattr(denoiser.levels, "alpha", None)
    if theirs is None or theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=1e-4):
        raise RequestError("--init", name, "it was trained on other noise levels than VP cosine's 1,000", remedy)
    if denoiser.shape != tuple(data.images.shape[1:]):
        raise RequestError(
            "--init",
            name,
            f"its images are {denoiser.shape}, the data's {tuple(data.images.shape[1:])}",
            f"Use --size {denoiser.shape[1]}, or another model.",
        )
    if denoiser.label_count != len(data.classes) + 1:
        problem = f"it takes {denoiser.label_count} labels; {len(data.classes)} classes and the null class need one each"
        raise RequestError("--init", name, problem, remedy)
    return network.float().requires_grad_(True)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak, or nothing."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    if settings.constant or settings.steps is None:
        return settings.rate * warm
    return settings.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps))))


def loss_of(
    network: nn.Module, data: Data, pick: Tensor, alphas: Tensor, sigmas: Tensor, bfloat16: bool, flip: bool = True
) -> Tensor:
    """The loss of one step; draws from torch's global generator, which the caller has seeded by the step."""
    device, batch, null = data.images.device, len(pick), len(data.classes)
    x0 = data.images[pick].float() / 127.5 - 1
    mirror = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    x0 = torch.where(mirror & flip, x0.flip(-1), x0)
    told = torch.where(torch.rand(batch, device=device) < NULL_SHARE, null, data.labels[pick])
    # One level from each of `batch` equal strata: less noise in the loss than independent draws.
    strata = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    t = (strata * TRAINING_LEVELS).long().clamp(max=TRAINING_LEVELS - 1)
    alpha, sigma = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1)
    eps = torch.randn_like(x0)
    x_t = alpha * x0 + sigma * eps
    if device.type == "cuda":
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        v = network(x_t, t, class_labels=told, return_dict=False)[0]
    error = (v.float() - (alpha * eps - sigma * x0)).square().mean((1, 2, 3))
    snr = (alpha / sigma).square().flatten()
    # An error in v of e is an error in x0 of sigma e: min(SNR, 5) on x0 is min(SNR, 5) / (SNR + 1) on v.
    return (error * snr.clamp(max=5) / (snr + 1)).mean()


def export(out: Path, average: UNet2DModel, classes: list[str]) -> Path:
    """The averaged weights as a model that handful and diffusers load."""
    (out / "unet").mkdir(exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in average.state_dict().items()}
    average.save_config(out / "unet")
    scheduler().save_config(out / "scheduler")
    write_atomically(out / "handful.json", (json.dumps({"classes": classes, "null_class": len(classes)}) + "\n").encode())
    file = out / "unet" / "diffusion_pytorch_model.safetensors"
    write_atomically(file, save(weights, metadata={"format": "pt"}))
    return file
