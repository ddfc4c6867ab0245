"""A tiny DiT pipeline with random weights, of diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler


def tiny_dit(
    folder: Path | None = None,
    *,
    classes: int = 1000,
    scheduler: Any = None,
    id2label: dict[str, str] | None = None,
    **config: Any,
) -> DiTPipeline:
    """16 x 16 images out of 8 x 8 latents; 1000 classes, since `DiTPipeline` takes 1000 for the null class.

    Args:
        folder: Where to save it; None does not.
        scheduler: None takes DDIM as the published DiT-XL/2 has it.
        id2label: Class names for the saved model_index.json, where the published models have them; diffusers loses them.
        config: Of the transformer, over the tiny one's.
    """
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": classes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(**{**small, **config})
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    pipeline = DiTPipeline(transformer.eval(), vae.eval(), scheduler or DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    if folder is not None:
        pipeline.save_pretrained(folder)
        if id2label is not None:
            index = folder / "model_index.json"
            index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": id2label}))
    return pipeline
