"""LPIPS: equal to its formula and to torchmetrics' own with the same weights; its files are checked by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.lpips as peer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu

from handful.errors import RequestError
from handful.metrics.lpips import NETWORKS, Lpips, load_lpips
from handful.metrics.perceptual import PerceptualDistance, load_distance, lpips_distance

# What each network does, written out once more: (torchvision's place of the convolution, stride, padding), pooling between.
VGG = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
ALEX = [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]


def images(n: int, side: int, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def state_of(name: str) -> dict[str, Tensor]:
    """torchvision-like weights, random, with a part that LPIPS does not need."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"features.{key}": value for key, value in Lpips(name).features.state_dict().items()}
    return {**state, "classifier.0.weight": torch.zeros(2, 2)}


def lines_of(name: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        f"lin{place}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw)
        for place, width in enumerate(NETWORKS[name].widths)
    }


@pytest.fixture(scope="module", params=["vgg", "alex"])
def named(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def state(named: str) -> dict[str, Tensor]:
    return state_of(named)


@pytest.fixture(scope="module")
def files(named: str, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both kinds of files: a pickle of the backbone, safetensors of the learned weights."""
    folder = tmp_path_factory.mktemp(named)
    torch.save(state, folder / "backbone.pth")
    save_file(lines_of(named), folder / "linear.safetensors")
    return folder / "backbone.pth", folder / "linear.safetensors"


@pytest.fixture(scope="module")
def distance(named: str, files: tuple[Path, Path]) -> PerceptualDistance:
    return lpips_distance(named, *files)


def activations(name: str, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    state = {key: value.double() for key, value in state.items()}
    x, seen = x.double(), []
    for stage in range(5):
        if name == "vgg":
            x = max_pool2d(x, 2) if stage else x
            for place in VGG[stage]:
                x = relu(conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1))
        else:
            place, stride, padding = ALEX[stage]
            x = max_pool2d(x, 3, 2) if stage in (1, 2) else x
            x = relu(conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], stride, padding))
        seen.append(x)
    return seen


def direct(name: str, state: dict[str, Tensor], lines: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The formula of the paper, layer by layer and place by place, in float64."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for layer, (a, b) in enumerate(zip(activations(name, state, x), activations(name, state, y), strict=True)):
        a, b = (one / (one.square().sum(1, keepdim=True).sqrt() + 1e-10) for one in (a, b))
        weight = lines[f"lin{layer}.model.1.weight"].double()
        total += ((a - b).square() * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("side", [32, 47])
def test_lpips_is_its_formula(named: str, state: dict[str, Tensor], distance: PerceptualDistance, side: int):
    x, y = images(3, side, 0), images(3, side, 1)
    wanted = direct(named, state, lines_of(named), x, y)
    assert wanted.min() > 1e-4, "random networks tell random images apart"
    np.testing.assert_allclose(distance(x, y), wanted, rtol=1e-5)


def test_lpips_is_torchmetrics_own_with_its_learned_weights(
    named: str, state: dict[str, Tensor], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    # torchmetrics takes its networks from torchvision: it is given the same layers and weights, and its own code does the rest
    layers = Lpips(named).features
    layers.load_state_dict({key.removeprefix("features."): value for key, value in state.items() if "features" in key})
    monkeypatch.setattr(peer, "_get_tv_model_features", lambda net, pretrained=False: nn.Sequential(*layers))
    theirs = peer._LPIPS(pretrained=True, net=named)
    x, y = images(3, 48, 0), images(3, 48, 1)
    np.testing.assert_allclose(lpips_distance(named, files[0])(x, y), theirs(x, y).flatten(), rtol=2e-5)


def test_lpips_is_zero_on_itself_and_symmetric(distance: PerceptualDistance):
    found = distance.pairs(images(4, 32))
    assert (np.diag(found) == 0).all()
    assert (found == found.T).all()
    assert (found[~np.eye(4, dtype=bool)] > 0).all()
    np.testing.assert_allclose(distance.pairs(images(4, 32), most_values=0), found, rtol=1e-5)


def test_gray_images_are_measured_as_colour_ones(distance: PerceptualDistance):
    x, y = images(2, 32, 0, 1), images(2, 32, 1, 1)
    np.testing.assert_allclose(distance(x, y), distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)), rtol=1e-6)


def test_weights_decide_the_digest_and_the_kind_of_file_does_not(named: str, files: tuple[Path, Path], tmp_path: Path):
    save_file(state_of(named), tmp_path / "backbone.safetensors")
    assert lpips_distance(named, tmp_path / "backbone.safetensors", files[1]).digest == load_lpips(named, *files).digest
    assert load_distance(f"lpips-{named}:{files[0]}").digest != load_lpips(named, *files).digest


def test_an_image_too_small_for_the_network_is_refused_and_the_smallest_is_measured(named: str, distance: PerceptualDistance):
    smallest = NETWORKS[named].smallest
    assert distance(images(1, smallest, 0), images(1, smallest, 1))[0] > 0
    with pytest.raises(RequestError, match=f"at least {smallest} x {smallest} pixels"):
        distance(images(1, smallest - 1), images(1, smallest - 1))


def test_missing_weights_are_named(named: str, state: dict[str, Tensor], files: tuple[Path, Path], tmp_path: Path):
    file = tmp_path / "weights.pth"
    torch.save({key: value for key, value in state.items() if key != "features.10.bias"}, file)
    with pytest.raises(RequestError, match=r"^backbone: .*weights.pth': it lacks features.10.bias\. Give torchvision's"):
        load_lpips(named, file)
    lines = lines_of(named)
    torch.save({key: value for key, value in lines.items() if key[3] in "024"}, file)
    with pytest.raises(RequestError, match=r"^linear: .*: it lacks lin1.model.1.weight and 1 more"):
        load_lpips(named, files[0], file)
    torch.save({**lines, "lin3.model.1.weight": -lines["lin3.model.1.weight"]}, file)
    with pytest.raises(RequestError, match=r"^linear: .*lin3.model.1.weight has negative values"):
        load_lpips(named, files[0], file)


def test_weights_of_another_network_are_refused_by_shape(files: tuple[Path, Path], named: str, tmp_path: Path):
    other = "alex" if named == "vgg" else "vgg"
    torch.save(lines_of(other), tmp_path / "other.pth")
    with pytest.raises(RequestError, match=r"^linear: .*its lin1.model.1.weight has the shape"):
        load_lpips(named, files[0], tmp_path / "other.pth")


class Bomb:
    def __reduce__(self) -> tuple:
        return print, ("code ran",)


def test_files_that_hold_no_tensors_are_refused_and_no_code_in_them_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"features.0.weight": Bomb()}, tmp_path / "code.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name in ("code.pth", "damaged.safetensors", "list.pth", "missing.pth"):
        with pytest.raises(RequestError, match=f"^backbone: .*{name}"):
            load_lpips("alex", tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"^network: 'squeeze'"):
        load_lpips("squeeze", tmp_path / "list.pth")
