"""LPIPS without torchvision: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", Zhang et al., CVPR 2018.

    d(x, y) = sum over layers l:  mean over places:  sum over channels c:  w_lc (f_lc(x) - f_lc(y))^2

f: a network's activations after five of its ReLUs, scaled to length 1 over the channels at each place; w >= 0: what was
learned from people's judgements (version 0.1). With e = f sqrt(w / places) it is |e(x) - e(y)|^2, so an image is embedded once.

The backbone's weights are the user's: torchvision's VGG-16 or AlexNet. The learned weights, some kilobytes, come with
torchmetrics. torchmetrics' own LPIPS asks for torchvision, which handful does without.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from handful.errors import RequestError, first_line
from handful.files.digests import weights_digest

# The network's input in [-1, 1] is brought to ImageNet's mean and deviation.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _vgg16() -> list[nn.Module]:
    """VGG-16 as far as its last ReLU; the places in the list are torchvision's, `features.N`."""
    layers: list[nn.Module] = []
    before = 3
    for stage, (convolutions, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return layers


def _alexnet() -> list[nn.Module]:
    """AlexNet (the one-tower version) as far as its last ReLU."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ]


@dataclass(frozen=True)
class _Network:
    taps: tuple[int, ...]  # layers after which LPIPS looks
    widths: tuple[int, ...]  # channels there
    smallest: int  # pixels a side below which pooling leaves nothing
    file: str  # torchvision's


NETWORKS = {
    "vgg": _Network((3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16, "vgg16-397923af.pth"),
    "alex": _Network((1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31, "alexnet-owt-7be5be79.pth"),
}


class Lpips(nn.Module):
    """The embedding whose squared Euclidean distance is LPIPS; its weights are random until they are loaded (`load_lpips`).

    Args:
        name: "vgg" (VGG-16) or "alex" (AlexNet).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self._network = name, NETWORKS[name]
        self.features = nn.Sequential(*(_vgg16() if name == "vgg" else _alexnet()))
        self.linear = nn.ParameterList([torch.rand(width) / width for width in self._network.widths])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """Identifies network and weights."""
        return hashlib.sha256(f"lpips {self.name} {weights_digest(self)}".encode()).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1 or 3, h, w) in [-1, 1], gray ones repeated -> (n, D); D grows with the size: 8 M at 256 px for VGG.

        Raises:
            RequestError: If the images are too small for the network.
        """
        smallest = self._network.smallest
        if min(images.shape[-2:]) < smallest:
            problem = f"LPIPS with {self.name} needs images of at least {smallest} x {smallest} pixels"
            remedy = "Use the features of an extractor as the distance, such as a classifier of such images."
            raise RequestError("images", f"{images.shape[-2]} x {images.shape[-1]}", problem, remedy)
        x = (images.to(self.shift).expand(-1, 3, -1, -1) - self.shift) / self.scale
        embedded = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self._network.taps:
                weight = self.linear[len(embedded)].div(x.shape[2] * x.shape[3]).sqrt().view(1, -1, 1, 1)
                embedded.append((x / (x.norm(dim=1, keepdim=True) + 1e-10) * weight).flatten(1))
        return torch.cat(embedded, 1)


def load_lpips(network: str, backbone: str | Path, linear: str | Path | None = None) -> Lpips:
    """Loads LPIPS from files of weights (`.safetensors`, or `.pth` read as tensors alone: no code in them is run).

    Args:
        network: "vgg" or "alex".
        backbone: torchvision's weights of VGG-16 or AlexNet, or any file that has them as `features.N.weight` and `.bias`.
        linear: The learned weights, `lin0.model.1.weight` to `lin4.model.1.weight`; None: those that come with torchmetrics
            (version 0.1).

    Raises:
        RequestError: If there is no such network or file, a file can't be read as tensors, lacks a weight or has it in
            another shape, or a learned weight is negative.
    """
    if network not in NETWORKS:
        raise RequestError("network", network, "LPIPS is not available with this network", "Use vgg or alex.")
    made = Lpips(network)
    convolutions = {f"features.{key}": tuple(value.shape) for key, value in made.features.state_dict().items()}
    lines = {f"lin{place}.model.1.weight": (1, len(weight), 1, 1) for place, weight in enumerate(made.linear)}
    file = NETWORKS[network].file
    learned = Path(linear) if linear is not None else _of_torchmetrics(network)
    held = _weights(learned, lines, "linear", "Give a file of LPIPS 0.1 for the same network, or leave it out.")
    held |= _weights(Path(backbone), convolutions, "backbone", f"Give torchvision's {file}.")
    for key in lines:
        if (held[key] < 0).any():
            problem = f"{key} has negative values, but LPIPS' weights are never negative"
            raise RequestError("linear", str(learned), problem, "Give a file of LPIPS 0.1, or leave it out.")
    state = {key: held[key].float() for key in convolutions}
    made.load_state_dict(state | {f"linear.{place}": held[key].float().flatten() for place, key in enumerate(lines)})
    return made


def _of_torchmetrics(network: str) -> Path:
    """The learned weights in torchmetrics' folder; importing it would take seconds."""
    found = importlib.util.find_spec("torchmetrics")
    folders = (found.submodule_search_locations if found else None) or []
    for folder in folders:
        file = Path(folder, "functional", "image", "lpips_models", f"{network}.pth")
        if file.is_file():
            return file
    problem = "this version of torchmetrics has no learned LPIPS weights"
    raise RequestError("linear", None, problem, "Give the file of these weights (lin0.model.1.weight ...).")


def _weights(file: Path, wanted: Mapping[str, tuple[int, ...]], field: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file by name, all of `wanted` among them with these shapes."""
    if not file.is_file():
        raise RequestError(field, file, "there is no such file", remedy)
    try:
        if file.suffix == ".safetensors":
            held = load_file(file)
        else:  # torchvision's older files are no zip archives, and can't be mapped
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # both readers raise many kinds for damaged files
        raise RequestError(field, file, f"it can't be read as tensors alone ({first_line(error)[:120]})", remedy) from error
    if not isinstance(held, Mapping):
        raise RequestError(field, file, f"it holds a {type(held).__name__}, not named tensors", remedy)
    missing = [key for key in wanted if not isinstance(held.get(key), Tensor)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(field, file, f"it lacks {missing[0]}{more}", remedy)
    for key, shape in wanted.items():
        if tuple(held[key].shape) != shape:
            problem = f"its {key} has the shape {tuple(held[key].shape)}, not {shape}"
            raise RequestError(field, file, problem, remedy)
    return {key: held[key] for key in wanted}
