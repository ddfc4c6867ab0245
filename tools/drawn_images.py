"""What a training's model draws, and how good that is by real images; see train_cifar10.py.

A classifier learns from the real training images, once, and is kept in OUT/judge.safetensors. It says how many of the drawn
images it names as asked, and its features give their Frechet distance to the real test images: as many real training images
against these would be the floor, which is measured beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from training_data import Data

from handful.core.denoiser import Clamped
from handful.core.samplers import dpmpp_2m
from handful.data.images import write_atomically
from handful.judge.utility import SmallClassifier, train_classifier
from handful.metrics import frechet
from handful.models import load as load_model
from handful.recipe.plan import ImageNoise, image_seed

SAMPLING_STEPS, AT_ONCE = 18, 50
JUDGE, MEASURED = "judge.safetensors", "measured.csv"
WIDTH, GROUPS, JUDGE_STEPS, JUDGE_BATCH = 16, 8, 1500, 128


@torch.no_grad()
def draw(out: Path, classes: list[str], each: int, device: torch.device) -> dict[str, Tensor]:
    """`each` images of each class, as `handful generate` with the same seed draws them without guidance."""
    denoiser = Clamped(load_model(out).to(device))
    levels, drawn = denoiser.levels.spacing(SAMPLING_STEPS), {}
    for label, name in enumerate(classes):
        parts = []
        for places in torch.arange(each).split(AT_ONCE):
            noise = ImageNoise([image_seed(0, name, place) for place in places.tolist()], denoiser.shape, device)
            x0 = dpmpp_2m(denoiser, noise(), levels, denoiser.condition([label] * len(places)))
            parts.append(x0.clamp(-1, 1).float().cpu())
        drawn[name] = torch.cat(parts)
    return drawn


def measured(out: Path, drawn: dict[str, Tensor], train: Data, test: Data, flip: bool, images: int) -> dict[str, Any]:
    """A row of measured.csv: of the drawn images (by class), after so many images of training."""
    network = _judge(out, train, flip)
    labels = torch.arange(len(drawn)).repeat_interleave(torch.tensor([len(of) for of in drawn.values()]))
    made_answers, made = _seen(network, torch.cat(list(drawn.values())))
    test_answers, real = _seen(network, _unit(test.images))
    some = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[: len(made)]
    again = _seen(network, _unit(train.images[some]))[1]
    row = {
        "images": images,
        "named_right": round(float((made_answers == labels).double().mean()), 4),
        "test_images_named_right": round(float((test_answers == test.labels.cpu()).double().mean()), 4),
        "frechet": round(float(frechet(real, made)), 4),
        "frechet_of_as_many_real": round(float(frechet(real, again)), 4),
    }
    file = out / MEASURED
    before = file.read_text() if file.is_file() else ",".join(row) + "\n"
    write_atomically(file, (before + ",".join(map(str, row.values())) + "\n").encode())
    return row


def _judge(out: Path, train: Data, flip: bool) -> SmallClassifier:
    channels, classes, file = train.images.shape[1], len(train.classes), out / JUDGE
    network, of = SmallClassifier(channels, classes, WIDTH, GROUPS), out / f"{JUDGE}.json"
    told = json.dumps([train.digest(), flip, WIDTH, GROUPS, JUDGE_STEPS, JUDGE_BATCH])
    if file.is_file() and of.is_file() and of.read_text() == told:
        network.load_state_dict(load(file.read_bytes()))
        return network.eval()
    trained = train_classifier(
        _unit(train.images),
        train.labels.cpu(),
        classes,
        steps=JUDGE_STEPS,
        batch=JUDGE_BATCH,
        flip=flip,
        width=WIDTH,
        groups=GROUPS,
    )
    write_atomically(file, save(trained.state_dict()))
    write_atomically(of, told.encode())
    network.load_state_dict(trained.state_dict())
    return network.eval()


@torch.no_grad()
def _seen(network: SmallClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (n,) and features (n, D)."""
    features = torch.cat([network.body(part) for part in images.split(500)])
    return network.head(features).argmax(1), features


def _unit(images: Tensor) -> Tensor:
    return images.cpu().float() / 127.5 - 1
