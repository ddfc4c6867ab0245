"""Feature extractors from transformers: its vision models' pooled outputs, its image classifiers' penultimate layers.

Which of the two follows from the `architectures` in the model's config.json: a `...ForImageClassification` answers with what
its last layer takes, and its logits; everything else with its pooled output. What does not fit is found by running the
network on the meta device, made of its config alone, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from handful.errors import RequestError, first_line
from handful.features.extractor import FeatureExtractor
from handful.models.libraries import check_libraries
from handful.models.source import find_source, hub_is_away

_WRAP = (
    "Name a vision model with a pooled output or an image classifier, or wrap it in a FILE.py:FUNCTION that returns a "
    "handful.features.FeatureExtractor."
)
PACKAGED = "digits-judge (8 x 8 gray digits), uci-judge (28 x 28 gray digits), cifar10-judge (32 x 32 photographs in colour)"
_WITHOUT_A_HUB = (
    f" Without a download: pixels (to guide by), or what is packaged: {PACKAGED}. Name it by --features or --judge."
)
UNREADABLE = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)  # what transformers raises for bad files


class _Pooled(nn.Module):
    """A transformers model that answers with its pooled output."""

    def __init__(self, model: nn.Module, words: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.words = model, dict(words)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, **self.words).pooler_output


class _Penultimate(nn.Module):
    """A transformers classifier that answers with what its last layers take; where there are two, side by side."""

    def __init__(self, model: nn.Module, words: Mapping[str, Any], heads: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.words, self.heads = model, dict(words), heads

    def forward(self, pixel_values: Tensor) -> Tensor:
        taken: list[Tensor] = []
        hooks = [
            self.model.get_submodule(head).register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
            for head in self.heads
        ]
        try:
            self.logits(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([one.flatten(1) for one in taken], 1)

    def logits(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, **self.words).logits


@dataclass(frozen=True)
class Plan:
    """How a model of transformers becomes an extractor: all but its weights.

    Attributes:
        words: Further arguments of the model.
        heads: The layers that give a classifier's logits; none for a pooled output.
    """

    name: str
    kind: Any
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    words: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def extractor(self, model: nn.Module) -> FeatureExtractor:
        shared: dict[str, Any] = {"size": self.size, "mean": self.mean, "std": self.std}
        if not self.heads:
            return FeatureExtractor(self.name, _Pooled(model, self.words), **shared)
        network = _Penultimate(model, self.words, self.heads)
        return FeatureExtractor(self.name, network, classify=network.logits, classes=self.classes, **shared)


def from_transformers(name: str, side: int | None = None) -> FeatureExtractor:
    """DINOv2, DINOv3, CLIP, SigLIP, any vision model with a pooled output, any image classifier of transformers.

    A classifier is what its config.json calls `...ForImageClassification`: its features are what its last linear layer
    takes. Of CLIP and SigLIP only the image half is read.

    Size, mean and std come from its preprocessor_config.json. The resizing is ours, bicubic with antialiasing and
    differentiable: the whole image is brought to the size that the network is fed (`crop_size` where it crops, else `size`),
    and nothing is cut off. transformers' own processor often enlarges a little first and then cuts the centre out (256 -> 224
    keeps 77% of the area), so that values differ from it slightly; an image that is not square is squeezed.

    Args:
        name: A directory that save_pretrained wrote, or a hub name.
        side: Feed the network images of side x side instead; vision transformers interpolate their positions.

    Raises:
        RequestError: If it can't be loaded or fed, or answers with no features.
    """
    check_libraries()
    plan, _ = plan_model(name, read_config(name), None, side)
    return plan.extractor(load_weights(plan.kind, name))


def skeleton_of_transformers(name: str, side: int | None = None) -> FeatureExtractor:
    """`from_transformers` on the meta device, without weights; for the names in `KNOWN` without any file.

    Raises:
        RequestError: As `from_transformers`, where the configs show it.
    """
    check_libraries()
    plan, model = plan_model(name, *known_config(name), side)
    return plan.extractor(model)


def load_weights(kind: Any, name: str) -> Any:
    """A model of transformers in float32, of this class and this directory or hub name.

    Raises:
        RequestError: If it can't be read, or weights are missing.
    """
    try:
        with quietly():
            model, info = kind.from_pretrained(name, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except UNREADABLE as error:
        raise unreadable(name, error) from error
    if info["missing_keys"]:  # transformers fills them at random
        missing = info["missing_keys"]
        problem = f"{len(missing)} of its weights are missing, first {min(missing)}"
        raise RequestError("features", name, problem, "Save the model again with save_pretrained, or name another one.")
    return model


def known_config(name: str) -> tuple[Any, dict[str, Any] | None]:
    """transformers' config, and what is said of the preprocessing (None: look it up); of `KNOWN` models without any file."""
    from transformers import AutoConfig

    config, said = (None, None) if Path(name).is_dir() else KNOWN.get(name, (None, None))
    return AutoConfig.for_model(**config) if config else read_config(name), said


