"""The packaged CIFAR-10: two off-the-shelf classifiers, a self-supervised judge, and of the real images features alone.

No image of the data set is in the package. The exemplars are `cifar10/exemplars.safetensors` (`handful.data.shared_exemplars`),
what each judge saw of real test images is `cifar10/real-JUDGE.safetensors`. How they were made: `tools/package_cifar10.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from handful.errors import RequestError
from handful.files.sealed import unseal
from handful.zoo import zoo_path
from handful.zoo.cifar_resnet import CifarResNet
from handful.zoo.cifar_vit import CifarViT

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSIFIERS = {"guide": CifarResNet, "judge": CifarResNet, "simclr": CifarViT}
JUDGES = ("judge", "simclr")
SIZE = (32, 32)
KIND, VERSION = "real features", 1
UNTOUCHED = "as is"
_REMEDY = "The package is damaged: install it again."


def load_cifar10_classifier(name: str) -> CifarResNet | CifarViT:
    """A packaged classifier, in evaluation mode and with its weights frozen.

    Args:
        name: `guide` (ResNet-20) to steer with; `judge` (ResNet-56) to measure with, of the guide's family; `simclr`, a
            transformer that learned its features without labels, for claims. See the cards.

    Returns:
        The classifier of normalised images: logits, and `features(images)` for the pooled last stage.

    Raises:
        RequestError: There is no such classifier.
    """
    if name not in CLASSIFIERS:
        raise RequestError("classifier", name, "is not a packaged classifier", f"Use one of: {', '.join(CLASSIFIERS)}.")
    folder = zoo_path("cifar10") / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classifier = CLASSIFIERS[name](**config["network"])
    classifier.load_state_dict(load_file(folder / "model.safetensors"))  # float16 on the disk
    return classifier.requires_grad_(False).eval()


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """What a judge saw of real images.

    Attributes:
        features: By view, `UNTOUCHED` and the transforms of `handful.judge.audit`, (n, D) float32.
        probes: By transform, what it makes of `probe()`: if it makes something else today, its view is out of date.
        source: Where the images come from.
    """

    judge: str
    labels: list[str]
    features: dict[str, Tensor]
    probes: dict[str, Tensor]
    source: str


def load_real_features(judge: str = "judge") -> RealFeatures:
    """The packaged features of real test images, 100 of each class.

    Raises:
        RequestError: The file is damaged.
    """
    settings, tensors = unseal(zoo_path("cifar10") / f"real-{judge}.safetensors", KIND, VERSION, field="real", remedy=_REMEDY)
    parts: dict[str, dict[str, Tensor]] = {"features": {}, "probe": {}}
    for key, value in tensors.items():
        part, _, view = key.partition("/")
        parts[part][view] = value.float()
    return RealFeatures(settings["judge"], list(settings["labels"]), parts["features"], parts["probe"], settings["source"])


def probe() -> Tensor:
    """One made-up picture (1, 3, 32, 32) in [-1, 1], smooth with one edge, to recognise a transform by."""
    ramp = torch.linspace(-1, 1, 32)
    picture = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp[:, None] * ramp])
    picture[:, 8:20, 12:24] *= -0.5
    return picture[None]
