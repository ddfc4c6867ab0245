"""Stable Diffusion 1.5, 2.1 and SDXL: prompts -> latents, by a `UNet2DConditionModel` that predicts eps or v.

Sources: Rombach et al. 2022 (arXiv 2112.10752); Podell et al. 2023 (arXiv 2307.01952) for SDXL, whose UNet also takes
a pooled embedding and the picture's sizes (its section 2.2). single_file.py tells which of them a single file is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from handful.core.denoiser import Condition, Prediction
from handful.core.noise import Schedule
from handful.errors import RequestError
from handful.models import single_file
from handful.models.latent import LatentDenoiser
from handful.models.options import ModelOptions, refuse_options
from handful.models.pipelines import component_on_meta, load_pipeline, preview_decoder
from handful.models.prompts import Prompted, Prompts, blank_prompts, free_encoders, readers, refuse_for_prompts, runs_on
from handful.models.schedulers import schedule_of
from handful.models.source import Source

PIPELINE, PIPELINE_XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no latent depends on
# Fields of a UNet's config: it takes an input besides the prompt.
TOLD_MORE = {
    "class_embed_type": "a class or a level of noise, as upscalers are",
    "num_class_embeds": "a class or a level of noise, as upscalers are",
    "encoder_hid_dim_type": "an image, as with an IP-Adapter",
}
SIZES = 6  # SDXL takes (height, width) of the original, of the crop's corner, and of the target


class StableDiffusionDenoiser(Prompted, LatentDenoiser):
    """A UNet of prompts, its autoencoder and its text encoders.

    Args:
        embedded_guidance: The guidance scale that a guidance-distilled network takes (latent consistency models).
        prompts: Gives "text" (n, tokens, width), and for SDXL "pooled" (n, width) and "time_ids" (n, 6).
        pipeline: The diffusers pipeline that the parts are of; None for a skeleton.
    """

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        prediction: Prediction,
        levels: Schedule,
        resolution: tuple[int, int],
        prompts: Prompts,
        *,
        embedded_guidance: float = 0.0,
        preview_vae: nn.Module | None = None,
        pipeline: Any = None,
    ) -> None:
        super().__init__(network, vae, prediction, levels, resolution, preview_vae=preview_vae)
        self.embedded_guidance = embedded_guidance
        self.prompts, self.pipeline = prompts, pipeline
        unet: Any = network.config
        told: Any = vae.config
        self.vae_overflows = _is_xl(unet) and bool(told.force_upcast)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told, added = condition.embeddings, None
        if "pooled" in told:  # the sizes stay in float32, as the network makes sines of them
            added = {"text_embeds": told["pooled"].to(scaled), "time_ids": told["time_ids"].to(scaled.device)}
        text, scale = told["text"].to(scaled), None
        config: Any = self.network.config
        if (width := config.time_cond_proj_dim) is not None:
            scale = guidance_waves(self.embedded_guidance, width).to(scaled).expand(len(scaled), width)
        return self.network(
            scaled, time, timestep_cond=scale, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]


def guidance_waves(scale: float, width: int) -> Tensor:
    """A guidance scale as latent consistency models take it, sines then cosines of 1000 (scale - 1): (1, width), float32.

    Meng et al. 2023 (arXiv 2210.03142), section 3; VDM's embedding of times, as diffusers' pipeline has it.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000.0 * torch.tensor([[scale - 1]], dtype=torch.float32) * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def skeleton(source: Source, options: ModelOptions) -> LatentDenoiser:
    """The denoiser without its weights, from the configs alone: on the meta device.

    A single file's configs are those of `options.config`, or of the hub's model that diffusers takes for it.
    """
    if source.file is not None:
        kind, source, options = single_file.identified(source, options)
        if kind not in (PIPELINE, PIPELINE_XL):
            return single_file.family_of_kind(kind).skeleton(source, options)
    unet: Any = component_on_meta(source, "unet", "UNet2DConditionModel")
    vae: Any = component_on_meta(source, "vae", "AutoencoderKL")
    index = source.read_json("model_index.json") or {}
    missing = [name for name, value in index.items() if isinstance(value, list) and value[:1] == [None]]
    pooled = (source.read_json("text_encoder_2/config.json") or {}).get("projection_dim")
    _refuse(source.name, unet.config, vae.config, index, missing, pooled, options)
    told = source.scheduler()
    if not _is_xl(unet.config):
        told["steps_offset"] = 1  # what the pipeline itself makes of older configs
    levels, prediction = schedule_of(told)
    length = (source.read_json("text_encoder/config.json") or {}).get("max_position_embeddings", 77)
    return StableDiffusionDenoiser(
        unet,
        vae,
        prediction,
        levels,
        _resolution(unet.config, vae.config, options),
        _blank_prompts(unet.config, length),
        embedded_guidance=options.embedded_guidance,
        preview_vae=preview_decoder(options, meta=True),
    )


def load(source: Source, options: ModelOptions) -> LatentDenoiser:
    """Loads a pipeline's directory, hub name or single file."""
    if source.file is not None:
        kind, configs, options = single_file.identified(source, options)
        if kind not in (PIPELINE, PIPELINE_XL):
            return single_file.family_of_kind(kind).load(source, options)
        skeleton(configs, options)
        pipeline = single_file.load_pipeline_file(source, options, kind)
    else:
        skeleton(source, options)  # what the configs show is refused before the weights are read
        two = (source.read_json("model_index.json") or {}).get("text_encoder_2") not in (None, [None, None])
        # by its parts: pipelines for image to image, and subclasses, have the same
        pipeline = load_pipeline(source, options, PIPELINE_XL if two else PIPELINE)
    if _overflows(pipeline):
        pipeline.vae.to(torch.float32)
    return from_pipeline(pipeline, options)


