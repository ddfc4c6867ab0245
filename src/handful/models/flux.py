"""Flux (Black Forest Labs 2024): a transformer of packed latents, trained as a rectified flow; diffusers' `FluxPipeline`. It
takes a prompt as CLIP's one vector and T5's tokens.

FLUX.1-dev is distilled from guidance: it takes a guidance scale as a number (`embedded_guidance`), which is not true
classifier-free guidance. FLUX.1-schnell takes none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition
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
from handful.models.latent import PATCH, LatentDenoiser, factor_of, packed, unpacked
from handful.models.options import ModelOptions, refuse_options
from handful.models.pipelines import component_on_meta, preview_decoder
from handful.models.prompts import Embeddings, Prompted, Prompts, blank_prompts, refuse_for_prompts
from handful.models.source import Source

PIPELINE, TRANSFORMER = "FluxPipeline", "FluxTransformer2DModel"
NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
SAMPLE_SIZE = 128  # latent pixels a side, as the pipeline's default has it; no config says it


class FluxDenoiser(Prompted, LatentDenoiser):
    """A `FluxTransformer2DModel`, its autoencoder and its text encoders. Latents are unpacked: (channels, h / 8, w / 8).

    Args:
        resolution: (height, width) of the images; None takes 128 latent pixels a side.
        prompts: Gives "text" (n, tokens, width) and "pooled" (n, width).
        embedded_guidance: The guidance scale that a guidance-distilled transformer takes.
        pipeline: The diffusers pipeline that the parts are of; None for a skeleton.
    """

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        resolution: tuple[int, int] | None,
        prompts: Prompts,
        *,
        embedded_guidance: float,
        preview_vae: nn.Module | None = None,
        pipeline: Any = None,
    ) -> None:
        config: Any = network.config
        latents: Any = vae.config
        refuse_channels(PIPELINE, config.in_channels, PATCH**2 * latents.latent_channels)
        factor = factor_of(latents)
        height, width = resolution or (SAMPLE_SIZE * factor,) * 2
        levels = flow_levels(
            scheduler, (height // factor // PATCH) * (width // factor // PATCH), time_scale=1.0, given_times=True
        )
        super().__init__(network, vae, "flow", levels, (height, width), patch=PATCH, preview_vae=preview_vae)
        self.prompts, self.pipeline = prompts, pipeline
        self.embedded_guidance = embedded_guidance if config.guidance_embeds else None

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told, guidance = condition.embeddings, None
        text, (height, width) = told["text"].to(scaled), (side // PATCH for side in scaled.shape[-2:])
        if self.embedded_guidance is not None:
            guidance = torch.full_like(time, self.embedded_guidance)
        # float32, since half precision can't tell the positions of a large image apart
        out = self.network(
            packed(scaled),
            timestep=time,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=told["pooled"].to(scaled),
            img_ids=positions(height, width, time),
            txt_ids=time.new_zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        return unpacked(out, height, width)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Each token's (0, row, column), of the dtype and device of `like`: (height width, 3)."""
    row, column = (torch.arange(side).to(like) for side in (height, width))
    return torch.cartesian_prod(like.new_zeros(1), row, column)


def skeleton(source: Source, options: ModelOptions) -> FluxDenoiser:
    """The denoiser without its weights, from the configs alone: on the meta device."""
    refuse_for_prompts(options, UNUSED)
    configs = configs_of(source, options, PIPELINE)
    refuse_missing(configs.name, configs.read_json("model_index.json") or {}, NEEDED)
    transformer: Any = component_on_meta(configs, "transformer", TRANSFORMER)
    _refuse_unread(transformer, options)
    prompts = blank_prompts(
        text=(_tokens(transformer), transformer.config.joint_attention_dim), pooled=(transformer.config.pooled_projection_dim,)
    )
    vae: Any = component_on_meta(configs, "vae", "AutoencoderKL")
    return FluxDenoiser(
        transformer,
        vae,
        scheduler_of(configs),
        options.resolution,
        prompts,
        embedded_guidance=options.embedded_guidance,
        preview_vae=preview_decoder(options, meta=True, channels=vae.config.latent_channels),
    )


def load(source: Source, options: ModelOptions) -> FluxDenoiser:
    """Loads a pipeline's directory, hub name, or a single file's transformer with the rest of a pipeline."""
    skeleton(source, options)  # what the configs show is refused before the weights are read
    return from_pipeline(load_flow_pipeline(source, options, PIPELINE, TRANSFORMER), options)


def from_pipeline(pipeline: Any, options: ModelOptions) -> FluxDenoiser:
    """A denoiser from a `FluxPipeline`; it shares its networks."""
    refuse_for_prompts(options, UNUSED)
    refuse_missing(PIPELINE, pipeline.components, NEEDED)
    _refuse_unread(pipeline.transformer, options)

    def encode(prompts: list[str], device: torch.device) -> Embeddings:
        text, pooled, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=_tokens(pipeline.transformer))
        return {"text": text, "pooled": pooled}

    return FluxDenoiser(
        pipeline.transformer,
        pipeline.vae,
        pipeline.scheduler,
        options.resolution,
        pipeline_prompts(pipeline, options, encode, tokenizer_2=_tokens(pipeline.transformer)),
        embedded_guidance=options.embedded_guidance,
        preview_vae=preview_decoder(options),
        pipeline=pipeline,
    )


def _tokens(transformer: Any) -> int:
    """T5's tokens to a prompt: 512 for FLUX.1-dev; FLUX.1-schnell, which takes no guidance scale, was trained with 256."""
    return 512 if transformer.config.guidance_embeds else 256


def _refuse_unread(transformer: Any, options: ModelOptions) -> None:
    told = transformer.config.guidance_embeds
    refuse_options(options, "trust_pickle", *(() if told else ("embedded_guidance",)))
