"""What train_cifar10.py learns from: labelled images, and which of them a step sees."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handful.data.images import to_uint8
from handful.data.parquet import read_labelled
from handful.errors import RequestError


@dataclass(frozen=True)
class Data:
    """Images uint8 (n, c, h, w), labels int64 (n,), and what the labels are called."""

    images: Tensor
    labels: Tensor
    classes: list[str]

    def digest(self) -> str:
        state = hashlib.sha256(json.dumps([self.classes, list(self.images.shape)]).encode())
        state.update(self.images.numpy().data)
        state.update(self.labels.numpy().data)
        return state.hexdigest()


def sources(given: argparse.Namespace) -> tuple[str, str | None]:
    """What is trained on, and what is measured by."""
    train, test = (Path(given.data) / f"{part}.parquet" for part in ("train", "test"))
    if not train.is_file():
        return given.data, given.test
    return str(train), given.test or (str(test) if test.is_file() else None)


def read_data(source: str, given: argparse.Namespace, field: str = "--data", classes: Sequence[str] = ()) -> Data:
    found, named = read_labelled(source, channels=given.channels, size=(given.size, given.size), field=field)
    if classes and set(named) != set(classes):
        problem = f"its classes are {', '.join(named[:12])}, and those trained on {', '.join(classes[:12])}"
        raise RequestError(field, source, problem, "Give images of the same classes.")
    place = {name: label for label, name in enumerate(classes or named)}
    return Data(to_uint8(found.images), torch.tensor([place[name] for name in found.labels]), list(place))


class Order:
    """Which images a step sees: one permutation of all after the other, each a function of the seed and its number."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """Indices (batch,) of a step, counted from 0."""
        parts, at, end = [], step * self.batch, (step + 1) * self.batch
        while at < end:
            epoch, first = divmod(at, self.count)
            part = self._permutation_of(epoch)[first : first + end - at]
            parts.append(part)
            at += len(part)
        return torch.cat(parts)

    def _permutation_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            draw = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=draw)
        return self._permutation


def seed_of(seed: int, what: str, number: int) -> int:
    """32 bits, all that torch's CPU generator uses of a seed; no two steps of a training have the same."""
    offset = int.from_bytes(hashlib.blake2b(f"{seed} {what}".encode(), digest_size=4).digest(), "big")
    return (offset + number) % 2**32
