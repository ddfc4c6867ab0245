"""Tiny vision models of transformers: its own classes with random weights, saved as a user has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PREPROCESSING: dict[str, Any] = {"size": 28, "image_mean": MEAN, "image_std": STD}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_DINO = {key: value for key, value in _VIT.items() if key != "intermediate_size"}
_CONVOLUTIONS = {"hidden_sizes": [8, 12], "depths": [1, 1]}
_SWIN = {"image_size": 28, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 7}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_RESNET = {"embedding_size": 8, "layer_type": "basic", **_CONVOLUTIONS}
_LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cow", 3: "doe", 4: "elk"}}

# Class -> its config's class and words.
POOLED: dict[str, tuple[str, dict[str, Any]]] = {
    "Dinov2Model": ("Dinov2Config", _DINO),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", {**_DINO, "num_register_tokens": 3}),
    "DINOv3ViTModel": ("DINOv3ViTConfig", {**_VIT, "num_register_tokens": 3}),
    "CLIPVisionModel": ("CLIPVisionConfig", _VIT),
    "CLIPModel": ("CLIPConfig", {"vision_config": _VIT, "text_config": _TEXT}),
    "SiglipModel": ("SiglipConfig", {"vision_config": _VIT, "text_config": _TEXT}),
    "ViTModel": ("ViTConfig", _VIT),
    "ConvNextModel": ("ConvNextConfig", {"num_stages": 2, **_CONVOLUTIONS}),
    "ResNetModel": ("ResNetConfig", _RESNET),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNetForImageClassification": ("ResNetConfig", {**_RESNET, **_LABELS}),
    "ViTForImageClassification": ("ViTConfig", {**_VIT, **_LABELS}),
    "ConvNextForImageClassification": ("ConvNextConfig", {"num_stages": 2, **_CONVOLUTIONS, **_LABELS}),
    "SwinForImageClassification": ("SwinConfig", {**_SWIN, **_LABELS}),
    "DeiTForImageClassification": ("DeiTConfig", {**_VIT, **_LABELS}),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", {**_VIT, **_LABELS}),
    "Dinov2ForImageClassification": ("Dinov2Config", {**_DINO, **_LABELS}),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": _VIT, "text_config": _TEXT, **_LABELS}),
}
UNFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", _TEXT),
    "DetrForObjectDetection": (
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "backbone": None,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "backbone_config": {"model_type": "resnet", "out_features": ["stage2"], **_RESNET},
        },
    ),
    "YolosForObjectDetection": ("YolosConfig", {**_VIT, "image_size": [28, 28], "num_detection_tokens": 3}),
    "ViTForMaskedImageModeling": ("ViTConfig", _VIT),
    "ViTMAEModel": ("ViTMAEConfig", _VIT),
    "Siglip2VisionModel": ("Siglip2VisionConfig", {key: _VIT[key] for key in _VIT if key != "image_size"}),
}


def save_vision_model(folder: Path, kind: str, said: dict[str, Any] | None = None, **more: Any) -> Any:
    """The model, saved into the folder with its preprocessor_config.json."""
    config, words = {**POOLED, **CLASSIFIERS, **UNFIT}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**{**words, **more})).eval()
        for parameter in model.parameters():  # untrained models start so near to zero that wrong ones look alike
            if parameter.ndim > 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING if said is None else said))
    return model


def random_images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    """(n, c, h, w) in [-1, 1], float64."""
    return torch.rand(n, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
