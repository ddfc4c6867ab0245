"""The off-the-shelf CIFAR-10 classifiers of ../shared/models as feature extractors, for `--features FILE.py:FUNCTION`.

The network is `handful.zoo.cifar_resnet.CifarResNet`; resnet20 and resnet56 are also in the package, rounded to float16, as
`cifar10-guide` and `cifar10-judge`. The weights are akamaster/pytorch_resnet_cifar10's (BSD-2-Clause).
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from handful.features.registry import FeatureExtractor
from handful.zoo.cifar_resnet import MEAN, STD, CifarResNet

WEIGHTS = Path(os.environ.get("HANDFUL_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "models/cifar10-classifiers"


def load_resnet(depth: int) -> CifarResNet:
    """Loads resnet20, 32, 44 or 56; the folder is ../shared or $HANDFUL_SHARED."""
    network = CifarResNet(depth)
    network.load_state_dict(load_file(WEIGHTS / f"resnet{depth}.safetensors"))
    return network.eval()


def _extractor(depth: int) -> FeatureExtractor:
    network = load_resnet(depth)
    return FeatureExtractor(
        f"resnet{depth}", network, size=(32, 32), mean=MEAN, std=STD, features=network.features, classify=network
    )


def resnet20() -> FeatureExtractor:
    return _extractor(20)


def resnet56() -> FeatureExtractor:
    return _extractor(56)
