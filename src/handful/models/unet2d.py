"""diffusers' `UNet2DModel`: DDPM-style networks, unconditional or with class labels; of pixels, or of the latents of an
autoencoder that lies beside them, as `LDMPipeline` has it (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handful.core.denoiser import Condition, NetworkDenoiser, Prediction
from handful.core.noise import Schedule
from handful.errors import RequestError
from handful.models.labels import label_condition, set_labels
from handful.models.latent import LatentDenoiser, factor_of
from handful.models.options import ModelOptions, refuse_options, refuse_resolution
from handful.models.pipelines import component_on_meta, load_component, on_meta, preview_decoder
from handful.models.plain_unet import PlainUNet, fits
from handful.models.schedulers import schedule_of
from handful.models.source import Source
from handful.zoo import ZOO

UNUSED = ("lora", "embeddings", "vae", "negative_prompt", "embedded_guidance", "without", "config", "trust_pickle")
AUTOENCODERS = ("vae", "vqvae")


class _Labelled:
    """How a `UNet2DModel` takes its class labels; a base class listed before a denoiser."""

    network: Any
    null_may_be_unstated: bool = True  # diffusers' config has no field for it; other families say whether they have one

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return label_condition(self, labels)  # type: ignore[arg-type]  # the denoiser that it stands before

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        return () if self.network.class_embedding is None else (self.network.class_embedding,)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, time, class_labels=condition.labels, return_dict=False)[0]


class UNet2DDenoiser(_Labelled, NetworkDenoiser):
    """A `UNet2DModel` of pixels as a denoiser.

    Args:
        network: The model; as many output channels as input channels, or twice as many where it learned the variance.
        prediction, levels: As its scheduler says; see `schedule_of`.
        classes: Names of its classes by label; empty where unknown.
        null_class: The label that stands for "no class"; None where there is none.
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: Prediction,
        levels: Schedule,
        *,
        classes: Sequence[str] = (),
        null_class: int | None = None,
    ) -> None:
        channels, height, width = _shape(network)
        if channels not in (1, 3):
            problem = "its images have neither 1 nor 3 channels: it is a UNet of latents, and its directory has no autoencoder"
            remedy = "Give the whole pipeline's directory, with the autoencoder in vae/ or vqvae/."
            raise RequestError("model", f"in_channels {channels}", problem, remedy)
        super().__init__(network, prediction, (channels, height, width), levels)
        set_labels(self, _config(network).num_class_embeds or 0, classes, null_class)


class LatentUNetDenoiser(_Labelled, LatentDenoiser):
    """A `UNet2DModel` of latents and its autoencoder, an `AutoencoderKL` or a `VQModel`.

    Args:
        preview_vae: As for `LatentDenoiser`; the others as for `UNet2DDenoiser`.
    """

    can_offload = False

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        prediction: Prediction,
        levels: Schedule,
        *,
        classes: Sequence[str] = (),
        null_class: int | None = None,
        preview_vae: nn.Module | None = None,
    ) -> None:
        (channels, height, width), latents = _shape(network), _config(vae)
        if channels != latents.latent_channels:
            problem = f"its autoencoder's latents have {latents.latent_channels}: it also needs an image, as upscalers do"
            raise RequestError("model", f"in_channels {channels}", problem, "Use a model that takes class labels or nothing.")
        factor = factor_of(latents)
        super().__init__(network, vae, prediction, levels, (height * factor, width * factor), preview_vae=preview_vae)
        set_labels(self, _config(network).num_class_embeds or 0, classes, null_class)


def _config(module: nn.Module) -> Any:
    return module.config


