"""Held-out digits in two halves, one to be the reference and one to be judged, in memory and as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from handful.data.images import write_png
from handful.zoo.digits import load_digits_split


class Halves:
    """The held-out digits, one half to be the reference and one to be judged."""

    def __init__(self) -> None:
        split = load_digits_split()
        even, odd = (torch.arange(start, len(split.test_labels), 2) for start in (0, 1))
        self.images, self.labels = split.test_images[even], [str(int(v)) for v in split.test_labels[even]]
        self.others, self.others_labels = split.test_images[odd], [str(int(v)) for v in split.test_labels[odd]]


def value(number: float | None) -> float:
    assert number is not None
    return number


def write(root: Path, images: Tensor, labels: list[str], per_class: int = 25) -> Path:
    counts: dict[str, int] = {}
    for image, label in zip(images, labels, strict=True):
        index = counts.get(label, 0)
        if index < per_class:
            (root / label).mkdir(parents=True, exist_ok=True)
            write_png(root / label / f"{index:04}.png", image)
        counts[label] = index + 1
    return root


def some(halves: Halves, start: int, stop: int, classes: str = "0123456789") -> tuple[Tensor, list[str]]:
    """Real digits `start` to `stop` of each class, of the half that is judged."""
    rows = [i for c in classes for i in [j for j, label in enumerate(halves.others_labels) if label == c][start:stop]]
    return halves.others[rows], [halves.others_labels[i] for i in rows]
