"""A model made ready to run: its weights, its prompts' embeddings, its place and precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from handful.core.denoiser import NetworkDenoiser
from handful.core.noise import Levels
from handful.files.cache import default_cache
from handful.files.sealed import computed_once
from handful.models import load
from handful.models.options import ModelOptions
from handful.models.placement import Placement, place, try_once
from handful.models.prompts import Prompted, text_encoders
from handful.recipe.schema import Recipe
from handful.runs.provenance import DECIDING, describe_device, installed


def placement_of(recipe: Recipe, device: torch.device) -> Placement:
    """How the recipe asks for its model to be run."""
    asked = recipe.model
    return Placement(
        device, getattr(torch, asked.dtype), asked.attention, asked.compile, asked.offload, asked.vae_slicing, asked.vae_tiling
    )


def with_weights(outline: NetworkDenoiser, name: str, options: ModelOptions, null_class: int | None) -> NetworkDenoiser:
    """The model of an outline, loaded; an outline with weights is the model itself: code of the user's need not run twice."""
    denoiser = load(name, options) if any(each.is_meta for each in outline.parameters()) else outline
    denoiser.null_class = null_class
    return denoiser


def make_ready(
    denoiser: NetworkDenoiser, prompts: list[str], placement: Placement, levels: Levels, told: Sequence[Any], by: Sequence[Any]
) -> list[str]:
    """Encodes the prompts, frees the text encoders, moves the model to its device, and tries it once.

    Args:
        told: A label or a prompt to try it with, alone in a list.
        by: `encoded_by`: of many processes the first one encodes the prompts.

    Returns:
        What the user should know of it, in words.

    Raises:
        RequestError: If it can't run as asked.
    """
    notes = list(denoiser.notes)
    if isinstance(denoiser, Prompted):
        notes += denoiser.unread(prompts)
        _encode(denoiser, prompts, placement, by)
        denoiser.free_text_encoders()
    place(denoiser, placement)
    try_once(denoiser, levels, told)
    if placement.compile:
        getattr(denoiser, "network", denoiser).compile()
    return notes


def encoded_by(options: ModelOptions, model_sha256: str, device: torch.device) -> list[Any]:
    """What decides the embeddings of a prompt, to the last bit: the text encoders, how they are used, and what computes."""
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return [model_sha256, repr(options), describe_device(device), threads, {name: installed(name) for name in DECIDING}]


def _encode(denoiser: Any, prompts: list[str], placement: Placement, by: Sequence[Any]) -> None:
    """Encodes prompts, or reads what another process made of them; a user's own code encodes each time."""
    pipeline = getattr(denoiser, "pipeline", None)

    def encoded() -> dict[str, torch.Tensor]:
        denoiser.encode_prompts(prompts, placement.device)
        return denoiser.prompts.kept(prompts)

    known = denoiser.code_sha256 is None and bool(text_encoders(pipeline))
    key = hashlib.sha256(json.dumps([*by, type(pipeline).__name__, prompts]).encode()).hexdigest()
    denoiser.prompts.take(prompts, computed_once(encoded, key, default_cache() if known else None, "prompts"))
