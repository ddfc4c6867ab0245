"""diffusers' `UNet2DModel`: DDPM-style networks in pixel space, unconditional or with class labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handful.denoiser import Condition, NetworkDenoiser, Prediction
from handful.errors import RequestError
from handful.noise import VP, Flow, Schedule

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


class UNet2DDenoiser(NetworkDenoiser):
    """A `UNet2DModel` as a denoiser.

    Args:
        network: The model; in_channels = out_channels (no learned variance).
        prediction, levels: As its scheduler says; see `schedule_of`.
        classes: Names of its classes by label; empty where unknown.
        null_class: The label that stands for "no class"; None where there is none.
    """

    def __init__(
        self, network: nn.Module, prediction: Prediction, levels: Schedule, *,
        classes: Sequence[str] = (), null_class: int | None = None,
    ) -> None:  # fmt: skip
        config: Any = network.config
        side = config.sample_size
        if side is None:
            raise RequestError("model", "sample_size", "the UNet's config does not say its resolution",
                               "Write sample_size into its config.json.")  # fmt: skip
        if config.in_channels != config.out_channels:
            raise RequestError("model", f"out_channels {config.out_channels}", "the UNet predicts more than the image",
                               "Use a UNet2DModel with as many output as input channels.")  # fmt: skip
        height, width = (side, side) if isinstance(side, int) else side
        super().__init__(network, prediction, (config.in_channels, height, width), levels)
        self.label_count: int = config.num_class_embeds or 0
        if null_class is not None and not 0 <= null_class < self.label_count:
            raise RequestError("null_class", null_class, f"the model's labels are 0 to {self.label_count - 1}"
                               if self.label_count else "the model takes no labels",
                               "Name the label it was trained on for images without a class, or leave it out.")  # fmt: skip
        known = self.label_count - (null_class is not None)
        if classes and len(classes) != known:
            raise RequestError("classes", f"{len(classes)} names", f"the model has {known} classes",
                               "Give one name a class, in the order of the labels, without the null class.")  # fmt: skip
        self.classes, self.null_class = tuple(classes), null_class

    def condition(self, labels: Sequence[int] | Tensor) -> Condition:
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if not self.label_count:
            return Condition(None)
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < self.label_count):
            raise RequestError("labels", labels.unique().tolist(), f"the model's labels are 0 to {self.label_count - 1}",
                               "Ask for classes that the model was trained on.")  # fmt: skip
        device = next(self.network.parameters()).device
        return Condition(labels.to(device), self.null_class)

    def call(self, scaled: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(scaled, time, class_labels=condition.labels, return_dict=False)[0]


def schedule_of(config: dict[str, Any]) -> tuple[Schedule, Prediction]:
    """A diffusers scheduler's config -> the levels that the network was trained on, and what it predicts.

    Raises:
        RequestError: If the scheduler is of a kind that is not known here.
    """
    kind = str(config.get("_class_name", "DDPMScheduler"))
    predicts = config.get("prediction_type", "epsilon")
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    try:
        if kind.startswith("FlowMatch"):
            return Flow(config.get("shift", 1.0), config.get("num_train_timesteps", 1000)), "flow"
        # without betas: variance exploding, or EDM, whose schedulers keep the network's preconditioning (c_skip, c_out,
        # c_in, c_noise) to themselves, so that the raw network is no denoiser; neither is known here
        if predicts in PREDICTIONS and "beta_schedule" in config:
            # diffusers builds the betas, so that every beta_schedule it knows is right by construction
            scheduler: Any = DDPMScheduler.from_config(config)
            return VP(scheduler.alphas_cumprod), PREDICTIONS[predicts]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise RequestError("model", f"{kind}'s config", f"no scheduler can be made of it ({_first_line(error)})",
                           "Copy scheduler_config.json again: it is damaged.") from error  # fmt: skip
    raise RequestError("model", f"{kind} with prediction_type {predicts}", "this scheduler is not known",
                       "Save the model with a DDPMScheduler or DDIMScheduler.")  # fmt: skip


def load_unet2d(folder: Path, *, null_class: int | None = None, classes: Sequence[str] | None = None) -> UNet2DDenoiser:
    """Loads a directory with `unet/` and `scheduler/`, or a UNet's own with its `scheduler_config.json` beside.

    A `handful.json` beside them may say `{"classes": [names], "null_class": label}`.

    Raises:
        RequestError: If a file is missing, damaged, or does not fit the others.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    inside = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    if scheduler is None:
        raise RequestError("model", str(folder), "there is no scheduler_config.json, so its noise levels are unknown",
                           "Copy the pipeline's scheduler/ folder beside unet/.")  # fmt: skip
    levels, prediction = schedule_of(_read_json(scheduler / "scheduler_config.json"))
    notes = _read_json(folder / "handful.json") if (folder / "handful.json").is_file() else {}
    try:
        loaded: Any = UNet2DModel.from_pretrained(
            inside, use_safetensors=any(inside.glob("*.safetensors")) or None, output_loading_info=True
        )
    except Exception as error:  # diffusers raises many kinds for a damaged file; all mean the same to the user
        raise RequestError("model", str(folder), f"it can't be loaded ({_first_line(error)})",
                           "Copy the model again, with its safetensors weights.") from error  # fmt: skip
    network, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        raise RequestError("model", str(inside), f"its weights don't fit its config ({len(wrong)} tensors, first {wrong[0]})",
                           "Copy config.json and weights from the same checkpoint.")  # fmt: skip
    said = notes.get("classes", []), notes.get("null_class")
    if not isinstance(said[0], list) or not all(isinstance(name, str) for name in said[0]):
        raise RequestError("classes", said[0], f"{folder / 'handful.json'} does not hold a list of names there",
                           'Write {"classes": ["name of label 0", ...]}.')  # fmt: skip
    if said[1] is not None and type(said[1]) is not int:  # JSON's true is an int to isinstance
        raise RequestError("null_class", said[1], f"{folder / 'handful.json'} does not hold a label there",
                           "Write a whole number, or leave it out.")  # fmt: skip
    return UNet2DDenoiser(network, prediction, levels, null_class=said[1] if null_class is None else null_class,
                          classes=said[0] if classes is None else classes)  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise RequestError("model", str(path), f"it can't be read ({_first_line(error)})",
                           "Copy the model again: the file is damaged.") from error  # fmt: skip
    return held


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
