"""The packaged digit classifiers: two small convolutional networks that share an interface and, on purpose, little else.

`plain` (convolutions, batch normalisation, ReLU, average pooling) is the guide; `residual` (pre-activation residual
blocks, group normalisation, GELU, max pooling) is the judge. What fools one need not fool the other.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Architecture = Literal["plain", "residual"]


def _plain_trunk(width: int) -> nn.Sequential:
    """(n, 1, 8, 8) -> (n, 8 * width): three convolutions, the grid halved twice by averaging."""

    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        # The bias would be cancelled by the normalisation's mean.
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, width), *block(width, 2 * width), nn.AvgPool2d(2), *block(2 * width, 2 * width), nn.AvgPool2d(2), nn.Flatten()
    )


class _Residual(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027): x + conv(act(norm(conv(act(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.gelu(self.norm1(x)))
        return x + self.conv2(F.gelu(self.norm2(inner)))


def _residual_trunk(width: int) -> nn.Sequential:
    """(n, 1, 8, 8) -> (n, 4 * width): four residual blocks, the grid halved twice by maxima."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        _Residual(width),
        _Residual(width),
        nn.MaxPool2d(2),
        _Residual(width),
        _Residual(width),
        nn.GroupNorm(4, width),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )


class DigitsClassifier(nn.Module):
    """Says which digit an 8x8 image shows, and gives the features it says it from.

    Args:
        width: channels of the first convolution; a multiple of 4 for `residual`.
        architecture: `plain` or `residual`, see the head of this file.
        feature_size: D, the size of the penultimate layer.
    """

    def __init__(
        self, width: int = 32, *, architecture: Architecture = "plain", feature_size: int = 64, classes: int = 10
    ) -> None:
        super().__init__()
        self.width, self.architecture, self.feature_size, self.classes = width, architecture, feature_size, classes
        if architecture == "plain":
            self.trunk, trunk_size, activation = _plain_trunk(width), 8 * width, nn.ReLU()
        elif architecture == "residual":
            self.trunk, trunk_size, activation = _residual_trunk(width), 4 * width, nn.GELU()
        else:
            raise ValueError(f"architecture {architecture!r} is not known; take 'plain' or 'residual'")
        self.penultimate = nn.Sequential(nn.Linear(trunk_size, feature_size), activation)
        self.head = nn.Linear(feature_size, classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: (n, 1, 8, 8), gray, in [-1, 1] with -1 for the paper and 1 for the ink.

        Returns:
            (n, D), differentiable with respect to the images.
        """
        return self.penultimate(self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 1, 8, 8) in [-1, 1]."""
        return self.head(self.features(images))
