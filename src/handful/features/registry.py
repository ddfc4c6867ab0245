"""Feature extractors by name: packaged, of transformers, of TorchScript, of the user's own file."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path

from handful.errors import RequestError, first_line
from handful.features.efficientnet import NAME as EFFICIENTNET
from handful.features.efficientnet import efficientnet_lite0
from handful.features.extractor import FeatureExtractor, pixels
from handful.features.presets import PRESETS
from handful.features.torchscript import from_torchscript
from handful.features.transformers import from_transformers, skeleton_of_transformers
from handful.models.user_code import run_user_file

PACKAGED = ("pixels", "digits-guide", "digits-judge", "uci-judge", "cifar10-guide", "cifar10-judge", "cifar10-simclr")
TRANSFORMERS = {
    "dinov2": "facebook/dinov2-base",
    "dinov2-small": "facebook/dinov2-small",
    "dinov2-large": "facebook/dinov2-large",
    "dinov2-giant": "facebook/dinov2-giant",
    "clip": "openai/clip-vit-large-patch14",
}
OWN = (*PACKAGED, EFFICIENTNET, *PRESETS)  # names that mean no model of transformers
TORCHSCRIPT = (".pt", ".pth", ".ts", ".torchscript")


def from_file(path: Path, attribute: str) -> FeatureExtractor:
    """Runs a Python file of the user's and calls `attribute` in it, which must return a `FeatureExtractor`.

    The file's own content is part of the digest: code can change features while the weights stay the same.

    Raises:
        RequestError: If there is no such file, it fails, or gives something else.
    """
    made = run_user_file(path, attribute, "features")
    if not isinstance(made, FeatureExtractor):
        remedy = "Name a function of that file that takes no arguments and returns one."
        raise RequestError("features", f"{path}:{attribute}", "it does not return a handful.features.FeatureExtractor", remedy)
    made.digest = hashlib.sha256(made.digest.encode() + path.read_bytes()).hexdigest()
    return made


def load_extractor(name: str) -> FeatureExtractor:
    """Loads an extractor by name.

    Args:
        name: `digits-guide`, `digits-judge`, `uci-judge` (a judge of digits at MNIST's size), `cifar10-guide`,
            `cifar10-judge`, `cifar10-simclr` (packaged), `pixels`, `dinov2` (ViT-B/14; `dinov2-small`, `-large`, `-giant`),
            `clip` (ViT-L/14), `efficientnet-lite0` (ImageNet's weights of the extra `photos`), a directory or hub name for
            transformers, `fdd` and `fid` (or `fdd:DIR`, `fid:FILE`) for published metrics (`handful.features.presets`),
            `FILE.pt` for a TorchScript file, or
            `FILE.py:FUNCTION` (runs that file) for one's own. Those of transformers and EfficientNet may end in `@SIDE`, as
            in `dinov2@112`: the network is then fed smaller or larger images than usual, which is cheaper or dearer.

    Raises:
        RequestError: If there is no such extractor, or it can't be used as asked.
    """
    return _extractor(name, meta=False)


def extractor_skeleton(name: str) -> FeatureExtractor:
    """The same extractor on the meta device, to count its cost: of transformers' models no weights are read.

    For `dinov2` (all sizes), `clip` and their kin no file is needed at all.

    Raises:
        RequestError: As `load_extractor`, where the configs show it; or if a file's own network can't be moved there.
    """
    extractor = _extractor(name, meta=True)
    try:
        return extractor.to("meta")
    except Exception as error:  # whatever a network of the user's own raises
        problem = f"it can't be moved to the meta device ({first_line(error)})"
        raise RequestError("features", name, problem, "Predict the cost with another extractor of similar size.") from error


def name_and_side(asked: str) -> tuple[str, int | None]:
    """`dinov2@112` -> dinov2, 112; None where no side is given.

    Raises:
        RequestError: If what follows the @ is no number.
    """
    if Path(asked).exists() or "@" not in asked:
        return asked, None
    name, _, told = asked.rpartition("@")
    if not told.isdecimal():
        raise RequestError("features", asked, "the side after @ is not a number", f"Write {name}@112, or {name}.")
    return name, int(told)


def _extractor(asked: str, *, meta: bool) -> FeatureExtractor:
    name, side = name_and_side(asked)
    path, _, attribute = name.rpartition(":")
    known = [*OWN, *TRANSFORMERS]
    preset, _, given = name.partition(":")
    if side is not None and (name in PACKAGED or preset in PRESETS or path.endswith(".py") or name.endswith(TORCHSCRIPT)):
        raise RequestError(
            "features", asked, "only transformers models and efficientnet-lite0 can take another size", f"Write {name}."
        )
    if preset in PRESETS:
        return PRESETS[preset](given, meta=meta)
    if name == EFFICIENTNET:
        return efficientnet_lite0(side, meta=meta)
    if name == "pixels":
        return pixels()
    if name in ("digits-guide", "digits-judge"):
        from handful.zoo.digits import load_digits_classifier

        network = load_digits_classifier("guide" if name == "digits-guide" else "judge")
        return FeatureExtractor(name, network, channels=1, size=(8, 8), features=network.features, head=network.head)
    if name == "uci-judge":
        from handful.zoo.digits import load_digits_classifier
        from handful.zoo.mnist import as_digits

        judge = load_digits_classifier("uci-judge")
        return FeatureExtractor(
            name, judge, channels=1, size=(28, 28), features=lambda images: judge.features(as_digits(images)), head=judge.head
        )
    if name.startswith("cifar10-") and name in PACKAGED:
        from handful.zoo import cifar10

        network = cifar10.load_cifar10_classifier(name.removeprefix("cifar10-"))
        return FeatureExtractor(
            name,
            network,
            size=cifar10.SIZE,
            mean=network.mean,
            std=network.std,
            features=network.features,
            head=network.linear,
            classes=cifar10.CLASSES,
        )
    if path.endswith(".py"):
        return from_file(Path(path), attribute)
    if name.endswith(".py"):
        raise RequestError("features", name, "the name of a function is missing", f"Write {name}:FUNCTION.")
    if Path(name).is_file() or (name.endswith(TORCHSCRIPT) and not Path(name).is_dir()):
        return from_torchscript(Path(name), "meta" if meta else "cpu")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if near and name not in known and not Path(name).exists():
        raise RequestError("features", name, "there is no such extractor", f"Did you mean '{near[0]}'?")
    return (skeleton_of_transformers if meta else from_transformers)(TRANSFORMERS.get(name, name), side)
