"""Feature extractors: images (n, c, h, w) in [-1, 1] -> features (n, D), differentiable.

One contract for guidance, evaluation and copying checks: resizing and normalisation happen in torch, inside, so that a
gradient flows through and guide and judge see what they were trained on. A number is only as good as its extractor:
`digest` identifies weights and preprocessing and is written beside every feature and every result.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from handful.digests import weights_digest
from handful.errors import RequestError


class FeatureExtractor(nn.Module):
    """Any torch module as an extractor.

    Args:
        name: What to call it in tables and recipes.
        network: Called on normalised images (n, channels, *size), returns features (n, ...), flattened to (n, D).
        channels: 1 or 3, what the network takes; gray images are repeated, colour ones are brought to luma. None takes
            images as they come.
        size: (h, w) that the network takes; None takes images as they come.
        mean, std: Of the network's training images in [0, 1], one number a channel; None feeds [-1, 1] as it is.
        features: Called instead of the network itself, where its own answer is not the features.
        classify: The network's logits (n, classes) from the same input, where it is a classifier.
    """

    def __init__(
        self, name: str, network: nn.Module, *, channels: int | None = 3, size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
        features: Callable[[Tensor], Tensor] | None = None, classify: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("give mean and std together, or neither")
        if mean is not None and std is not None and (len(mean) != len(std) or len(mean) != (channels or len(mean))):
            raise ValueError(f"give one mean and one std a channel: {len(mean)} and {len(std)} for {channels} channels")
        self.name, self.channels, self.size = name, channels, size
        self.network = network.eval().requires_grad_(False)
        self._features, self._classify = features or network, classify
        self.mean, self.std = mean, std
        self.digest = self._digest()

    def prepare(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> what the network takes; float32 or the images' float64."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise RequestError("images", tuple(images.shape), "features are taken of (n, 1 or 3, h, w)",
                               "Pass a batch of gray or RGB images in [-1, 1].")  # fmt: skip
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()
        channels = self.channels or images.shape[1]
        if images.shape[1] < channels:
            images = images.expand(-1, channels, -1, -1)
        elif images.shape[1] > channels:
            luma = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (images * luma).sum(1, keepdim=True)
        if self.size and images.shape[-2:] != torch.Size(self.size):
            images = interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        if self.mean is None or self.std is None:
            return images
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> features (n, D)."""
        return self._features(self.prepare(images)).flatten(1)

    @property
    def is_classifier(self) -> bool:
        return self._classify is not None

    def logits(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> logits (n, classes).

        Raises:
            RequestError: If this extractor is not a classifier.
        """
        if self._classify is None:
            raise RequestError("features", self.name, "this extractor has no class logits",
                               "Use a classifier, such as digits-judge.")  # fmt: skip
        return self._classify(self.prepare(images))

    def _digest(self) -> str:
        # repr holds the structure, so that a ReLU made a Softplus, which has no weights, is another extractor
        answer = getattr(self._features, "__qualname__", type(self._features).__qualname__)
        told = [repr(self.network), answer, self.channels, self.size, self.mean, self.std, weights_digest(self.network)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Pooled(nn.Module):
    """A transformers model that answers with its pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).pooler_output


def pixels() -> FeatureExtractor:
    """The images themselves, flattened: the plainest features, and the identity of every test."""
    return FeatureExtractor("pixels", nn.Identity(), channels=None)


def from_transformers(name: str) -> FeatureExtractor:
    """DINOv2, CLIP vision or any transformers vision model with a pooled output, by directory or hub name.

    Size, mean and std come from its preprocessor_config.json; the resizing is ours (differentiable), so values differ
    slightly from those of the model's own image processor.

    Raises:
        RequestError: If it can't be loaded, or says no size.
    """
    from transformers import AutoConfig, AutoModel, CLIPVisionModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        clip = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type.startswith("clip")
        loaded: Any = (CLIPVisionModel if clip else AutoModel).from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Give a directory that save_pretrained wrote, a hub name in the hub's cache, or pixels, which needs neither."
        raise RequestError("features", name, f"transformers can't load it ({first})", remedy) from error
    model, info = loaded
    if info["missing_keys"]:  # transformers fills them at random, and warns
        missing = info["missing_keys"]
        raise RequestError("features", name, f"{len(missing)} of its weights are missing, first {min(missing)}",
                           "Save the model again with save_pretrained, or name another one.")  # fmt: skip
    size: Any = said.get("crop_size") or said.get("size") or {}
    sides: dict[str, Any] = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    height, width = (sides.get("shortest_edge") or sides.get(side) for side in ("height", "width"))
    if not height or not width:
        raise RequestError("features", name, "its preprocessor_config.json says no size",
                           "Wrap it in a handful.features.FeatureExtractor that states one.")  # fmt: skip
    mean, std = said.get("image_mean", [0.5] * 3), said.get("image_std", [0.5] * 3)
    return FeatureExtractor(name, _Pooled(model), size=(height, width), mean=tuple(mean), std=tuple(std))


def from_file(path: Path, attribute: str) -> FeatureExtractor:
    """Runs a Python file of the user's and calls `attribute` in it, which must return a `FeatureExtractor`.

    The file's own content counts into the digest: code can change features that no weight tells of.

    Raises:
        RequestError: If there is no such file, it fails, or gives something else.
    """
    spec = importlib.util.spec_from_file_location(f"handful_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise RequestError("features", f"{path}:{attribute}", "there is no such Python file",
                           "Write FILE.py:FUNCTION with the path of an existing file.")  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, attribute, None)
        made = made() if callable(made) and not isinstance(made, nn.Module) else made
    except Exception as error:  # whatever the user's own code raises
        raise RequestError("features", f"{path}:{attribute}", f"running it failed ({type(error).__name__}: {error})",
                           f"Mend {path}: python {path} shows where.") from error  # fmt: skip
    if not isinstance(made, FeatureExtractor):
        raise RequestError("features", f"{path}:{attribute}", "it gives no handful.features.FeatureExtractor",
                           "Name a function of that file without arguments that returns one.")  # fmt: skip
    made.digest = hashlib.sha256(made.digest.encode() + path.read_bytes()).hexdigest()
    return made


def load_extractor(name: str) -> FeatureExtractor:
    """Loads an extractor by name.

    Args:
        name: `digits-guide` or `digits-judge` (packaged), `pixels`, `dinov2` (ViT-B/14), `dinov2-large`, `clip`, a
            directory or hub name for transformers, or `FILE.py:FUNCTION` (runs that file) for one's own.

    Raises:
        RequestError: If there is no such extractor.
    """
    if name == "pixels":
        return pixels()
    if name in ("digits-guide", "digits-judge"):
        from handful.zoo.digits import load_digits_classifier

        network = load_digits_classifier("guide" if name == "digits-guide" else "judge")
        return FeatureExtractor(name, network, channels=1, size=(8, 8), features=network.features, classify=network)
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return from_file(Path(path), attribute)
    if name.endswith(".py"):
        raise RequestError("features", name, "which function of the file is not said", f"Write {name}:FUNCTION.")
    near = difflib.get_close_matches(name, known := [*PACKAGED, *TRANSFORMERS], n=1, cutoff=0.8)
    if near and name not in known and not Path(name).exists():
        raise RequestError("features", name, "there is no such extractor", f"Did you mean '{near[0]}'?")
    return from_transformers(TRANSFORMERS.get(name, name))


PACKAGED = ("pixels", "digits-guide", "digits-judge")
TRANSFORMERS = {
    "dinov2": "facebook/dinov2-base",
    "dinov2-large": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14",
}
