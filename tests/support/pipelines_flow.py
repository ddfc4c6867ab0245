"""Tiny pipelines of Stable Diffusion 3 and Flux: diffusers' own classes with random weights, made without the network."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from handful.core.samplers import ddim, start
from handful.guidance.cfg import CFG
from handful.guidance.guided import Guided
from support.pipelines import made, text_config, tiny_vae, tokenizer

PROMPTS = ["a red cat", "two dogs"]
LETTERS = string.ascii_lowercase + string.digits


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer with a letter to a token."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512)


def t5_encoder() -> T5EncoderModel:
    """For `t5_tokenizer`; embeddings 32 wide."""
    return T5EncoderModel(
        T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    )


def tiny_sd3(
    folder: Path | None = None, t5: bool = True, transformer: dict[str, Any] | None = None, **scheduler: Any
) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 in small: images of 64 x 64 by latents of 4 x 8 x 8, positions up to 128 x 128.

    Args:
        folder: Where to save it too.
        t5: With the third text encoder.
        transformer, scheduler: Fields of their configs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 32,
                "pos_embed_max_size": 8,
                **(transformer or {}),
            }
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=network,
            vae=tiny_vae(scaling_factor=1.5305, shift_factor=0.0609),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            text_encoder=CLIPTextModelWithProjection(text_config()),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5_encoder() if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
        )
    return made(pipeline, folder)


def tiny_flux(
    folder: Path | None = None,
    guidance_embeds: bool = True,
    dynamic_shift: bool = True,
    transformer: dict[str, Any] | None = None,
    **scheduler: Any,
) -> FluxPipeline:
    """Flux in small: latents of 4 channels, 16 to a token.

    Args:
        folder: Where to save it too.
        guidance_embeds: As FLUX.1-dev has it; otherwise as FLUX.1-schnell.
        dynamic_shift: Whether the scheduler shifts by resolution, as FLUX.1-dev's does.
        transformer, scheduler: Fields of their configs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FluxTransformer2DModel(
            **{
                "patch_size": 1,
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 16,
                "axes_dims_rope": (4, 4, 8),
                "guidance_embeds": guidance_embeds,
                **(transformer or {}),
            }
        )
        shift = {"shift": 3.0, "use_dynamic_shifting": dynamic_shift, "base_shift": 0.5, "max_shift": 1.15}
        pipeline = FluxPipeline(
            transformer=network,
            vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(**{**shift, **scheduler}),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
        )
    return made(pipeline, folder)


@torch.no_grad()
def sampled(denoiser: Any, steps: int, w: float = 0.0, prompts: list[str] = PROMPTS, spacing: str = "model") -> Tensor:
    """Our sample by Euler's method, from `noise`."""
    levels = denoiser.levels.spacing(steps, spacing)
    guided = Guided(denoiser, [CFG(w)]) if w else denoiser
    return ddim(guided, start(noise(denoiser, len(prompts)), levels), levels, denoiser.condition(prompts))


def noise(denoiser: Any, n: int = 2) -> Tensor:
    return torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(1))


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found - wanted).norm() / wanted.norm())
