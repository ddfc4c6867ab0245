"""The embedded default's data: real 8x8 handwritten digits, and the packaged classifiers that measure them.

The digits are scikit-learn's `load_digits`: the test part of UCI's "Optical Recognition of Handwritten Digits" (1,797
images, 13 writers, each pixel the count 0..16 of ink in a 4x4 cell). They are split once and for all: 110 of each class
to train and to draw exemplars from, the other 697 (64 to 73 of each class) held out. Writers are in both parts: the data
does not say who wrote which digit.
"""

import json
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from handful.errors import RequestError
from handful.zoo import zoo_path
from handful.zoo.digits_classifier import DigitsClassifier

CLASSES = tuple(str(digit) for digit in range(10))
SPLIT_SEED = 0
TRAIN_PER_CLASS = 110
CLASSIFIERS = ("guide", "judge", "uci-judge")


class DigitsSplit(NamedTuple):
    """The split digits. Images are float32 in [-1, 1], -1 paper and 1 ink; labels are int64 in 0..9."""

    train_images: Tensor  # (1100, 1, 8, 8)
    train_labels: Tensor  # (1100,)
    test_images: Tensor  # (697, 1, 8, 8)
    test_labels: Tensor  # (697,)


def split_indices(labels: np.ndarray, per_class: int = TRAIN_PER_CLASS) -> tuple[np.ndarray, np.ndarray]:
    """Splits by class: of each class, in a random order, the first `per_class` train and the others are held out.

    `RandomState` is what numpy promises never to change, so the split is the same under every version.

    Args:
        labels: (n,), the class of each image.
        per_class: How many of each class train.

    Returns:
        Indices to train on and indices held out, each in ascending order.
    """
    random = np.random.RandomState(SPLIT_SEED)
    orders = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    train = np.sort(np.concatenate([order[:per_class] for order in orders]))
    held_out = np.sort(np.concatenate([order[per_class:] for order in orders]))
    return train, held_out


def load_digits_split() -> DigitsSplit:
    """Reads the digits from the installed scikit-learn (no download) and splits them, always in the same way."""
    from sklearn.datasets import load_digits  # takes a second to import: only when asked for

    pixels, targets = (np.asarray(values) for values in load_digits(return_X_y=True))
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(targets).long()
    train, held_out = (torch.from_numpy(indices) for indices in split_indices(targets))
    return DigitsSplit(images[train], labels[train], images[held_out], labels[held_out])


def typical(images: Tensor, labels: Tensor, share: float = 0.4) -> Tensor:
    """The most typical images of each class: those nearest the class mean, in pixels.

    Args:
        images: (n, c, h, w).
        labels: (n,).
        share: how many of each class, in (0, 1]; rounded to the nearest count, at least one.

    Returns:
        Indices into `images`, in ascending order.

    Raises:
        RequestError: `share` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise RequestError("share", share, "this is not a share of each class", "Give a number above 0, at most 1.")
    chosen = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        flat = images[members].flatten(1).double()
        distances = (flat - flat.mean(0)).square().sum(1)
        count = max(1, round(share * len(members)))
        chosen.append(members[distances.argsort(stable=True)[:count]])
    return torch.cat(chosen).sort().values


def load_digits_classifier(name: Literal["guide", "judge", "uci-judge"]) -> DigitsClassifier:
    """A packaged classifier, in evaluation mode and with its weights frozen.

    Args:
        name: `guide` to steer with, `judge` to measure with, `uci-judge` to measure by `handful.zoo.mnist`'s split (its 8 x 8
            digits are those of `handful.zoo.mnist.as_digits`). Do not measure with the one that steered.

    Returns:
        The classifier: logits, and `features(images)` for the penultimate layer.

    Raises:
        RequestError: there is no such classifier.
    """
    if name not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise RequestError("classifier", name, "is not a packaged classifier", f"Use one of: {known}.")
    folder = zoo_path("digits") / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classifier = DigitsClassifier(**config["network"])
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.requires_grad_(False).eval()
