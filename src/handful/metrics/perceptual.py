"""Perceptual distances between images: of features, or LPIPS; one type, so that every measurement takes any of them.

A distance is an embedding of images and the Euclidean distance (or its square) of what is embedded. So n x m pairs cost
n + m evaluations of a network, not n m, and symmetry and zero on itself hold by construction.

    features   |u - v|, u and v the features scaled to length 1: 0 alike, sqrt 2 orthogonal, 2 opposite
    LPIPS      lpips.py; a squared distance

This module needs torch, which the other metrics do not: import it by its own name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, load_extractor
from handful.metrics.lpips import NETWORKS, load_lpips

# Embedded values held at once, float32: 2 GiB. At 256 px an image is 8 M values to VGG's LPIPS, so a cluster of 50 is held.
MOST_VALUES = 1 << 29
# Of one block: what a network and a difference work on.
_BLOCK_VALUES, _MOST_IN_BLOCK = 1 << 26, 64


@dataclass(frozen=True)
class PerceptualDistance:
    """How far apart two images look.

    Attributes:
        name: For tables: no number means anything without it.
        digest: Identifies weights and preprocessing.
        embed: Images (n, c, h, w), float32 in [-1, 1] -> (n, D); without gradients.
        squared: Whether the distance is the embeddings' squared Euclidean distance, not that itself.
    """

    name: str
    digest: str
    embed: Callable[[Tensor], Tensor] = field(repr=False)
    squared: bool = False

    def __call__(self, first: Tensor, second: Tensor) -> np.ndarray:
        """The distances of image i of `first` to image i of `second`.

        Args:
            first, second: Images (n, c, h, w) in [-1, 1], n of each.

        Returns:
            (n,) float64, >= 0.

        Raises:
            RequestError: If they differ in number or shape, or can't be used (`as_images`).
        """
        first, second = as_image_pair(first, second, "first", "second")
        if len(first) != len(second):
            problem = f"this is the number of images, but `first` has {len(first)}"
            raise RequestError("second", len(second), problem, "Give pairs, or ask for `pairs`.")
        blocks = _Embedded(self, second, most_values=0)
        found = [self._measured(a - blocks.block(rows)) for rows, a in _Embedded(self, first, most_values=0).blocks()]
        return np.concatenate(found)

    def pairs(self, first: Tensor, second: Tensor | None = None, *, most_values: int = MOST_VALUES) -> np.ndarray:
        """The distances of all pairs.

        Args:
            first: Images (n, c, h, w) in [-1, 1].
            second: Images (m, c, h, w) of the same shape; None: `first` itself.
            most_values: Embedded values to hold of each set. A set with more is embedded again for every block of the
                other, which changes the time and not the answer.

        Returns:
            (n, m) float64, >= 0; of `first` with itself exactly symmetric, with zeros on the diagonal.

        Raises:
            RequestError: If the sets differ in shape, or can't be used (`as_images`).
        """
        alone = second is None
        first, second = (as_images(first, "first"),) * 2 if second is None else as_image_pair(first, second, "first", "second")
        left = _Embedded(self, first, most_values)
        right = left if alone else _Embedded(self, second, most_values)
        found = np.zeros((len(first), len(second)))
        for rows, a in left.blocks():
            for columns, b in right.blocks(rows.start if alone else 0):
                found[rows, columns] = np.stack([self._measured(b - row) for row in a])
        if alone:
            found = np.triu(found, 1)
            found += found.T
        return found

    def _measured(self, difference: Tensor) -> np.ndarray:
        squares = difference.square_().sum(1)
        return (squares if self.squared else squares.sqrt()).double().cpu().numpy()


class _Embedded:
    """Images and their embeddings: kept where they fit, made again where they do not."""

    def __init__(self, distance: PerceptualDistance, images: Tensor, most_values: int) -> None:
        self.images, self.embed = images, distance.embed
        width = self._made(images[:1]).shape[1]
        self.size = min(_MOST_IN_BLOCK, max(1, _BLOCK_VALUES // max(width, 1)))
        self.kept: dict[int, Tensor] | None = {} if len(images) * width <= most_values else None

    def blocks(self, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the images with their embeddings, from the block that begins at `start`."""
        for first in range(start, len(self.images), self.size):
            rows = slice(first, min(first + self.size, len(self.images)))
            yield rows, self.block(rows)

    def block(self, rows: slice) -> Tensor:
        if self.kept is None:
            return self._made(self.images[rows])
        if rows.start not in self.kept:
            self.kept[rows.start] = self._made(self.images[rows])
        return self.kept[rows.start]

    @torch.no_grad()
    def _made(self, images: Tensor) -> Tensor:
        return self.embed(images).float()


