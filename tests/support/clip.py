"""A tiny whole CLIP of transformers, images and texts: random weights and a tokenizer, saved as a user has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from support.pipelines import text_config, tokenizer
from support.vision import PREPROCESSING


def save_clip(folder: Path, *, seed: int = 0, **vision: Any) -> CLIPModel:
    """The model, saved into the folder; `vision` over the config of its image half (28 x 28 images, patches of 14)."""
    seen = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 28,
        "patch_size": 14,
    }
    config = CLIPConfig(
        text_config=text_config(width=24).to_dict(),
        vision_config=CLIPVisionConfig(**{**seen, **vision}).to_dict(),
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():  # untrained models start so near to zero that wrong ones look alike
            if parameter.ndim > 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return model
