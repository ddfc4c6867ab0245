"""The feature extractor: any torch module behind one contract. The names that load one are in `features.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from handful.core.ranges import check_images
from handful.errors import RequestError
from handful.files.digests import weights_digest


class FeatureExtractor(nn.Module):
    """Any torch module as an extractor.

    Args:
        name: What to call it in tables and recipes.
        network: Called on normalised images (n, channels, *size), returns features (n, ...), flattened to (n, D).
        channels: 1 or 3, what the network takes; gray images are repeated, colour ones are brought to luma. None takes
            images as they come.
        size: (h, w) that the network takes; None takes images as they come.
        mean, std: Of the network's training images in [0, 1], one number a channel; None feeds [-1, 1] unchanged.
        features: Called instead of the network itself, where its own answer is not the features.
        classify: The network's logits (n, classes) from the same input, where it is a classifier.
        head: In the place of `classify`: the logits from the features, so that a judge that wants both runs the network once.
        classes: What a classifier calls its classes, by label; empty where that is not known.
        squeeze: As a judge it is given files as torchvision's `Resize(size)` brings them to its size: whole, in bytes.

    Attributes:
        digest: Identifies weights and preprocessing; empty on the meta device, where there are no weights.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        channels: int | None = 3,
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[str] = (),
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("give mean and std together, or neither")
        if mean is not None and std is not None and (len(mean) != len(std) or len(mean) != (channels or len(mean))):
            raise ValueError(
                f"give one mean and one std per channel: {len(mean)} and {len(std)} are given, channels: {channels}"
            )
        self.name, self.channels, self.size, self.classes = name, channels, size, tuple(classes)
        self.network = network.eval()
        for parameter in network.parameters():  # not the module's own requires_grad_, which TorchScript lacks
            parameter.requires_grad_(False)
        self._features, self._classify, self._head = features or network, classify, head
        self.mean, self.std, self.squeeze = mean, std, squeeze
        self.digest = self._digest()

    def prepare(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> what the network takes; float32 or the images' float64.

        Raises:
            RequestError: If they have another shape, or can't be in [-1, 1] (see `handful.core.ranges.check_images`).
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            problem = "images must have the shape (n, 1 or 3, h, w)"
            raise RequestError("images", tuple(images.shape), problem, "Pass a batch of gray or RGB images in [-1, 1].")
        if not images.requires_grad:  # what guidance takes gradients at leaves the range
            check_images(images)
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
        fed, dtype = self._fed(images)
        return self._features(fed).to(dtype).flatten(1)

    @property
    def is_classifier(self) -> bool:
        return self._classify is not None or self._head is not None

    def logits(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) in [-1, 1] -> logits (n, classes).

        Raises:
            RequestError: If this extractor is not a classifier.
        """
        fed, dtype = self._fed(images)
        if self._classify is not None:
            return self._classify(fed).to(dtype)
        if self._head is not None:
            return self._head(self._features(fed)).to(dtype)
        raise RequestError(
            "features", self.name, "this extractor has no class logits", "Use a classifier, such as digits-judge."
        )

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` and `logits` answer, by one run of the network where its logits are a `head` of its features.

        Raises:
            RequestError: If this extractor is not a classifier.
        """
        if self._head is None:
            return self(images), self.logits(images)
        fed, dtype = self._fed(images)
        features = self._features(fed)
        return features.to(dtype).flatten(1), self._head(features).to(dtype)

    def _fed(self, images: Tensor) -> tuple[Tensor, torch.dtype]:
        """Prepared images in the network's own precision, and the one to answer in."""
        prepared = self.prepare(images)
        own = next((one.dtype for one in self.network.parameters() if one.is_floating_point()), prepared.dtype)
        return prepared.to(own), prepared.dtype

    def _digest(self) -> str:
        if any(one.is_meta for one in self.network.parameters()):
            return ""
        # repr holds the structure, so that a ReLU made a Softplus, which has no weights, is another extractor
        answer = getattr(self._features, "__qualname__", type(self._features).__qualname__)
        told = [repr(self.network), answer, self.channels, self.size, self.mean, self.std, weights_digest(self.network)]
        told += ["squeezed"] if self.squeeze else []
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def pixels() -> FeatureExtractor:
    """The images themselves, flattened: the plainest features, and the identity of every test."""
    return FeatureExtractor("pixels", nn.Identity(), channels=None)