def read_config(name: str) -> Any:
    """transformers' config of a directory or hub name."""
    from huggingface_hub import constants
    from transformers import AutoConfig

    source = find_source(name)
    if source is None or source.file is not None:
        remedy = (
            f"Give pixels, dinov2, clip, efficientnet-lite0, a packaged one ({PACKAGED}), a directory that transformers' "
            "save_pretrained wrote, a hub name such as facebook/dinov2-small, a TorchScript file, or FILE.py:FUNCTION."
        )
        raise RequestError("features", name, "there is no such extractor, file or directory", remedy)
    try:
        config = source.read_json("config.json")
    except RequestError as error:
        packaged = "" if source.folder else _WITHOUT_A_HUB
        if not source.folder and constants.HF_HUB_OFFLINE and not hub_is_away():
            packaged += " HF_HUB_OFFLINE is set: unset it to go online."
        raise RequestError("features", name, error.problem, error.remedy + packaged) from error
    if config is None:
        raise RequestError(
            "features", name, "it holds no config.json", "Give a directory that transformers' save_pretrained wrote."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UNREADABLE as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> RequestError:
    """What to say where transformers can't load something."""
    remedy = "Give a directory that save_pretrained wrote, with safetensors weights" + (
        "." if Path(name).is_dir() else f", or download it into the hub's cache: hf download {name}."
    )
    return RequestError("features", name, f"transformers can't load it ({first_line(error)})", remedy)


def plan_model(name: str, config: Any, said: dict[str, Any] | None, side: int | None) -> tuple[Plan, nn.Module]:
    """The plan, tried on the meta device; and the model on it. `said` of the preprocessing is looked up where it is None."""
    import transformers

    saved_as: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    kind, config, classifier = _kind(name, config)
    saved_as = saved_as if saved_as and isinstance(config, saved_as.config_class) else None
    size, mean, std = _preprocessing(name, _said(name) if said is None else said)
    words = {}
    if side is not None:
        patch = getattr(config, "patch_size", None) or 1
        for one in patch if isinstance(patch, (list, tuple)) else (patch,):
            if side < 1 or side % one:
                near = max(side // one, 1) * one
                problem = f"the side is not a multiple of the network's patch size, {one}"
                raise RequestError("features", f"{name}@{side}", problem, f"Write {name}@{near} or {name}@{near + one}.")
        name, size = f"{name}@{side}", (side, side)
        if "interpolate_pos_encoding" in signature(kind.forward).parameters:
            words["interpolate_pos_encoding"] = True
    called: list[tuple[str, tuple[int, ...]]] = []

    def note(path: str, out: Any) -> None:
        called.append((path, tuple(out.shape)))

    try:
        with torch.device("meta"):
            model: Any = kind(config).eval()
            saved = model if saved_as in (None, kind) else saved_as(config)
        hooks = [
            part.register_forward_hook(lambda _, given, out, path=path: note(path, out))
            for path, part in model.named_modules()
            if isinstance(part, nn.Linear)
        ]
        with torch.no_grad():
            answer = model(pixel_values=torch.zeros(2, 3, *size, device="meta"), **words)
        for hook in hooks:
            hook.remove()
    except Exception as error:  # each of a hundred networks says in its own way what it can't take
        problem = f"a {kind.__name__} can't be run on images of {size[0]} x {size[1]} ({first_line(error)})"
        raise RequestError("features", name, problem, _WRAP) from error
    if not classifier:
        if getattr(answer, "pooler_output", None) is None:
            raise RequestError(
                "features", name, f"a {kind.__name__} has no pooled output and is not an image classifier", _WRAP
            )
        held = tuple(saved.state_dict())
        if any("pooler" in key and not any(one.endswith(key) for one in held) for key in model.state_dict()):
            problem = f"it was saved as a {type(saved).__name__}, without the weights of a pooled output"
            raise RequestError("features", name, problem, _WRAP)
        return Plan(name, kind, size, mean, std, words), model
    last = list(takewhile(lambda call: call[1] == (2, config.num_labels), reversed(called)))
    if not last:
        raise RequestError("features", name, f"no last linear layer of a {kind.__name__} gives its logits", _WRAP)
    classes = tuple(str(config.id2label[label]) for label in range(config.num_labels))
    return Plan(name, kind, size, mean, std, words, tuple(path for path, _ in reversed(last)), classes), model


def _kind(name: str, config: Any) -> tuple[Any, Any, bool]:
    """The class of transformers to load, its config, and whether it is a classifier."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kinds: list[Any] = [getattr(transformers, kind, None) for kind in config.architectures or () if "ForImageClass" in kind]
    vision = getattr(config, "vision_config", None)
    if not kinds and vision is not None and vision.model_type == f"{config.model_type}_vision_model":  # CLIP's image half
        config = vision
    kind = kinds[0] if kinds else MODEL_MAPPING.get(type(config), None)
    if kind is None or isinstance(kind, tuple):
        wanted = next(iter(config.architectures or ()), config.model_type)
        raise RequestError("features", name, f"transformers {transformers.__version__} has no {wanted}", _WRAP)
    if kind.main_input_name != "pixel_values":
        raise RequestError("features", name, f"a {kind.__name__} takes {kind.main_input_name}, not images", _WRAP)
    return kind, config, bool(kinds)


def _said(name: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except UNREADABLE as error:
        raise unreadable(name, error) from error


def _preprocessing(name: str, said: dict[str, Any]) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """Size, mean and std from a preprocessor_config.json."""
    usual = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "rescale_offset": False,
        "include_top": False,
        "do_flip_channel_order": False,
    }
    for key, value in usual.items():
        if key in said and abs(said[key] - value) > 1e-6:
            raise RequestError(
                "features", name, f"its preprocessor_config.json has {key}: {said[key]}, which handful does not support", _WRAP
            )
    crop = said.get("crop_size") if said.get("do_center_crop", True) else None
    size: Any = crop or said.get("size") or {}
    sides: dict[str, Any] = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    height, width = (sides.get("shortest_edge") or sides.get(side) for side in ("height", "width"))
    if not height or not width:
        raise RequestError("features", name, "its preprocessor_config.json has no size", _WRAP)
    if said.get("do_normalize") is False:
        return (height, width), (0.0,) * 3, (1.0,) * 3
    mean, std = said.get("image_mean"), said.get("image_std")
    if mean is None or std is None:
        problem = "its preprocessor_config.json has no image_mean and image_std"
        raise RequestError("features", name, problem, "Add those of its training images to that file.")
    return (height, width), tuple(mean), tuple(std)


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' report of unused weights, which for CLIP are all of its texts'; missing ones are refused here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# --- the well-known ones' configs, so that their cost can be counted without any file ------------------------------------

_IMAGENET = {"size": 224, "image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_OPENAI = {"size": 224, "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
# width, layers, heads (patch, and width of the space shared with texts): Oquab et al. 2023 (arXiv 2304.07193); Radford et al.
# 2021 (arXiv 2103.00020)
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
_CLIP = {
    "base-patch32": (768, 12, 12, 32, 512),
    "base-patch16": (768, 12, 12, 16, 512),
    "large-patch14": (1024, 24, 16, 14, 768),
}
_RESNET = {"50": [3, 4, 6, 3], "101": [3, 4, 23, 3]}  # blocks of each stage: He et al. 2015 (arXiv 1512.03385)


def _vit(kind: str, width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


KNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = (
    {
        f"facebook/{kind.replace('_', '-')}-{name}": (
            _vit(kind, *shape, image_size=518, patch_size=14, use_swiglu_ffn=name == "giant"),
            _IMAGENET,
        )
        for kind in ("dinov2", "dinov2_with_registers")
        for name, shape in _DINOV2.items()
    }
    | {
        f"openai/clip-vit-{name}": (
            _vit(
                "clip_vision_model", *shape, image_size=224, patch_size=patch, intermediate_size=4 * shape[0], projection_dim=d
            ),
            _OPENAI,
        )
        for name, (*shape, patch, d) in _CLIP.items()
    }
    | {
        f"microsoft/resnet-{name}": (
            {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "depths": depths, "num_labels": 1000},
            _IMAGENET,
        )
        for name, depths in _RESNET.items()
    }
)
