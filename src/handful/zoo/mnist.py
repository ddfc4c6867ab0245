"""The user's side of the packaged `mnist`: real digits of other people, at the model's size.

scikit-learn's `load_digits`, 8 x 8 (see `handful.zoo.digits`), resized to 20 x 20 and padded to 28 x 28, as MNIST's are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from handful.zoo.digits import CLASSES as CLASSES
from handful.zoo.digits import DigitsSplit, split_indices

SIZE = (28, 28)
POOL_PER_CLASS = 90


def at_mnist_size(images: Tensor) -> Tensor:
    """Digits (n, 1, h, w) in [-1, 1], -1 paper, -> (n, 1, 28, 28): bilinear to 20 x 20, four pixels of paper around."""
    return pad(interpolate(images, (20, 20), mode="bilinear", antialias=True, align_corners=False), (4,) * 4, value=-1.0)


def as_digits(images: Tensor) -> Tensor:
    """Back to 8 x 8: (n, 1, 28, 28) -> (n, 1, 8, 8); differentiable."""
    return interpolate(images[..., 4:24, 4:24], (8, 8), mode="bilinear", antialias=True, align_corners=False)


def load_uci_split() -> DigitsSplit:
    """The UCI digits, split once: `train_`, a pool to draw exemplars from (90 of each class, 900), and `test_` (897).

    No download: the installed scikit-learn carries them.
    """
    from sklearn.datasets import load_digits  # takes a second to import: only when asked for

    pixels, targets = (np.asarray(values) for values in load_digits(return_X_y=True))
    images = at_mnist_size(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1)
    labels = torch.from_numpy(targets).long()
    pool, test = (torch.from_numpy(part) for part in split_indices(targets, POOL_PER_CLASS))
    return DigitsSplit(images[pool], labels[pool], images[test], labels[test])
