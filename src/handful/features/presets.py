"""Judges that people compare by: `fdd` and `fid`, with the networks, the resizing and the normalisation of the published code.

- `fdd`: DINOv2 ViT-L/14 as dgm-eval asks it (Stein et al., NeurIPS 2023, arXiv 2306.04675). The whole image is brought to
  224 x 224 by Pillow's bicubic filter in bytes (torchvision's `Resize((224, 224))`), then normalised by ImageNet's mean and
  standard deviation; the features are the normalised class token. The weights are transformers' (facebook/dinov2-large), the
  positions are interpolated as facebookresearch/dinov2 does, with an offset of 0.1, and not as transformers does.
- `fid`: the Inception network of Heusel et al. 2017 (arXiv 1706.08500) as the TorchScript file that NVIDIA publishes. It is
  given images at their own size, in 0 to 255, and resizes them itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.features.torchscript import from_torchscript
from handful.features.transformers import from_transformers, skeleton_of_transformers
from handful.files.cache import default_cache

DINOV2, SIDE, OFFSET = "facebook/dinov2-large", 224, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION = "inception-2015-12-05.pt"
_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION}"


def fdd(given: str = "", *, meta: bool = False) -> FeatureExtractor:
    """The judge of FDD: (n, 3, h, w) in [-1, 1] -> (n, 1024).

    Args:
        given: Another DINOv2 of transformers, by directory or hub name; "": ViT-L/14.
        meta: On the meta device, without weights.

    Raises:
        RequestError: If it can't be loaded, or is no DINOv2.
    """
    made = (skeleton_of_transformers if meta else from_transformers)(given or DINOV2, SIDE)
    network: Any = made.network
    embeddings = getattr(network.model, "embeddings", None)
    if getattr(network.model.config, "model_type", "") != "dinov2" or embeddings is None:
        problem = "this is not a DINOv2, and FDD compares DINOv2 features"
        raise RequestError(
            "features", f"fdd:{given}", problem, "Name a DINOv2 in transformers' format, or write fdd alone for ViT-L/14."
        )
    grid = SIDE // network.model.config.patch_size
    embeddings.position_embeddings = nn.Parameter(_positions(embeddings.position_embeddings, grid), requires_grad=False)
    name = f"fdd:{given}" if given else "fdd"
    return FeatureExtractor(name, network, size=(SIDE, SIDE), mean=MEAN, std=STD, squeeze=True)


def _positions(held: Tensor, side: int) -> Tensor:
    """Positions (1, 1 + m m, D) for side x side patches, taken at every m / (side + 0.1); transformers takes every m / side."""
    before = round((held.shape[1] - 1) ** 0.5)
    if before == side:
        return held.detach()
    grid = held[:, 1:].detach().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / before
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([held[:, :1].detach(), grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def fid(given: str = "", *, meta: bool = False) -> FeatureExtractor:
    """The judge of FID: (n, 3, h, w) in [-1, 1] -> (n, 2048).

    Args:
        given: NVIDIA's file; "": the one in handful's cache (`CACHE/weights/`), or where NVIDIA's own code keeps it.
        meta: On the meta device.

    Raises:
        RequestError: If the file is not there, or is another network.
    """
    kept = default_cache() / "weights" / INCEPTION
    nvidia = Path("~/.cache/dnnlib/downloads").expanduser()
    file = (
        Path(given).expanduser()
        if given
        else next((each for each in (kept, *nvidia.glob(f"*{INCEPTION}")) if each.is_file()), kept)
    )
    if not file.is_file():
        problem = f"its weights are missing ({file})"
        remedy = f"Download {_URL} to '{kept}', or name your copy: fid:FILE."
        raise RequestError("features", f"fid:{given}" if given else "fid", problem, remedy)
    made = from_torchscript(file, "meta" if meta else "cpu")
    if made.mean is None:  # not asked for features by name
        problem = "it is not NVIDIA's Inception network, whose forward has return_features"
        remedy = f"Download {_URL}. To judge with a network of your own, write {file} without fid:."
        raise RequestError("features", f"fid:{given}", problem, remedy)
    made.name = f"fid:{given}" if given else "fid"
    return made


PRESETS: dict[str, Callable[..., FeatureExtractor]] = {"fdd": fdd, "fid": fid}
