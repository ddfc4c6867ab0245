"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer of latents, with up to three text encoders,
trained as a rectified flow; diffusers' `StableDiffusion3Pipeline`.

The largest encoder, T5, can be left out (`without`: text_encoder_3): its tokens are zeros then, as in training. Guidance on
skipped layers, which SD 3.5 Medium's authors suggest, is not offered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition
from handful.errors import RequestError
from handful.models.flow_pipelines import (
    UNUSED,
    configs_of,
    flow_levels,
    load_flow_pipeline,
    pipeline_prompts,
    refuse_channels,
    refuse_missing,
    scheduler_of,
)
from handful.models.latent import LatentDenoiser, factor_of
from handful.models.options import ModelOptions, refuse_options
from handful.models.pipelines import component_on_meta, preview_decoder
from handful.models.prompts import Embeddings, Prompted, Prompts, blank_prompts, refuse_for_prompts
from handful.models.source import Source

PIPELINE, TRANSFORMER = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
T5 = ("text_encoder_3", "tokenizer_3")
NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
T5_TOKENS = 256  # to a prompt, beside the tokens of CLIP, as the pipeline's default has it


class StableDiffusion3Denoiser(Prompted, LatentDenoiser):
    """An `SD3Transformer2DModel`, its autoencoder and its text encoders.

    Args:
        resolution: (height, width) of the images; None takes the one that the transformer was trained at.
        prompts: Gives "text" (n, tokens, width) and "pooled" (n, width).
        pipeline: The diffusers pipeline that the parts are of; None for a skeleton.

    Raises:
        RequestError: If the parts do not fit, or the resolution is beyond the transformer's positions.
    """

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        resolution: tuple[int, int] | None,
        prompts: Prompts,
        *,
        preview_vae: nn.Module | None = None,
        pipeline: Any = None,
    ) -> None:
        config: Any = network.config
        latents: Any = vae.config
        refuse_channels(PIPELINE, config.in_channels, latents.latent_channels)
        factor = factor_of(latents)
        height, width = resolution or (config.sample_size * factor,) * 2
        largest = config.pos_embed_max_size * config.patch_size * factor
        if max(height, width) > largest:
            problem = f"the transformer has positions for {largest} pixels per side at most"
            raise RequestError("model.resolution", [height, width], problem, f"Use {largest} or less per side.")
        patch = config.patch_size
        levels = flow_levels(
            scheduler,
            (height // factor // patch) * (width // factor // patch),
            time_scale=scheduler.config.num_train_timesteps,
            given_times=False,
        )
        super().__init__(network, vae, "flow", levels, (height, width), patch=patch, preview_vae=preview_vae)
        self.prompts, self.pipeline = prompts, pipeline

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told = condition.embeddings
        return self.network(
            scaled,
            timestep=time,
            encoder_hidden_states=told["text"].to(scaled),
            pooled_projections=told["pooled"].to(scaled),
            return_dict=False,
        )[0]


def skeleton(source: Source, options: ModelOptions) -> StableDiffusion3Denoiser:
    """The denoiser without its weights, from the configs alone: on the meta device."""
    _refuse(options)
    configs = configs_of(source, options, PIPELINE)
    refuse_missing(configs.name, configs.read_json("model_index.json") or {}, NEEDED)
    transformer: Any = component_on_meta(configs, "transformer", TRANSFORMER)
    clip_tokens = (configs.read_json("tokenizer/tokenizer_config.json") or {}).get("model_max_length", 77)
    prompts = blank_prompts(
        text=(clip_tokens + T5_TOKENS, transformer.config.joint_attention_dim),
        pooled=(transformer.config.pooled_projection_dim,),
    )
    vae: Any = component_on_meta(configs, "vae", "AutoencoderKL")
    return StableDiffusion3Denoiser(
        transformer,
        vae,
        scheduler_of(configs),
        options.resolution,
        prompts,
        preview_vae=preview_decoder(options, meta=True, channels=vae.config.latent_channels),
    )


def load(source: Source, options: ModelOptions) -> StableDiffusion3Denoiser:
    """Loads a pipeline's directory, hub name, or a single file's transformer with the rest of a pipeline."""
    skeleton(source, options)  # what the configs show is refused before the weights are read
    index = configs_of(source, options, PIPELINE).read_json("model_index.json") or {}
    saved = all(index.get(part) not in (None, [None, None]) for part in T5)
    if not saved or set(T5) & set(options.without):  # name both: the encoder and its tokenizer need each other
        options = replace(options, without=(*options.without, *T5))
    return from_pipeline(load_flow_pipeline(source, options, PIPELINE, TRANSFORMER), options)


def from_pipeline(pipeline: Any, options: ModelOptions) -> StableDiffusion3Denoiser:
    """A denoiser from a `StableDiffusion3Pipeline`; it shares its networks."""
    _refuse(options)
    refuse_missing(PIPELINE, pipeline.components, NEEDED)

    def encode(prompts: list[str], device: torch.device) -> Embeddings:
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_TOKENS
        )
        return {"text": text, "pooled": pooled}

    return StableDiffusion3Denoiser(
        pipeline.transformer,
        pipeline.vae,
        pipeline.scheduler,
        options.resolution,
        pipeline_prompts(pipeline, options, encode, tokenizer_3=T5_TOKENS),
        preview_vae=preview_decoder(options),
        pipeline=pipeline,
    )


def _refuse(options: ModelOptions) -> None:
    refuse_for_prompts(options, (*T5, *UNUSED))
    refuse_options(options, "trust_pickle", "embedded_guidance")
