"""CLIP as a classifier, for models that take prompts: one prompt a class (Radford et al. 2021, arXiv 2103.00020, 3.1).

    logits_j(x) = exp(s) cos(image(x), text_j)          s: CLIP's own learned logit_scale

EluCD guides text-to-image models so. The texts are encoded once; only the image half and its projection are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from handful.errors import RequestError, counted, first_line
from handful.features.registry import OWN, TORCHSCRIPT, TRANSFORMERS, FeatureExtractor, name_and_side
from handful.features.transformers import (
    KNOWN,
    UNREADABLE,
    known_config,
    load_weights,
    plan_model,
    quietly,
    read_config,
    unreadable,
)
from handful.models.libraries import check_libraries
from handful.models.source import find_source

_KIND = "CLIPModel"


class _Similarity(nn.Module):
    """Images -> cosines to texts, times a scale.

    Args:
        projection: Into the space that images and texts share.
        texts: Unit vectors, (classes, d).
        words: Further arguments of the image half.
    """

    texts: Tensor
    scale: Tensor

    def __init__(
        self, vision: nn.Module, projection: nn.Module, texts: Tensor, scale: Tensor, words: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.vision, self.projection, self.words = vision, projection, dict(words)
        self.register_buffer("texts", texts)
        self.register_buffer("scale", scale)

    def embeddings(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.vision(pixel_values=pixel_values, **self.words).pooler_output)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.scale * normalize(self.embeddings(pixel_values), dim=-1) @ self.texts.T


def is_clip(name: str) -> bool:
    """Whether a name means a whole CLIP of transformers, images and texts; what can't be read is none."""
    try:
        name, _ = name_and_side(name)
    except RequestError:
        return False
    if name.partition(":")[0] in OWN or Path(name).is_file() or name.endswith((*TORCHSCRIPT, ".py")):
        return False
    name = TRANSFORMERS.get(name, name)
    if name in KNOWN and not Path(name).is_dir():
        return KNOWN[name][0]["model_type"] == "clip_vision_model"
    source = find_source(name)
    try:
        config = source.read_json("config.json") if source else None
    except RequestError:  # whoever loads it says why
        return False
    if config is None:
        return False
    return _KIND in (config.get("architectures") or (_KIND if config.get("model_type") == "clip" else ()))


def clip_classifier(name: str, prompts: Mapping[str, str]) -> FeatureExtractor:
    """A classifier of what prompts say, from a CLIP.

    Args:
        name: `clip` (ViT-L/14), or a directory or hub name for which `is_clip`; it may end in `@SIDE`, as features' may.
        prompts: By class name; the classes are numbered in this order.

    Returns:
        An extractor whose logits are CLIP's own `logits_per_image`, and whose features are its image embeddings (n, d).
        Images are resized and normalised as for the features of the same name.

    Raises:
        RequestError: If it can't be loaded, or a prompt is too long for it.
    """
    check_libraries()
    from transformers import CLIPModel

    name, side = _named(name)
    plan, _ = plan_model(name, config := read_config(name), None, side)
    tokens = _tokens(name, prompts, config.text_config)
    model = load_weights(CLIPModel, name).eval()
    with torch.no_grad():
        texts = [normalize(model.text_projection(model.text_model(input_ids=one).pooler_output), dim=-1) for one in tokens]
        scale = model.logit_scale.detach().exp()
    network = _Similarity(model.vision_model, model.visual_projection, torch.cat(texts), scale, plan.words)
    return _extractor(plan, network, prompts)


def clip_skeleton(name: str, prompts: Mapping[str, str]) -> FeatureExtractor:
    """`clip_classifier` on the meta device, without weights; for the names that features know without any file.

    Raises:
        RequestError: As `clip_classifier`, where the configs show it.
    """
    check_libraries()
    name, side = _named(name)
    config, said = known_config(name)
    plan, vision = plan_model(name, config, said, side)
    width = getattr(config, "vision_config", config).hidden_size
    with torch.device("meta"):
        projection = nn.Linear(width, config.projection_dim, bias=False)
        texts, scale = torch.empty(len(prompts), config.projection_dim), torch.empty(())
    return _extractor(plan, _Similarity(vision, projection, texts, scale, plan.words), prompts)


def _named(asked: str) -> tuple[str, int | None]:
    name, side = name_and_side(asked)
    return TRANSFORMERS.get(name, name), side


def _extractor(plan: Any, network: _Similarity, prompts: Mapping[str, str]) -> FeatureExtractor:
    return FeatureExtractor(
        plan.name,
        network,
        size=plan.size,
        mean=plan.mean,
        std=plan.std,
        features=network.embeddings,
        classify=network,
        classes=tuple(prompts),
    )


def _tokens(name: str, prompts: Mapping[str, str], config: Any) -> list[Tensor]:
    """Each prompt's tokens (1, length) by itself, so that none depends on its neighbours' padding."""
    from transformers import AutoTokenizer

    try:
        with quietly():
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
        told = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts.values()]
    except UNREADABLE as error:
        raise RequestError(
            "features", name, f"its tokenizer can't be loaded ({first_line(error)})", unreadable(name, error).remedy
        ) from error
    # where its files are missing, transformers makes one that knows nothing but its special tokens
    unfit = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    if unfit or any(int(tokens.max()) >= config.vocab_size for tokens in told):
        problem = "its tokenizer's files are missing" if unfit else "its tokenizer belongs to another model"
        raise RequestError(
            "features", name, problem, "Copy the whole model again, with tokenizer.json or vocab.json and merges.txt."
        )
    limit = min(config.max_position_embeddings, tokenizer.model_max_length)
    for prompt, tokens in zip(prompts.values(), told, strict=True):
        if tokens.shape[1] > limit:
            raise RequestError(
                "prompts", prompt, f"it has {counted(tokens.shape[1], 'token')}, and this CLIP reads {limit}", "Shorten it."
            )
    return told
