"""Puts a trained CIFAR-10 model and what goes with it into the package: src/handful/zoo/cifar10.

    python tools/package_cifar10.py --model DIR --data ../shared/data/cifar10 --note "what it took"     better weights
    python tools/package_cifar10.py --only classifiers --classifiers ../shared/models/cifar10-classifiers
    python tools/package_cifar10.py --only features --data ../shared/data/cifar10                       after the classifiers

The first command is all that better weights need: DIR is what tools/train_cifar10.py wrote as --out, any directory of a
diffusers `UNet2DModel` (unet/, scheduler/), or one with config.json, scheduler_config.json and ema.safetensors (or its parts).
The weights become bfloat16; where they were not, it is measured what that changes. Then tools/measure_cifar10.py measures
the model, and the card (README.md) and samples.png are written anew.

`--only features` keeps, of real images, what classifiers see: exemplars.safetensors, the first 32 images of each class in the
order of train.parquet, as guide and judge see them, and the guide with Softplus for ReLU, at full and half size;
real-JUDGE.safetensors, the first 100 of each class of test.parquet, as each judge sees them, as they are and after the audit's
transforms. No image is copied. The self-supervised judge itself is tools/train_judge.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers import UNet2DModel
from measure_cifar10 import DATA_SOURCE, measured_text, picture
from safetensors.torch import load, save
from torch import Tensor

from handful.core.denoiser import Clamped
from handful.core.samplers import dpmpp_2m
from handful.data.exemplars import Exemplars
from handful.data.images import write_atomically
from handful.data.parquet import read_labelled
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError, RunError, first_line
from handful.features.registry import FeatureExtractor, load_extractor
from handful.features.softplus import softened
from handful.files.sealed import seal
from handful.judge.audit import TRANSFORMS
from handful.models import load as load_model
from handful.recipe.plan import ImageNoise
from handful.zoo.cifar10 import CLASSES, CLASSIFIERS, JUDGES, KIND, SIZE, UNTOUCHED, VERSION, probe
from handful.zoo.cifar_resnet import CifarResNet

ZOO = Path(__file__).resolve().parents[1] / "src" / "handful" / "zoo" / "cifar10"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DEPTHS = {"guide": 20, "judge": 56}
SOFTPLUS, REDUCES = 3.0, (1, 2)  # of the guide's smooth views of the exemplars; energy guidance has the first by default
EXEMPLARS, REAL = 32, 100  # of each class
PICTURE = "![Ten classes: eight images without guidance, below them eight with classifier-free guidance](samples.png)"
LICENCE = (
    "The authors of CIFAR-10 state no licence and ask to be cited (Krizhevsky 2009). These are features of images, made "
    "to guide and to judge; they come under handful's licence."
)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The configs of network and scheduler, and the weights.

    Raises:
        RequestError: A file is missing or damaged, or the weights are another network's.
    """
    inside = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = next(
        (path for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json") if path.is_file()),
        folder / "scheduler" / "scheduler_config.json",
    )
    files = [inside / WEIGHTS] if (inside / WEIGHTS).is_file() else [folder / "ema.safetensors"]
    if not files[0].is_file():
        parts = folder.glob("ema.safetensors.part*")
        files = sorted(parts, key=lambda path: int(re.sub(r"\D", "", path.suffix) or 0)) or files
    try:
        network, schedule = (json.loads(path.read_text()) for path in (inside / "config.json", scheduler))
        weights = load(b"".join(path.read_bytes() for path in files))
        made: Any = UNet2DModel.from_config(network)
        made.load_state_dict(weights)
        predicts, labels = schedule["prediction_type"], made.config.num_class_embeds
    except Exception as error:  # safetensors and diffusers raise kinds of their own for damaged files
        problem = f"it is no whole UNet2DModel ({first_line(error)})"
        raise RequestError("--model", folder, problem, "Give the directory that a training wrote.") from error
    if predicts != "v_prediction" or labels != len(CLASSES) + 1:
        problem = f"it predicts {predicts} for {labels} labels, the package's v for {len(CLASSES) + 1}"
        raise RequestError("--model", folder, problem, "Give a model that tools/train_cifar10.py trained.")
    return network, schedule, weights


def install_model(source: Path, zoo: Path) -> str:
    """Writes unet/, scheduler/ and handful.json; a sentence on the rounding."""
    network, schedule, weights = read_model(source)
    held = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    network = {key: value for key, value in network.items() if key != "_name_or_path"}
    outcome = "The weights came as bfloat16, and are as they came."
    install_weights(network, schedule, weights, zoo)
    if held != {"bfloat16"}:
        before = draw(zoo)
        install_weights(network, schedule, {name: value.bfloat16() for name, value in weights.items()}, zoo)
        difference = float((draw(zoo) - before).square().mean().sqrt())
        outcome = (
            f"The weights were rounded from {', '.join(sorted(held))} to bfloat16: 20 images from the same noise differ "
            f"by {127.5 * difference:.2f} of 255 gray levels (root mean square)."
        )
    return outcome


def install_weights(network: dict[str, Any], schedule: dict[str, Any], weights: dict[str, Tensor], zoo: Path) -> None:
    (zoo / "unet").mkdir(parents=True, exist_ok=True)
    write_json(zoo / "unet" / "config.json", network)
    write_json(zoo / "scheduler" / "scheduler_config.json", schedule)
    write_json(zoo / "handful.json", {"classes": list(CLASSES), "null_class": len(CLASSES)})
    held = {name: value.contiguous() for name, value in weights.items()}
    write_atomically(zoo / "unet" / WEIGHTS, save(held, metadata={"format": "pt"}))


@torch.no_grad()
def draw(model: Path) -> Tensor:
    """Two images of each class, from noise that is always the same."""
    denoiser = Clamped(load_model(model))
    labels = torch.arange(10).repeat_interleave(2)
    noise = ImageNoise(range(20), denoiser.shape)
    return dpmpp_2m(denoiser, noise(), denoiser.levels.spacing(18), denoiser.condition(labels))


def install_classifiers(folder: Path, zoo: Path) -> None:
    """guide/ and judge/: the third-party weights, rounded to float16 (running statistics and counters too)."""
    for role, depth in DEPTHS.items():
        file = folder / f"resnet{depth}.safetensors"
        network = CifarResNet(depth)
        try:
            network.load_state_dict(load(file.read_bytes()))
        except Exception as error:
            problem = f"it does not hold a ResNet-{depth} ({error})"
            raise RequestError("--classifiers", file, problem, "Give the folder with resnet20 and resnet56.") from error
        weights = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
        (zoo / role).mkdir(parents=True, exist_ok=True)
        write_atomically(zoo / role / "model.safetensors", save(weights, metadata={"format": "pt"}))
        write_json(zoo / role / "config.json", {"network": {"depth": depth}})


def install_features(data: Path, zoo: Path) -> None:
    """exemplars.safetensors and real-JUDGE.safetensors, and the classifiers' accuracy into their config.json."""
    extractors = {role: load_extractor(f"cifar10-{role}") for role in CLASSIFIERS}
    zoo.mkdir(parents=True, exist_ok=True)
    install_exemplars(data, zoo, extractors)
    install_real(data, zoo, extractors)


@torch.no_grad()
def install_exemplars(data: Path, zoo: Path, extractors: dict[str, FeatureExtractor]) -> None:
    train, _ = read_labelled(data / "train.parquet", channels=3, size=SIZE, limit=EXEMPLARS, field="--data")
    of_class = train.by_class()
    drawn = Exemplars.from_tensors({name: of_class[name] for name in CLASSES})
    kept = ExemplarFeatures.of(
        drawn,
        [extractors[role] for role in DEPTHS],
        licence=LICENCE,
        source=f"{DATA_SOURCE}; the first {EXEMPLARS} images of each class in the order of train.parquet",
    )
    smooth = ExemplarFeatures.of(drawn, [softened(extractors["guide"], SOFTPLUS)], REDUCES)
    kept = replace(kept, features=kept.features | smooth.features, names=kept.names | smooth.names)
    kept.save(zoo / "exemplars.safetensors")


@torch.no_grad()
def install_real(data: Path, zoo: Path, extractors: dict[str, FeatureExtractor]) -> None:
    test, _ = read_labelled(data / "test.parquet", channels=3, size=SIZE, field="--data")
    wanted = torch.tensor([CLASSES.index(name) for name in test.labels])
    for role, depth in DEPTHS.items():
        right = torch.cat([extractors[role].logits(part).argmax(1) for part in test.images.split(250)]) == wanted
        told = {"network": {"depth": depth}, "test_accuracy": round(float(right.double().mean()), 4)}
        write_json(zoo / role / "config.json", told)
    by_class = {name: images[:REAL] for name, images in test.by_class().items()}
    images = torch.cat([by_class[name] for name in CLASSES])
    for role in JUDGES:
        judge = extractors[role]
        tensors = {f"features/{UNTOUCHED}": _seen(judge, images)}
        for name, transform in TRANSFORMS.items():
            tensors |= {f"features/{name}": _seen(judge, transform(images)), f"probe/{name}": transform(probe()).half()}
        settings = {
            "judge": judge.digest,
            "labels": [name for name in CLASSES for _ in range(REAL)],
            "source": f"{DATA_SOURCE}; the first {REAL} images of each class in the order of test.parquet",
            "licence": LICENCE,
        }
        write_atomically(zoo / f"real-{role}.safetensors", seal(KIND, VERSION, settings, tensors))


def _seen(extractor: Any, images: Tensor) -> Tensor:
    return torch.cat([extractor(part) for part in images.split(250)]).half()


def write_card(zoo: Path, sections: dict[str, str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in the card."""
    card = (zoo / "README.md").read_text(encoding="utf-8")
    for name, text in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        card, found = pattern.subn(lambda match, text=text: match[1] + text.strip() + "\n" + match[2], card)
        if found != 1:
            raise RunError(f"the card {zoo / 'README.md'} has no section <!-- {name} -->")
    write_atomically(zoo / "README.md", card.encode())


def trained_text(zoo: Path, source: Path, note: str, rounding: str) -> str:
    """What the card says of the weights: size, how they were trained, the curve."""
    denoiser: Any = load_model(zoo)
    parameters = sum(each.numel() for each in denoiser.network.parameters())
    size = (zoo / "unet" / WEIGHTS).stat().st_size
    lines = [f"{parameters:,} parameters, {size / 1e6:.1f} MB. {note.strip()} {rounding}"]
    if (log := source / "log.csv").is_file():
        rows = [line.split(",") for line in log.read_text().split()[1:]]
        chosen = sorted({round(place * (len(rows) - 1) / 9) for place in range(10)}) if rows else []
        lines += ["", "| step | loss |", "|---|---|", *(f"| {rows[place][0]} | {rows[place][2]} |" for place in chosen)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="directory of the trained model")
    add("--data", type=Path, help="folder with train.parquet and test.parquet")
    add("--classifiers", type=Path, help="folder with resnet20.safetensors and resnet56.safetensors")
    add("--note", default="", help="how the model was trained, for the card")
    add("--only", choices=("model", "classifiers", "features"), default="model", help="what to install (default: model)")
    add("--per-class", type=int, default=100, help="images of each class to measure (default: %(default)s)")
    given = parser.parse_args(arguments)
    wanted = {"model": ("model", "data"), "classifiers": ("classifiers",), "features": ("data",)}[given.only]
    try:
        for name in wanted:
            if getattr(given, name) is None:
                raise RequestError(f"--{name}", None, "it is needed", f"Give --{name} DIR.")
        if given.only == "classifiers":
            install_classifiers(given.classifiers, ZOO)
        elif given.only == "features":
            install_features(given.data, ZOO)
        else:
            rounding = install_model(given.model, ZOO)
            print(rounding, file=sys.stderr, flush=True)
            text, made = measured_text(ZOO, given.data, given.per_class)
            picture(made, ZOO / "samples.png")
            text = f"{PICTURE}\n\n{text}"
            write_card(ZOO, {"trained": trained_text(ZOO, given.model, given.note, rounding), "measured": text})
    except (RequestError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
