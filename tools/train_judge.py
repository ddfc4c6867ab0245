"""Trains the packaged judge of photographs that is unrelated to the guides: a small transformer, without labels.

    python tools/train_judge.py --data ../shared/data/cifar10/train.parquet --out simclr        20 minutes on one core

SimCLR (Chen et al. 2020, arXiv 2002.05709): two random views of every image (crop, mirror, colours, gray), and the network has
to tell which two belong together among all of a batch (NT-Xent). Labels enter afterwards only, into a linear layer on frozen
features that lets the judge name classes. Same seed, data and threads: same weights on a CPU. OUT becomes model.safetensors
(float16), config.json and log.csv; copied to src/handful/zoo/cifar10/simclr it is `cifar10-simclr`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from handful.data.augmentation import random_view
from handful.data.images import write_atomically
from handful.data.parquet import read_labelled
from handful.errors import RequestError
from handful.zoo.cifar_vit import MEAN, STD, CifarViT

WIDTH, DEPTHS = 128, (1, 4)
TEMPERATURE = 0.2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--data", required=True, help="training images: a parquet file, or a folder with a folder per class")
    add("--test", help="test images, to measure the linear layer by")
    add("--out", required=True, type=Path, help="a new directory")
    add("--steps", type=int, default=1600, help="of the optimizer (default: %(default)s)")
    add("--batch", type=int, default=256, help="images a step, two views of each (default: %(default)s)")
    add("--rate", type=float, default=2e-3, help="highest learning rate of AdamW (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    return made


def nt_xent(one: Tensor, other: Tensor) -> Tensor:
    """Cross entropy of finding an image's other view among all views of the batch but itself."""
    both = F.normalize(torch.cat([one, other]), dim=1)
    logits = both @ both.T / TEMPERATURE
    logits.fill_diagonal_(float("-inf"))
    n = len(one)
    return F.cross_entropy(logits, torch.arange(2 * n).roll(n))


def normalised(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the network takes them."""
    return ((images + 1) / 2 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def train(
    images: Tensor, steps: int, batch: int, rate: float, seed: int, say: Callable[[str], None]
) -> tuple[CifarViT, list[tuple[int, float]]]:
    """Learns features of images (n, 3, 32, 32) in [-1, 1] without labels; the network, and the loss along the way."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the weights'
    network = CifarViT(WIDTH, DEPTHS)
    head = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH // 2))
    parameters = [p for name, p in network.named_parameters() if not name.startswith("linear")] + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.95, 0.98), weight_decay=0.05)
    # it moves beta1 too, from 0.95 to 0.85 and back, as the learning rate rises and falls
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    log, total, began = [], 0.0, time.monotonic()
    for step in range(1, steps + 1):
        picked = images[torch.randint(len(images), (batch,), generator=draw)]
        pair = normalised(torch.cat([random_view(picked, draw), random_view(picked, draw)]))
        loss = nt_xent(*head(network.features(pair)).chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0 or step == steps:
            log.append((step, total / (step - (log[-1][0] if log else 0))))
            total = 0.0
            left = (time.monotonic() - began) / step * (steps - step)
            say(f"step {step} of {steps}, loss {log[-1][1]:.3f}, {left:.0f} s left")
    return network.eval(), log


@torch.no_grad()
def features(network: CifarViT, images: Tensor) -> Tensor:
    return torch.cat([network.features(normalised(part)) for part in images.split(500)])


def fit_linear(network: CifarViT, seen: Tensor, labels: Tensor) -> None:
    """Logistic regression on frozen features, by L-BFGS; their scale is folded into the layer."""
    mean, spread = seen.mean(0), seen.std(0)
    inputs, layer = (seen - mean) / spread, nn.Linear(seen.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(inputs), labels) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]  # the stub wants a float
    with torch.no_grad():
        layer.bias -= (layer.weight * (mean / spread)).sum(1)
        layer.weight /= spread
    network.linear = layer


def read(source: str, field: str, classes: list[str] | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Images in [-1, 1], labels, and what these are called."""
    found, named = read_labelled(source, channels=3, size=(32, 32), field=field)
    places = {name: place for place, name in enumerate(classes or named)}
    if unknown := [name for name in named if name not in places]:
        raise RequestError(field, source, f"no training image is of class '{unknown[0]}'", "Give images of the same classes.")
    return found.images, torch.tensor([places[name] for name in found.labels]), named


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
            raise RequestError("--out", given.out, "it is a file, or not empty", "Choose a new directory.")
        for name, least in (("steps", 20), ("batch", 2)):
            if getattr(given, name) < least:
                raise RequestError(f"--{name}", getattr(given, name), "it is too small", f"Give {least} or more.")
        images, labels, classes = read(given.data, "--data")
        test = read(given.test, "--test", classes) if given.test else None
        network, log = train(
            images, given.steps, given.batch, given.rate, given.seed, lambda text: print(text, file=sys.stderr, flush=True)
        )
        fit_linear(network, features(network, images), labels)
        told = {
            "network": {"width": WIDTH, "depths": DEPTHS, "classes": len(classes)},
            "steps": given.steps,
            "batch": given.batch,
            "seed": given.seed,
        }
        if test is not None:
            right = network.linear(features(network, test[0])).argmax(1) == test[1]
            told["test_accuracy"] = round(float(right.double().mean()), 4)
        given.out.mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
        write_atomically(given.out / "model.safetensors", save(weights, metadata={"format": "pt"}))
        write_atomically(given.out / "config.json", (json.dumps(told, indent=2) + "\n").encode())
        write_atomically(given.out / "log.csv", ("step,loss\n" + "".join(f"{s},{loss:.5f}\n" for s, loss in log)).encode())
        print(json.dumps(told))
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
