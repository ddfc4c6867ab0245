"""Softplus for every ReLU: against networks in which it is written out by hand, and what is refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.vision import random_images, save_vision_model
from torch import Tensor, nn
from torch.nn import functional

from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, extractor_skeleton, load_extractor
from handful.features.softplus import Softplus, softened
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.extractors import load_for
from handful.zoo import cifar_resnet
from handful.zoo.digits import load_digits_classifier

BETA = 3.0


def by_hand(x: Tensor, beta: float = BETA) -> Tensor:
    """log(1 + exp(beta x)) / beta, by another function of torch's."""
    return torch.logaddexp(torch.zeros_like(x), beta * x) / beta


def six_by_hand(x: Tensor) -> Tensor:
    return by_hand(x) - by_hand(x - 6)


class ByHand(nn.Module):
    def __init__(self, beta: float = BETA) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return by_hand(x, self.beta)


def rewritten(network: nn.Module, beta: float = BETA) -> nn.Module:
    """The network with modules of ours in the place of its ReLU modules."""
    for name, part in network.named_children():
        if isinstance(part, nn.ReLU):
            setattr(network, name, ByHand(beta))
        else:
            rewritten(part, beta)
    return network


class Written(nn.Module):
    """A network whose activations are calls in its forward: what it calls is given."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem, self.body = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 4)
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(self.stem(5 * x))
        return self.head(self.second(out + self.body(out)).mean((2, 3)))


def goes_on_with_x(x: Tensor) -> Tensor:
    """Code that drops what the call in place returns."""
    torch.relu_(x)
    return x


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "F.relu": functional.relu,
    "F.relu_": functional.relu_,
    "F.relu in place": lambda x: functional.relu(x, inplace=True),
    "F.relu by name": lambda x: functional.relu(input=x),
    "F.relu in place by position": lambda x: functional.relu(x, True),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "result dropped": goes_on_with_x,
}
RELU6S: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu6": functional.relu6,
    "F.relu6 in place": lambda x: functional.relu6(x, inplace=True),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.hardtanh": lambda x: functional.hardtanh(x, 0.0, 6.0),
    "F.hardtanh_": lambda x: functional.hardtanh_(x, min_val=0, max_val=6),
    "nn.Hardtanh": nn.Hardtanh(0, 6, inplace=True),
}


def extractor_of(network: nn.Module, **words: Any) -> FeatureExtractor:
    return FeatureExtractor("net", network, classify=network, **words)


def same(found: FeatureExtractor, wanted: FeatureExtractor, images: Tensor, **tolerance: float) -> None:
    """Logits and their gradients agree, and the gradients are not nothing."""
    told = []
    for extractor in (found, wanted):
        x = images.clone().requires_grad_()
        logits = extractor.logits(x)
        (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 1].sum(), x)
        told.append((logits, gradient, extractor(images)))
    assert float(told[1][1].abs().max()) > 1e-6
    for one, other in zip(*told, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# --- every way to say ReLU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELUS)
def test_every_way_to_call_relu_is_softplus(name: str):
    images = random_images(3, 3, 6, 6)
    network, hand = Written(RELUS[name], RELUS[name]).double(), Written(by_hand, by_hand).double()
    same(softened(extractor_of(network), BETA), extractor_of(hand), images, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", RELU6S)
def test_every_way_to_call_relu6_is_the_difference_of_two_softplus(name: str):
    images = random_images(3, 3, 6, 6)
    network, hand = Written(torch.relu, RELU6S[name]).double(), Written(by_hand, six_by_hand).double()
    same(softened(extractor_of(network), BETA), extractor_of(hand), images, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("place", [True, False])
def test_in_place_is_in_place(place: bool):
    """A block that adds its input after its activation sees what the call in place made of it, as without Softplus."""
    x = random_images(1, 2, 3, 3)
    given = x.clone()
    with Softplus(BETA) as mode:
        out = functional.relu(given, inplace=place)
    torch.testing.assert_close(out, by_hand(x))
    assert (out is given, mode.replaced) == (place, 1)
    torch.testing.assert_close(given, by_hand(x) if place else x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.clamp_min(0),
        lambda x: x.clamp(0, 6),
        lambda x: torch.maximum(x, x.new_zeros(())),
        functional.gelu,
        functional.hardtanh,
        functional.leaky_relu,
        functional.hardswish,
        functional.silu,
        functional.elu,
    ],
    ids=["clamp_min", "clamp", "maximum", "gelu", "hardtanh(-1, 1)", "leaky_relu", "hardswish", "silu", "elu"],
)
def test_nothing_else_is_touched(call):
    x = random_images(1, 2, 3, 3) * 9
    with Softplus(BETA) as mode:
        found = call(x)
    assert torch.equal(found, call(x))
    assert mode.replaced == 0


# --- real networks -----------------------------------------------------------------------------------------------------


def test_a_resnet_of_transformers(tmp_path: Path):
    save_vision_model(tmp_path, "ResNetForImageClassification")
    plain, hand = load_extractor(str(tmp_path)), load_extractor(str(tmp_path))
    rewritten(hand)
    same(softened(plain, BETA), hand, random_images(3, 3, 28, 28).float(), rtol=1e-4, atol=1e-5)
    assert softened(plain, BETA).classes == plain.classes == ("ant", "bee", "cow", "doe", "elk")


def test_the_packaged_guide():
    plain, hand = load_extractor("digits-guide"), load_digits_classifier("guide")
    rewritten(hand)
    wanted = FeatureExtractor("hand", hand, channels=1, size=(8, 8), features=hand.features, classify=hand)
    same(softened(plain, BETA), wanted, random_images(4, 1, 8, 8).float(), rtol=1e-4, atol=1e-5)


def cifar_networks() -> ModuleType:
    """handful.zoo.cifar_resnet, a fresh copy of the module."""
    path = Path(cifar_resnet.__file__)
    spec = importlib.util.spec_from_file_location("a_cifar_resnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_resnet_whose_relus_are_calls_in_its_blocks():
    def made(functions: Any) -> FeatureExtractor:
        networks: Any = cifar_networks()
        networks.F = functions
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = networks.CifarResNet(20)
        return FeatureExtractor(
            "resnet20",
            network,
            size=(32, 32),
            mean=networks.MEAN,
            std=networks.STD,
            features=network.features,
            classify=network,
        )

    plain, hand = made(functional), made(SimpleNamespace(relu=by_hand, pad=functional.pad))
    soft = softened(plain, BETA)
    assert soft.met() == 19, "one after the stem, two in each of nine blocks"
    same(soft, hand, random_images(2, 3, 32, 32).float(), rtol=1e-3, atol=1e-5)


def test_an_encoder_layer_of_torch_whose_fast_path_calls_no_relu():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.layer = nn.TransformerEncoderLayer(6, 2, 12, activation="relu", batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1, 2)).flatten(1)

    images = random_images(2, 3, 4, 6).float()
    hand = Encoder()
    hand.layer.activation, hand.layer.activation_relu_or_gelu = by_hand, 0
    with torch.no_grad():
        torch.testing.assert_close(softened(extractor_of(Encoder()), BETA)(images), extractor_of(hand)(images))


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_a_large_beta_gives_the_plain_network():
    plain, images = load_extractor("digits-guide"), random_images(4, 1, 8, 8).float()
    far = [float((softened(plain, beta).logits(images) - plain.logits(images)).abs().max()) for beta in (3, 30, 300, 3000)]
    assert far == sorted(far, reverse=True)
    assert far[0] > 100 * far[-1]
    for beta in (1e9, 1e30, 1e300):
        torch.testing.assert_close(softened(plain, beta).logits(images), plain.logits(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.01, 3.0, 1e30, 1e300])
def test_it_is_finite_for_huge_inputs_in_every_precision(dtype: torch.dtype, beta: float):
    huge = torch.finfo(dtype).max
    x = torch.tensor([-huge, -1e4, -1.0, 0.0, 1.0, 9.0, 1e4, huge], dtype=dtype, requires_grad=True)
    for call, top in ((torch.relu, huge), (functional.relu6, 6.0)):
        with Softplus(beta):
            out = call(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool(out.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert out.tolist()[0] == pytest.approx(0, abs=1e-6)
        assert out.tolist()[-1] == pytest.approx(top, rel=1e-3)
        assert bool((gradient >= 0).all())


def test_in_half_precision_it_is_the_same_but_for_rounding():
    plain, images = load_extractor("digits-guide"), random_images(4, 1, 8, 8).float()
    wanted = softened(plain, BETA).logits(images)
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1)):
        half = softened(load_extractor("digits-guide").to(dtype), BETA)
        images_with = images.clone().requires_grad_()
        found = half.logits(images_with)
        found.sum().backward()
        assert float((found - wanted).abs().max()) < tolerance * float(wanted.abs().max())
        assert images_with.grad is not None
        assert bool(images_with.grad.isfinite().all())


def test_without_softplus_the_same_network_is_as_before():
    plain, images = load_extractor("digits-guide"), random_images(2, 1, 8, 8).float()
    before = plain.logits(images)
    soft = softened(plain, BETA)
    assert not torch.equal(soft.logits(images), before)
    assert torch.equal(plain.logits(images), before)


# --- what it is called -------------------------------------------------------------------------------------------------


def test_name_and_digest_tell_it_from_the_plain_one_and_by_beta():
    plain = load_extractor("digits-guide")
    one, other = softened(plain, 3), softened(plain, 5)
    assert (one.name, other.name) == ("digits-guide softplus 3", "digits-guide softplus 5")
    assert len({plain.digest, one.digest, other.digest}) == 3
    assert one.digest == softened(load_extractor("digits-guide"), 3.0).digest
    assert (one.is_classifier, one.channels, one.size, one.classes) == (True, 1, (8, 8), plain.classes)


def test_features_without_logits_are_softened_too(tmp_path: Path):
    save_vision_model(tmp_path, "ResNetModel")
    plain, hand = load_extractor(str(tmp_path)), load_extractor(str(tmp_path))
    rewritten(hand)
    images = random_images(2, 3, 28, 28).float()
    soft = softened(plain, BETA)
    torch.testing.assert_close(soft(images), hand(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="no class logits"):
        soft.logits(images)


def test_a_recipe_loads_it_and_cost_counts_it_without_weights(tmp_path: Path):
    save_vision_model(tmp_path, "ResNetForImageClassification")
    request = ClassifierRequest(classifier=str(tmp_path), softplus=BETA)
    assert load_for(request.looks).name == f"{tmp_path} softplus 3"
    outline = load_for(request.looks, meta=True)
    assert all(one.is_meta for one in outline.parameters())
    assert outline.digest == ""
    assert outline.logits(torch.zeros(2, 3, 28, 28, device="meta")).shape == (2, 5)
    assert load_for(ClassifierRequest(classifier=str(tmp_path)).looks).name == str(tmp_path)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), True, "3", None])
def test_a_beta_that_makes_no_sense_is_refused(beta: Any):
    with pytest.raises(RequestError, match="finite number above 0") as caught:
        softened(load_extractor("digits-guide"), beta)
    assert caught.value.field == "softplus"


def test_a_torchscript_network_is_refused(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten())
    torch.jit.script(network).save(tmp_path / "net.pt")
    inside = extractor_of(nn.Sequential(torch.jit.script(network), nn.ReLU()))
    for extractor in (load_extractor(str(tmp_path / "net.pt")), inside):
        with pytest.raises(RequestError, match="TorchScript") as caught:
            softened(extractor, BETA)
        assert caught.value.field == "softplus"
        assert "Leave softplus out" in caught.value.remedy


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ConvNextForImageClassification"])
def test_a_network_without_relu_is_refused_with_weights_and_without(tmp_path: Path, kind: str):
    save_vision_model(tmp_path, kind)
    for make in (load_extractor, extractor_skeleton):
        with pytest.raises(RequestError, match="calls no ReLU") as caught:
            softened(make(str(tmp_path)), BETA)
        assert (caught.value.field, caught.value.remedy) == ("softplus", "Leave softplus out.")


def test_the_packaged_judge_has_no_relu():
    with pytest.raises(RequestError, match="digits-judge"):
        softened(load_extractor("digits-judge"), BETA)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 64), (3, 224)])
def test_the_trial_finds_a_size_that_suits_a_network_which_does_not_say_one(channels: int, side: int):
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 2), nn.ReLU())
    soft = softened(extractor_of(network, channels=None), BETA)
    images = random_images(2, channels, side, side).float()
    torch.testing.assert_close(soft.logits(images), by_hand(network[1](images.flatten(1))), rtol=1e-4, atol=1e-5)


def test_a_network_that_the_trial_can_not_feed_is_not_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 7, 2), nn.GELU())
    assert softened(extractor_of(network), BETA).met() is None