def from_pipeline(pipeline: Any, options: ModelOptions) -> StableDiffusionDenoiser:
    """A denoiser from a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; it shares its networks.

    An autoencoder that would overflow in the pipeline's float16 is copied to float32, because the pipeline goes on with
    its own.
    """
    unet, vae = pipeline.unet, pipeline.vae
    missing = [name for name, value in pipeline.components.items() if value is None]
    second = getattr(pipeline, "text_encoder_2", None)
    pooled = None if second is None else second.config.projection_dim
    _refuse(type(pipeline).__name__, unet.config, vae.config, pipeline.config, missing, pooled, options)
    told = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    levels, prediction = schedule_of(told)
    resolution = _resolution(unet.config, vae.config, options)
    return StableDiffusionDenoiser(
        unet,
        copy.deepcopy(vae).to(torch.float32) if _overflows(pipeline) else vae,
        prediction,
        levels,
        resolution,
        _prompts(pipeline, resolution, options),
        embedded_guidance=options.embedded_guidance,
        preview_vae=preview_decoder(options),
        pipeline=pipeline,
    )


def _prompts(pipeline: Any, resolution: tuple[int, int], options: ModelOptions) -> Prompts:
    """The prompts of a pipeline, encoded by its own `encode_prompt`."""
    xl = _is_xl(pipeline.unet.config)

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        device = runs_on(pipeline.text_encoder)
        if not xl:
            return {"text": pipeline.encode_prompt(prompts, device, 1, False)[0]}
        text, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        sizes = torch.tensor([[*resolution, 0, 0, *resolution]], dtype=torch.float32)
        return {"text": text, "pooled": pooled, "time_ids": sizes.expand(len(prompts), SIZES)}

    def encode_null() -> dict[str, Tensor]:
        null = encode([options.negative_prompt])
        if xl and pipeline.config.force_zeros_for_empty_prompt and not options.negative_prompt:
            null |= {name: torch.zeros_like(null[name]) for name in ("text", "pooled")}
        return null

    return Prompts(encode, encode_null, lambda: free_encoders(pipeline), readers(pipeline))


def _blank_prompts(unet: Mapping[str, Any], length: int) -> Prompts:
    width = unet["cross_attention_dim"]
    text = (length, width if isinstance(width, int) else width[0])
    return (
        blank_prompts(text=text, pooled=(_pooled_width(unet),), time_ids=(SIZES,)) if _is_xl(unet) else blank_prompts(text=text)
    )


def _refuse(
    name: str,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    index: Mapping[str, Any],
    missing: list[str],
    pooled: int | None,
    options: ModelOptions,
) -> None:
    """Refuses what this family is not, and options that it can't follow.

    Args:
        missing: Components that the pipeline has none of.
        pooled: Width of what the second text encoder gives for SDXL's pooled embedding; None where unknown.
    """
    refuse_for_prompts(options, UNUSED)
    distilled = unet.get("time_cond_proj_dim") is not None
    refuse_options(options, "trust_pickle", *(() if distilled else ("embedded_guidance",)))
    xl = _is_xl(unet)
    other = "Use the family's base model for text to image."
    needed = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", *(("text_encoder_2", "tokenizer_2") if xl else ()))
    if index.get("requires_aesthetics_score") or (xl and pooled is not None and pooled != _pooled_width(unet)):
        raise RequestError("model", name, "it is a refiner of SDXL, which also needs an aesthetic score", other)
    if absent := [component for component in needed if component in missing]:
        remedy = "Load it with all its parts; refiners of SDXL, which have one text encoder, can't be used."
        raise RequestError("model", name, f"the pipeline has no {' and no '.join(absent)}", remedy)
    if unet["in_channels"] != vae["latent_channels"]:
        problem = (
            f"its UNet takes {unet['in_channels']} channels and its latents have {vae['latent_channels']}: it also needs an "
            f"image, as inpainting models do"
        )
        raise RequestError("model", name, problem, other)
    for field, what in TOLD_MORE.items():
        if unet.get(field) is not None:
            raise RequestError("model", name, f"its UNet also needs {what} ({field} {unet[field]})", other)
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise RequestError(
            "model", name, f"its UNet needs more than a prompt (addition_embed_type {unet['addition_embed_type']})", other
        )


def _is_xl(unet: Mapping[str, Any]) -> bool:
    return unet.get("addition_embed_type") == "text_time"


def _pooled_width(unet: Mapping[str, Any]) -> int:
    return unet["projection_class_embeddings_input_dim"] - SIZES * unet["addition_time_embed_dim"]


def _resolution(unet: Mapping[str, Any], vae: Mapping[str, Any], options: ModelOptions) -> tuple[int, int]:
    if options.resolution is not None:
        return options.resolution
    side, factor = unet["sample_size"], 2 ** (len(vae["block_out_channels"]) - 1)
    if side is None:
        raise RequestError("model.resolution", None, "the UNet's config does not say its resolution", "Give resolution.")
    height, width = (side, side) if isinstance(side, int) else side
    return height * factor, width * factor


def _overflows(pipeline: Any) -> bool:
    """Whether the autoencoder is in float16 and gives no numbers there, as the pipeline itself sees it."""
    return _is_xl(pipeline.unet.config) and bool(pipeline.vae.config.force_upcast) and pipeline.vae.dtype == torch.float16
