"""The cases of crdi.py: models, and images of a neighbouring kind that they never saw. Why these, crdi.py says."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

import handful
from handful.core.denoiser import Denoiser
from handful.features.registry import FeatureExtractor, load_extractor
from handful.zoo.digits import load_digits_split

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("HANDFUL_SHARED", HERE.parents[1] / "shared"))
NIGHT = (0.25, 0.3, 0.5)
CARS = 1  # CIFAR-10's label


@dataclass(frozen=True)
class Case:
    """A model and the images of one draw of targets; all images (n, c, h, w) in [-1, 1].

    Attributes:
        judge: An extractor that guides nothing.
        targets: The ten.
        reference, others: Other real images of their kind.
        source: Real images of the model's own kind: `others` without the look.
        n, cohort: Images to generate, and how many of them together.
        noises: Noises to reconstruct each target from.
    """

    name: str
    denoiser: Denoiser
    judge: FeatureExtractor
    targets: Tensor
    reference: Tensor
    others: Tensor
    source: Tensor
    n: int
    cohort: int
    noises: int


def thick(images: Tensor) -> Tensor:
    """Digits written with a pen of 2 x 2 pixels: each pixel the darkest of itself and its neighbours above and to the left."""
    return max_pool2d(pad(images, (1, 0, 1, 0), value=-1.0), 2, 1)


def night(images: Tensor) -> Tensor:
    """Photographs dark and blue: each channel multiplied."""
    return (images + 1) * torch.tensor(NIGHT).view(1, 3, 1, 1) - 1


def digits(seed: int, quick: bool) -> Case:
    split = load_digits_split()
    random = np.random.RandomState(seed)
    order = random.permutation(len(split.test_images))
    classes = split.test_labels.numpy()[order]
    chosen = np.array([np.flatnonzero(classes == label)[0] for label in range(10)])
    rest = np.delete(order, chosen)
    half = len(rest) // 2
    targets, reference, others = (split.test_images[i] for i in (order[chosen], rest[:half], rest[half:]))
    n = 96 if quick else 256
    return Case(
        "digits",
        handful.load("digits"),
        load_extractor("digits-judge"),
        thick(targets),
        thick(reference),
        thick(others[:n]),
        others[:n],
        n,
        32 if quick else 64,
        2,
    )


def cifar10(seed: int, quick: bool) -> Case:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(SHARED / "data/cifar10/test.parquet").read(use_threads=False)
    files = [
        image["bytes"]
        for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
        if label == CARS
    ]
    n = 40 if quick else 100
    order = np.random.RandomState(seed).permutation(len(files))[: 10 + 400 + n]
    read = [np.asarray(Image.open(io.BytesIO(files[i])).convert("RGB")) for i in order]
    images = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 127.5 - 1
    targets, reference, others = images[:10], images[10:410], images[410:]
    return Case(
        "cifar10",
        handful.load(SHARED / "models/cifar10-unet", null_class=10),
        load_extractor(f"{HERE / 'cifar_networks.py'}:resnet56"),
        night(targets),
        night(reference),
        night(others),
        others,
        n,
        20 if quick else 50,
        2,
    )


CASES: dict[str, Callable[[int, bool], Case]] = {"digits": digits, "cifar10": cifar10}
