"""Feature extractors from TorchScript files: Inception-v3 for FID, or any scripted or traced network.

What is trusted: a TorchScript archive holds a program in torch's own restricted language and no pickled Python objects, so
nothing of Python is run. But the program may call any operator of torch, some of which read and write files: give only files
from whom you would run a program.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handful.errors import RequestError, first_line
from handful.features.extractor import FeatureExtractor


class _ReturnsFeatures(nn.Module):
    """A detector that gives its features when it is asked for them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, return_features=True)


def from_torchscript(path: Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Loads a TorchScript file; which of two conventions it follows shows in the arguments of its forward.

    - With an argument `return_features`, it is a detector as NVIDIA publishes them for its metrics
      (inception-2015-12-05.pt, with which FID is computed): fed RGB in [0, 255] as floats, not rounded, at the images' own
      size, which it resizes itself; asked for its features.
    - Else it is a network with one argument, fed RGB in [-1, 1] at the images' own size; what it answers is the features.

    The file's content counts into the digest.

    Raises:
        RequestError: If it is no TorchScript file, or can't be called so.
    """
    if not path.is_file():
        raise RequestError("features", str(path), "there is no such file", "Give the path of a TorchScript file.")
    try:
        network: Any = torch.jit.load(path, map_location=device)
        schema = network.forward.schema
    except (RuntimeError, ValueError, AttributeError) as error:  # of a state dict or a pickled module: no constants.pkl
        raise RequestError(
            "features",
            str(path),
            f"it is no TorchScript file that torch can load ({first_line(error)[:120]})",
            "Weights alone are not enough to compute features: save the network with torch.jit.script(network)"
            ".save(...), or wrap it in a FILE.py:FUNCTION.",
        ) from error
    arguments = {argument.name: argument for argument in schema.arguments[1:]}  # the first is self
    needed = [argument for argument in arguments.values() if not argument.has_default_value()]
    if [str(one.type) for one in (*needed, *schema.returns)] != ["Tensor", "Tensor"]:
        problem = f"its forward does not take one tensor of images and return one tensor ({schema})"
        raise RequestError("features", str(path), problem, "Script a module that takes one tensor and returns one.")
    if "return_features" in arguments:
        made = FeatureExtractor(str(path), _ReturnsFeatures(network), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    else:
        made = FeatureExtractor(str(path), network)
    made.digest = hashlib.sha256(made.digest.encode() + path.read_bytes()).hexdigest()
    return made