def feature_distance(extractor: FeatureExtractor, *, unit: bool = True) -> PerceptualDistance:
    """Euclidean distance of an extractor's features: DINOv2's, a classifier's, pixels.

    Args:
        extractor: Any; it is asked on its own device.
        unit: Scale features to length 1 first, which makes it sqrt(2 - 2 cos), in [0, 2]. False: as they are.

    Raises:
        RequestError: From the distance, for an image of all-zero features where they are scaled: they have no direction.
    """

    def embed(images: Tensor) -> Tensor:
        weights = next(extractor.network.parameters(), images)
        features = extractor(images.to(weights.device))
        if not unit:
            return features
        norms = features.norm(dim=1, keepdim=True)
        if not norms.all():
            problem = f"their {extractor.name} features are all zero and have no direction"
            remedy = "Drop these images, or take another extractor."
            raise RequestError("images", f"{int((norms == 0).sum())} of {len(images)}", problem, remedy)
        return features / norms

    suffix = "" if unit else ", not scaled"
    digest = hashlib.sha256(f"{extractor.digest} {unit}".encode()).hexdigest()
    return PerceptualDistance(extractor.name + suffix, digest, embed)


def lpips_distance(network: str, backbone: str | Path, linear: str | Path | None = None) -> PerceptualDistance:
    """LPIPS (Zhang et al., CVPR 2018) with VGG-16 or AlexNet, from weights that the user has.

    Args:
        network: "vgg" or "alex".
        backbone, linear: Files of weights; see `handful.metrics.lpips.load_lpips`.

    Raises:
        RequestError: As `load_lpips`; from the distance, for images too small for the network.
    """
    made = load_lpips(network, backbone, linear)
    return PerceptualDistance(f"lpips-{made.name}", made.digest, made, squared=True)


def load_distance(name: str) -> PerceptualDistance:
    """A distance by name.

    Args:
        name: `lpips-vgg:FILE` or `lpips-alex:FILE`, FILE being torchvision's weights of that network; or the name of an
            extractor that `handful.features.load_extractor` knows: `dinov2`, `digits-judge`, `pixels`, `FILE.py:FUNCTION` ...

    Raises:
        RequestError: If there is no such distance, or its weights can't be used.
    """
    kind, _, file = name.partition(":")
    known = [f"lpips-{network}" for network in NETWORKS]
    if kind == "lpips" or (kind in known and not file):
        network = "vgg" if kind == "lpips" else kind.removeprefix("lpips-")
        remedy = f"Write lpips-{network}:FILE, where FILE is torchvision's {NETWORKS[network].file}."
        raise RequestError("distance", name, "LPIPS needs the weights of its network", remedy)
    if kind in known:
        return lpips_distance(kind.removeprefix("lpips-"), file)
    return feature_distance(load_extractor(name))


def as_images(value: Tensor, name: str) -> Tensor:
    """Checks a set of images; what lies outside [-1, 1] is clamped, as it is when images are saved.

    Args:
        value: Images (n, 1 or 3, h, w), n >= 1, floats in [-1, 1].
        name: The argument's name, for errors.

    Returns:
        Float32, on the device where they were.

    Raises:
        RequestError: Not such a tensor, empty, bytes, NaN or infinite.
    """
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] not in (1, 3):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RequestError(name, shape, "images are a tensor (n, 1 or 3, h, w)", "Give a batch of gray or RGB images.")
    if value.numel() == 0:
        raise RequestError(name, tuple(value.shape), "this set is empty", "Give at least one image.")
    if not value.dtype.is_floating_point:
        raise RequestError(name, value.dtype, "images are floats in [-1, 1]", "Convert them with from_uint8.")
    low, high = (float(end) for end in value.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN anywhere shows in both
        raise RequestError(name, tuple(value.shape), "an image holds NaN or infinite values", "Drop that image.")
    value = value.detach().float()
    return value if low >= -1 and high <= 1 else value.clamp(-1, 1)  # a set may have gigabytes: no copy without need


def as_image_pair(first: Tensor, second: Tensor, first_name: str, second_name: str) -> tuple[Tensor, Tensor]:
    """Checks two sets of images as `as_images` does, and that their images have one shape.

    Raises:
        RequestError: As `as_images`; or one set is gray and the other RGB, or their sizes differ.
    """
    first, second = as_images(first, first_name), as_images(second, second_name)
    if first.shape[1] != second.shape[1]:
        problem = f"this is the number of channels, but `{first_name}` has {first.shape[1]}"
        raise RequestError(second_name, second.shape[1], problem, "Make both gray, or both RGB (read_image does).")
    if first.shape[2:] != second.shape[2:]:
        (h, w), (other_h, other_w) = second.shape[2:], first.shape[2:]
        problem = f"this size differs from that of `{first_name}`, {other_h} x {other_w}"
        raise RequestError(second_name, f"{h} x {w}", problem, "Bring both to one size (read_image does).")
    return first, second
