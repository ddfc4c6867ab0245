"""Downstream accuracy: train a small classifier on one set of images, test it on real ones. The arbiter of synthetic data.

The classifier is deliberately ordinary (a VGG-like stack trained by AdamW under a one-cycle rate), the same for every set
that is compared: what differs is the data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from handful.errors import RequestError, counted

Augment = Callable[[Tensor, torch.Generator], Tensor]


class SmallClassifier(nn.Module):
    """Convolutions in three stages, each halving the image, pooled to a 2 x 2 grid: (n, c, h, w) -> logits (n, classes).

    Args:
        channels, classes, width: Of the images; of the answer; of the first stage.
        groups: Normalise each image by itself, in so many groups of channels, instead of by the batch's statistics. These
            break where test images have another contrast or brightness than those that were trained on.
    """

    def __init__(self, channels: int, classes: int, width: int = 32, groups: int | None = None) -> None:
        super().__init__()

        def stage(before: int, after: int) -> list[nn.Module]:
            norm = nn.GroupNorm(groups, after) if groups else nn.BatchNorm2d(after)
            return [nn.Conv2d(before, after, 3, padding=1, bias=False), norm, nn.ReLU()]

        self.body = nn.Sequential(
            *stage(channels, width),
            *stage(width, width),
            nn.MaxPool2d(2),
            *stage(width, 2 * width),
            *stage(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *stage(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(16 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class _Grid(nn.AdaptiveAvgPool2d):
    """Pools to `side` x `side` places; images that have so many pass, which saves a tenth of a training's time."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.shape[-2:] == (self.output_size,) * 2 else super().forward(images)


class LightClassifier(nn.Module):
    """Three strided convolutions with group normalisation: (n, c, h, w) -> logits (n, classes); 28 x 28 is enough for it.

    Trained on images of one contrast and tested on another's, batch normalisation fails: with it 880 of 897 UCI digits were
    called an 8 by a classifier of MNIST's like. It costs a fifth of `SmallClassifier`.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()

        def stage(before: int, after: int, side: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, side, 2, side // 2), nn.ReLU(), nn.GroupNorm(4, after)]

        stages = [*stage(channels, width, 5), *stage(width, 2 * width, 3), *stage(2 * width, 4 * width, 3)]
        self.body = nn.Sequential(*stages, _Grid(4), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(64 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    network: Callable[[int, int], nn.Module] | None = None,
    steps: int = 400,
    batch: int = 64,
    rate: float = 3e-3,
    augment: bool | Augment = True,
    flip: bool = False,
    width: int = 32,
    seed: int = 0,
    weights: Tensor | None = None,
    groups: int | None = None,
    stepped: Callable[[], None] | None = None,
) -> nn.Module:
    """Trains a classifier from scratch; deterministic on CPU for a seed.

    Args:
        images: (n, c, h, w) in [-1, 1].
        labels: int64 (n,), 0 to classes - 1.
        network: Makes the network from channels and classes; None: a `SmallClassifier` of `width`.
        steps: Optimizer steps, the same for every set that is compared, whatever its size.
        batch: Images a step.
        rate: Highest learning rate.
        augment: Shift images at random by up to an eighth of their side; False does not, then only the set's own diversity
            counts. Or what makes other images of a batch, by random draws: `handful.data.augmentation.random_view`.
        flip: Mirror images at random: for photographs, not for digits.
        width: Channels of the first stage.
        seed: Of weights, batches and augmentation.
        weights: (n,), how often each image is drawn, up to a factor; None: all alike.
        groups: As for `SmallClassifier`.
        stepped: Is called after each step.

    Raises:
        RequestError: If there are fewer images than classes, a label is out of range, or there are fewer than 10 steps.
    """
    if steps < 10:  # the one-cycle rate divides by the length of its rise, a fifth of the steps
        raise RequestError("steps", steps, "too few to train a classifier", "Ask for 10 or more; 400 is usual.")
    if len(images) != len(labels):
        problem = f"this is the number of labels, for {counted(len(images), 'image')}"
        raise RequestError("labels", len(labels), problem, "Give one label per image.")
    if len(images) < classes or int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f"labels {int(labels.min())} to {int(labels.max())}" if len(labels) else "no labels"
        problem = f"a classifier of {counted(classes, 'class')} needs labels 0 to {classes - 1}, and images"
        raise RequestError("labels", f"{counted(len(images), 'image')}, {found}", problem, "Give at least one image per class.")
    draw, change = torch.Generator().manual_seed(seed), _shifted if augment is True else augment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights and dropout have no generator of their own
        make = network or partial(SmallClassifier, width=width, groups=groups)
        trained = make(images.shape[1], classes).to(images.device)

        def loss() -> Tensor:
            pick = picked(len(images), batch, draw, weights).to(images.device)
            batch_images = _mirrored(images[pick], draw) if flip else images[pick]
            batch_images = change(batch_images, draw) if change else batch_images
            return cross_entropy(trained(batch_images), labels[pick], label_smoothing=0.05)

        descend(loss, [{"params": list(trained.parameters()), "lr": rate}], steps, stepped)
    return trained.eval()


def descend(
    loss: Callable[[], Tensor], groups: list[dict[str, Any]], steps: int, stepped: Callable[[], None] | None = None
) -> None:
    """AdamW under a one-cycle rate.

    Args:
        loss: Draws a batch, and gives its loss.
        groups: Parameters (`params`) and their highest rate (`lr`).
        steps, stepped: As for `train_classifier`.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        found = loss()
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        optimizer.step()
        schedule.step()
        if stepped:
            stepped()


def picked(count: int, batch: int, draw: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """The places of a batch among `count` images, drawn with replacement; `weights` as for `train_classifier`."""
    if weights is None:
        return torch.randint(count, (batch,), generator=draw)
    return torch.multinomial(weights.cpu().double(), batch, replacement=True, generator=draw)


def _shifted(images: Tensor, draw: torch.Generator) -> Tensor:
    reach = max(1, images.shape[-1] // 8)
    padded = pad(images, (reach,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * reach + 1, (2,), generator=draw).tolist()  # one shift a batch: enough, and no gather
    return padded[..., dy : dy + images.shape[-2], dx : dx + images.shape[-1]]


def _mirrored(images: Tensor, draw: torch.Generator) -> Tensor:
    mirror = torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5
    return torch.where(mirror.to(images.device), images.flip(-1), images)


def numbered(labels: Sequence[str], classes: Sequence[str]) -> Tensor:
    """The place of each label among the classes, int64 (n,)."""
    places = {name: place for place, name in enumerate(classes)}
    return torch.tensor([places[name] for name in labels])


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (n, c, h, w) in [-1, 1] whose largest logit is their label (n,)."""
    hits = [network(x).argmax(1) == y for x, y in zip(images.split(512), labels.split(512), strict=True)]
    return float(torch.cat(hits).double().mean())


def downstream_accuracy(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    steps: int = 400,
    augment: bool = True,
    flip: bool = False,
    width: int = 32,
    seed: int = 0,
) -> float:
    """Accuracy on real test images of a classifier trained on `images` alone. Arguments as for `train_classifier`."""
    classes = int(test_labels.max()) + 1
    network = train_classifier(images, labels, classes, steps=steps, augment=augment, flip=flip, width=width, seed=seed)
    return accuracy(network, test_images, test_labels)
