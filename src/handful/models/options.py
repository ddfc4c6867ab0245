"""How a model is asked for, beyond its name: one record that every family reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from handful.errors import RequestError


@dataclass(frozen=True)
class ModelOptions:
    """What a user may say of a model. A family refuses by name what it can't do.

    Attributes:
        null_class: The label for "no class"; None takes the model's.
        classes: Names of its classes by label; None takes what the model says.
        dtype: The precision to load the weights in; None: float32.
        resolution: (height, width) of the images; None takes the model's own.
        negative_prompt: What stands for "no prompt".
        embedded_guidance: The guidance scale that a guidance-distilled network (Flux) takes as an input.
        without: Components of a pipeline not to load, such as text_encoder_3.
        preview_decoder: A tiny autoencoder (diffusers' AutoencoderTiny) that guidance decodes with, by directory or hub name.
        lora: Additions to the networks, each a file and its weight: merged into the weights, so part of the model's digest.
        embeddings: Textual inversion: words and the file of each one's embedding.
        vae: Another autoencoder, by directory or hub name.
        scheduler: Another scheduler's levels: a directory or hub name with a scheduler_config.json.
        config: For a single file: the directory or hub name with the pipeline's configs.
        revision: Of a hub name; None takes main.
        variant: Of the weight files, such as fp16.
        trust_pickle: Run the code in a pickled network. Whoever made the file can do with it whatever you can.
    """

    null_class: int | None = None
    classes: Sequence[str] | None = None
    dtype: torch.dtype | None = None
    resolution: tuple[int, int] | None = None
    negative_prompt: str = ""
    embedded_guidance: float = 3.5
    without: tuple[str, ...] = ()
    preview_decoder: str | Path | None = None
    lora: Sequence[Any] = ()  # (path, weight), or what has these as attributes
    embeddings: Mapping[str, str] | None = None
    vae: str | Path | None = None
    scheduler: str | Path | None = None
    config: str | Path | None = None
    revision: str | None = None
    variant: str | None = None
    trust_pickle: bool = False


ADAPTERS = ("lora", "embeddings", "vae", "scheduler")  # what changes a pipeline's parts
# What only pipelines have a use for: a network in one file has no parts, texts or configs.
OF_PIPELINES = (
    *ADAPTERS,
    "negative_prompt",
    "embedded_guidance",
    "without",
    "preview_decoder",
    "config",
    "revision",
    "variant",
)


def refuse_resolution(own: tuple[int, ...], options: ModelOptions) -> None:
    """Refuses another resolution than the model's own, which networks with fixed positions or depths can't take."""
    if options.resolution is not None and tuple(options.resolution) != tuple(own):
        problem = f"this model's images are {own[0]} x {own[1]}"
        raise RequestError("model.resolution", list(options.resolution), problem, "Leave resolution out.")


def refuse_options(options: ModelOptions, *names: str) -> None:
    """Refuses what a family has no use for, so that nothing asked for is passed over in silence."""
    for each in fields(options):
        if each.name in names and (given := getattr(options, each.name)) != each.default:
            given = [str(getattr(one, "path", one)) for one in given] if each.name == "lora" else given
            raise RequestError(f"model.{each.name}", given, "this model does not use it", "Leave it out.")
