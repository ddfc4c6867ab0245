"""Test images as other cameras and hands would give them: the shifts that downstream accuracy is tested under.

Four corruptions (after Hendrycks & Dietterich 2019, arXiv 1903.12261, stronger than the audit's mild transforms) and one
natural shift that keeps the class: what stands in the middle, photographed from nearer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from handful.judge.audit import jpeg, lowpass, noise


def contrast(images: Tensor, factor: float = 0.4) -> Tensor:
    """Every image nearer to its own mean gray."""
    middle = images.mean((1, 2, 3), keepdim=True)
    return middle + factor * (images - middle)


def crop(images: Tensor, share: float = 0.75) -> Tensor:
    """The middle of every image, brought back to its size."""
    height, width = images.shape[-2:]
    high, wide = round(share * height), round(share * width)
    top, left = (height - high) // 2, (width - wide) // 2
    middle = images[..., top : top + high, left : left + wide]
    return interpolate(middle, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "blur": lambda images: lowpass(images, 1.2),
    "noise": lambda images: noise(images, 0.25),
    "contrast": contrast,
    "JPEG": lambda images: jpeg(images, 15),
    "crop": crop,
}


def shifted(images: Tensor) -> dict[str, Tensor]:
    """Images (n, 3, h, w) in [-1, 1], as they are and shifted, by name."""
    with torch.no_grad():
        return {"as is": images, **{name: shift(images) for name, shift in SHIFTS.items()}}
