"""diffusers' `UNet2DModel`: DDPM-style networks in pixel space, unconditional or with class labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from handful.core.denoiser import Condition, NetworkDenoiser, Prediction
from handful.core.noise import Schedule
from handful.errors import RequestError, first_line
from handful.models.labels import label_condition, set_labels
from handful.models.options import ModelOptions, refuse_options, refuse_resolution
from handful.models.pipelines import on_meta, remedy
from handful.models.schedulers import schedule_of
from handful.models.source import Source

UNUSED = ("negative_prompt", "embedded_guidance", "without", "preview_decoder", "config", "variant", "trust_pickle")


class UNet2DDenoiser(NetworkDenoiser):
    """A `UNet2DModel` as a denoiser.

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
        config: Any = network.config
        side = config.sample_size
        if side is None:
            raise RequestError(
                "model",
                "sample_size",
                "the UNet's config does not say its resolution",
                "Write sample_size into its config.json.",
            )
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise RequestError(
                "model",
                f"out_channels {config.out_channels}",
                "the UNet predicts neither the image alone nor image and variance",
                "Use a UNet2DModel with as many output as input channels, or twice as many.",
            )
        height, width = (side, side) if isinstance(side, int) else side
        super().__init__(network, prediction, (config.in_channels, height, width), levels)
        set_labels(self, config.num_class_embeds or 0, classes, null_class)

    null_may_be_unsaid: bool = True  # diffusers' config has no field for it; other families say whether they have one

    def condition(self, labels: Sequence[int] | Sequence[str] | Tensor) -> Condition:
        return label_condition(self, labels)

    @property
    def label_embeddings(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return () if network.class_embedding is None else (network.class_embedding,)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, time, class_labels=condition.labels, return_dict=False)[0]


def skeleton(source: Source, options: ModelOptions) -> UNet2DDenoiser:
    """The denoiser without its weights, from the configs alone: on the meta device."""
    refuse_options(options, *UNUSED)
    config = source.read_json(f"{_inside(source)}config.json")
    return _denoiser(on_meta("UNet2DModel", config or {}), source, options)


def load(source: Source, options: ModelOptions) -> UNet2DDenoiser:
    """Loads a model with `unet/` and `scheduler/`, or a UNet's own with its `scheduler_config.json` beside.

    A `handful.json` beside them may say `{"classes": [names], "null_class": label}`.

    Raises:
        RequestError: If a file is missing, damaged, or does not fit the others.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    skeleton(source, options)  # what the configs can tell is said before the weights are read
    inside = _inside(source)
    try:
        if source.folder:
            where = source.folder / inside
            words: dict[str, Any] = {"use_safetensors": any(where.glob("*.safetensors")) or None}
        else:
            where, words = source.name, {"subfolder": inside.rstrip("/"), "revision": source.revision}
        # cast afterwards, diffusers would warn of modules to keep in float32 even where it names none
        loaded: Any = UNet2DModel.from_pretrained(where, output_loading_info=True, torch_dtype=options.dtype, **words)
    except Exception as error:  # diffusers raises many kinds for a damaged file; all mean the same to the user
        raise RequestError("model", source.name, f"it can't be loaded ({first_line(error)})", remedy(source)) from error
    network, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        raise RequestError(
            "model",
            str(where),
            f"its weights don't fit its config ({len(wrong)} tensors, first {wrong[0]})",
            "Copy config.json and weights from the same checkpoint.",
        )
    return _denoiser(network, source, options)


def _inside(source: Source) -> str:
    return "unet/" if source.read_json("unet/config.json") is not None else ""


def _denoiser(network: nn.Module, source: Source, options: ModelOptions) -> UNet2DDenoiser:
    told = source.read_json("scheduler/scheduler_config.json") or source.read_json("scheduler_config.json")
    if told is None:
        raise RequestError(
            "model",
            source.name,
            "there is no scheduler_config.json, so its noise levels are unknown",
            "Copy the pipeline's scheduler/ folder beside unet/.",
        )
    levels, prediction = schedule_of(told)
    notes = source.read_json("handful.json") or {}
    said = notes.get("classes", []), notes.get("null_class")
    if not isinstance(said[0], list) or not all(isinstance(name, str) for name in said[0]):
        raise RequestError(
            "classes",
            said[0],
            f"the handful.json of '{source.name}' does not hold a list of names there",
            'Write {"classes": ["name of label 0", ...]}.',
        )
    if said[1] is not None and type(said[1]) is not int:  # JSON's true is an int to isinstance
        raise RequestError(
            "null_class",
            said[1],
            f"the handful.json of '{source.name}' does not hold a label there",
            "Write a whole number, or leave it out.",
        )
    denoiser = UNet2DDenoiser(
        network,
        prediction,
        levels,
        null_class=said[1] if options.null_class is None else options.null_class,
        classes=said[0] if options.classes is None else options.classes,
    )
    refuse_resolution(denoiser.shape[1:], options)
    return denoiser
