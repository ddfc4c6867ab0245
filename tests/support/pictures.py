"""Pictures with known values, as files and as tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
GRAYS = COLOURS[..., 0]


def as_image(values) -> torch.Tensor:
    """(H, W) or (H, W, C) in 0..255 -> (C, H, W) by the definition v / 127.5 - 1."""
    return torch.from_numpy(np.atleast_3d(np.asarray(values)).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1


def save(path: Path, picture, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path