def _shape(network: nn.Module) -> tuple[int, int, int]:
    """(c, h, w) of what a UNet denoises."""
    config = _config(network)
    side = config.sample_size
    if side is None:
        raise RequestError(
            "model", "sample_size", "the UNet's config does not say its resolution", "Write sample_size into its config.json."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        problem = "the UNet's output is neither the image alone nor image and variance"
        remedy = "Use a UNet2DModel with as many output as input channels, or twice as many."
        raise RequestError("model", f"out_channels {config.out_channels}", problem, remedy)
    if config.class_embed_type is not None:
        problem = "the UNet takes numbers or vectors as conditions, not class labels"
        remedy = "Build its denoiser in FILE.py:FUNCTION, which may return any handful.core.denoiser.Denoiser."
        raise RequestError("model", f"class_embed_type {config.class_embed_type}", problem, remedy)
    height, width = (side, side) if isinstance(side, int) else side
    return config.in_channels, height, width


def skeleton(source: Source, options: ModelOptions) -> UNet2DDenoiser | LatentUNetDenoiser:
    """The denoiser without its weights, from the configs alone: on the meta device."""
    refuse_options(options, *UNUSED)
    config = source.read_json(f"{_inside(source)}config.json") or {}
    if _is_plain(source, config):
        with torch.device("meta"):
            plain = PlainUNet(config)
        return _denoiser(plain, None, source, options, meta=True)
    network = on_meta("UNet2DModel", config)
    part = _autoencoder(source)
    vae = None if part is None else component_on_meta(source, part, "AutoencoderKL")
    return _denoiser(network, vae, source, options, meta=True)


def load(source: Source, options: ModelOptions) -> UNet2DDenoiser | LatentUNetDenoiser:
    """Loads a model with `unet/` and `scheduler/`, or a UNet's own with its `scheduler_config.json` beside.

    A `handful.json` beside them may say `{"classes": [names], "null_class": label}`.
    """
    outline = skeleton(source, options)  # what the configs show is refused before the weights are read
    if isinstance(outline.network, PlainUNet):
        return _packaged(outline, source, options)
    network, part = load_component(source, options, _inside(source).rstrip("/"), "UNet2DModel"), _autoencoder(source)
    kind = "" if part is None else str(source.config(part).get("_class_name", "AutoencoderKL"))
    return _denoiser(network, load_component(source, options, part, kind) if part else None, source, options)


def _is_plain(source: Source, config: dict[str, Any]) -> bool:
    return source.name in ZOO and source.folder is not None and fits(config)


def _packaged(outline: UNet2DDenoiser | LatentUNetDenoiser, source: Source, options: ModelOptions) -> Any:
    """The denoiser of a packaged model with its weights."""
    assert source.folder is not None
    weights = load_file(source.folder / _inside(source) / "diffusion_pytorch_model.safetensors")
    outline.network.load_state_dict(
        {name: one.to(options.dtype or torch.float32) for name, one in weights.items()}, assign=True
    )
    outline.network.requires_grad_(False)
    return outline


def _autoencoder(source: Source) -> str | None:
    """The folder of the autoencoder that lies beside the UNet; None of a model of pixels."""
    index = source.read_json("model_index.json") or {}
    parts = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    if strange := [name for name in parts if name not in ("unet", "scheduler", *AUTOENCODERS)]:
        problem = f"it is a {index.get('_class_name')}, an unknown family: its UNet needs more inputs ({', '.join(strange)})"
        remedy = "Build the denoiser in FILE.py:FUNCTION, which may return any handful.core.denoiser.Denoiser."
        raise RequestError("model", source.name, problem, remedy)
    return next((name for name in AUTOENCODERS if name in parts), None)


def _inside(source: Source) -> str:
    return "unet/" if source.read_json("unet/config.json") is not None else ""


def _denoiser(
    network: nn.Module, vae: nn.Module | None, source: Source, options: ModelOptions, *, meta: bool = False
) -> UNet2DDenoiser | LatentUNetDenoiser:
    told = source.read_json("scheduler/scheduler_config.json") or source.read_json("scheduler_config.json")
    if told is None:
        problem = "there is no scheduler_config.json, so its noise levels are unknown"
        raise RequestError("model", source.name, problem, "Copy the pipeline's scheduler/ folder beside unet/.")
    levels, prediction = schedule_of(told)
    notes = source.read_json("handful.json") or {}
    said = notes.get("classes", []), notes.get("null_class")
    if not isinstance(said[0], list) or not all(isinstance(name, str) for name in said[0]):
        problem = f"in the handful.json of '{source.name}' this is not a list of names"
        raise RequestError("classes", said[0], problem, 'Write {"classes": ["name of label 0", ...]}.')
    if said[1] is not None and type(said[1]) is not int:  # JSON's true is an int to isinstance
        problem = f"in the handful.json of '{source.name}' this is not a label"
        raise RequestError("null_class", said[1], problem, "Write a whole number, or leave it out.")
    words: dict[str, Any] = {
        "null_class": said[1] if options.null_class is None else options.null_class,
        "classes": said[0] if options.classes is None else options.classes,
    }
    if vae is None:
        refuse_options(options, "preview_decoder")
        denoiser: UNet2DDenoiser | LatentUNetDenoiser = UNet2DDenoiser(network, prediction, levels, **words)
    else:
        preview_vae = preview_decoder(options, meta=meta, channels=_config(vae).latent_channels)
        denoiser = LatentUNetDenoiser(network, vae, prediction, levels, preview_vae=preview_vae, **words)
    refuse_resolution(denoiser.image_shape[1:], options)
    return denoiser
