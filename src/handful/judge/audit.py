"""Mild transforms that a person hardly sees: a gain that does not survive them was adversarial.

Guidance can please a feature extractor without changing the picture. What it gained that way is brittle: judged again after
a mild transform of real and generated images alike, it is gone (docs/findings.md, section 4). Each takes another
kind: JPEG and noise what is faint, resampling and the low-pass what is fine.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from handful.data.images import from_uint8, to_uint8


def jpeg(images: Tensor, quality: int = 60) -> Tensor:
    """Saves and reads each image as JPEG; (n, 1 or 3, h, w) in [-1, 1] -> the same."""
    out = torch.empty_like(images)
    for place, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
        buffer = io.BytesIO()
        pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        read = np.array(Image.open(buffer))
        out[place] = from_uint8(torch.from_numpy(read[..., None] if read.ndim == 2 else read).permute(2, 0, 1))
    return out


def resample(images: Tensor, factor: float = 0.75) -> Tensor:
    """Shrinks by `factor` and brings back to size; (n, c, h, w) in [-1, 1] -> the same."""
    small = [max(1, round(side * factor)) for side in images.shape[-2:]]
    shrunk = interpolate(images, small, mode="bilinear", antialias=True, align_corners=False)
    return interpolate(shrunk, images.shape[-2:], mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def noise(images: Tensor, deviation: float = 0.1, seed: int = 0, draw: torch.Generator | None = None) -> Tensor:
    """Adds Gaussian noise; (n, c, h, w) in [-1, 1] -> the same. `draw` goes on where an earlier part of a set ended."""
    draw = draw or torch.Generator().manual_seed(seed)
    return torch.randn(images.shape, generator=draw).to(images).mul_(deviation).add_(images).clamp_(-1, 1)


def lowpass(images: Tensor, deviation: float = 0.7) -> Tensor:
    """Blurs with a Gaussian, reflecting at the borders; (n, c, h, w) in [-1, 1] -> the same.

    It takes the finest patterns, which JPEG keeps and can even amplify: at 0.7 pixels a checkerboard to 1/30, lines one
    pixel wide to 1/6. Four deviations of the Gaussian are kept, less where an image is smaller.
    """
    for axis in (2, 3):
        reach = min(round(4 * deviation), images.shape[axis] - 1)  # reflection needs one pixel more than it reaches
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
        weights = (weights / weights.sum()).to(images)
        border = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        padded, side = pad(images, border, mode="reflect"), images.shape[axis]
        images = padded.narrow(axis, 0, side) * weights[0]
        for offset in range(1, len(weights)):  # a tenth of the time that conv2d takes with a kernel per channel
            images.add_(padded.narrow(axis, offset, side), alpha=float(weights[offset]))
    return images.clamp(-1, 1)  # against rounding alone


_CACHED = 1 << 20  # values that a processor's cache holds: large images pass one by one
TRANSFORMS = {"jpeg": jpeg, "resample": resample, "noise": noise, "lowpass": lowpass}


class Views:
    """The transforms of a set that comes part by part: the same numbers as of the whole set at once.

    Only noise is random. Its draws for a part follow those for all parts before it, also where these were left out.
    """

    def __init__(self) -> None:
        self._draw, self._drawn = torch.Generator().manual_seed(0), 0

    def __call__(self, name: str, images: Tensor, start: int) -> Tensor:
        """A part under a transform; `start` is the place of its first image, and grows from call to call.

        Parts must be multiples of 16 values, but the last: torch draws normal numbers in blocks of so many.
        """
        if TRANSFORMS[name] is not noise:
            few = max(1, _CACHED // images[0].numel())
            return torch.cat([TRANSFORMS[name](some) for some in images.split(few)])
        if start < self._drawn:  # another set, or the same from the start
            self.__init__()
        while self._drawn < start:
            count = min(16, start - self._drawn)
            torch.randn((count, *images.shape[1:]), generator=self._draw)
            self._drawn += count
        self._drawn += len(images)
        return noise(images, draw=self._draw)
