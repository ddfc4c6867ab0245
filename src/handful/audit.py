"""Mild transforms that leave what a person sees as it is: a gain that does not survive them was adversarial.

Guidance can please a feature extractor without changing the picture. What it gained that way is brittle: judged again after
a mild transform of real and generated images alike, it is gone (design.md, "Gain, or adversarial gain?").
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from handful.images import from_uint8, to_uint8


def jpeg(images: Tensor, quality: int = 60) -> Tensor:
    """Saves and reads each image as JPEG; (n, 1 or 3, h, w) in [-1, 1] -> the same."""
    out = []
    for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=quality)
        read = np.asarray(Image.open(buffer))
        out.append(torch.from_numpy(np.array(read[..., None] if read.ndim == 2 else read)).permute(2, 0, 1))
    return from_uint8(torch.stack(out)).to(images.device)


def resample(images: Tensor, factor: float = 0.75) -> Tensor:
    """Shrinks by `factor` and brings back to size; (n, c, h, w) in [-1, 1] -> the same."""
    small = [max(1, round(side * factor)) for side in images.shape[-2:]]
    shrunk = interpolate(images, small, mode="bilinear", antialias=True, align_corners=False)
    return interpolate(shrunk, images.shape[-2:], mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def noise(images: Tensor, deviation: float = 0.1, seed: int = 0) -> Tensor:
    """Adds Gaussian noise; (n, c, h, w) in [-1, 1] -> the same."""
    draw = torch.Generator().manual_seed(seed)
    return (images + deviation * torch.randn(images.shape, generator=draw).to(images)).clamp(-1, 1)


TRANSFORMS = {"jpeg": jpeg, "resample": resample, "noise": noise}
