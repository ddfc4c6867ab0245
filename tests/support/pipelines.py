"""Tiny pipelines of Stable Diffusion and SDXL: diffusers' own classes with random weights, made without the network."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# The noise that Stable Diffusion 1.5, 2.1 and SDXL were trained on, as their scheduler_config.json has it.
TRAINED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
LETTERS = string.ascii_lowercase + string.digits


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a letter to a token, 74 in all; the last is the end of the text."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({word: place for place, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def text_config(width: int = 16, projection: int = 16) -> CLIPTextConfig:
    """Of a CLIP text encoder for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=74,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=72,
        eos_token_id=73,
        pad_token_id=73,
    )


def tiny_vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """An autoencoder with a factor of 8."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        **config,
    )


def tiny_unet(**config: Any) -> UNet2DConditionModel:
    """A UNet of latents 4 x 8 x 8, told embeddings 16 wide."""
    usual = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**usual, **config})


def tiny_stable_diffusion(
    folder: Path | None = None, prediction: str = "epsilon", scheduler: Any = None, unet: dict[str, Any] | None = None
) -> StableDiffusionPipeline:
    """Stable Diffusion in small, with the DDIM scheduler that SD 1.5 names where its PNDM is not wanted.

    Args:
        folder: Where to save it too.
        prediction: What its UNet predicts, by diffusers' names.
        scheduler: Another scheduler.
        unet: Fields of the UNet's config.
    """
    told: dict[str, Any] = {**TRAINED, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            unet=tiny_unet(**(unet or {})),
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            scheduler=scheduler or DDIMScheduler(**told),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return made(pipeline, folder)


def tiny_sdxl(folder: Path | None = None, unet: dict[str, Any] | None = None, **config: Any) -> StableDiffusionXLPipeline:
    """SDXL in small, with the Euler scheduler that it ships; `config` goes to the pipeline."""
    told = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "cross_attention_dim": 16 + 24,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            unet=tiny_unet(**{**told, **(unet or {})}),
            vae=tiny_vae(force_upcast=True, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(width=24)),
            tokenizer_2=tokenizer(),
            scheduler=EulerDiscreteScheduler(**TRAINED),
            add_watermarker=False,
            **config,
        )
    return made(pipeline, folder)


def made(pipeline: Any, folder: Path | None = None) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if folder is not None:
        pipeline.save_pretrained(folder)
    return pipeline
