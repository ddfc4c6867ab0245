"""The extractor's contract: what a network is fed, what comes back, and what its digest stands for."""

from typing import Any

import pytest
import torch
from support.vision import random_images as images
from torch import nn
from torch.nn.functional import interpolate

from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor, pixels
from handful.zoo.digits import load_digits_classifier

LUMA = (0.299, 0.587, 0.114)


def bare(**words: Any) -> FeatureExtractor:
    """An extractor whose features are what its network is fed."""
    return FeatureExtractor("bare", nn.Identity(), **words)


# --- what the network is fed -------------------------------------------------------------------------------------------


def test_gray_is_repeated_and_colour_comes_to_luma():
    gray, colour = images(2, 1, 3, 4), images(2, 3, 3, 4)
    assert torch.equal(bare(channels=3).prepare(gray), gray.repeat(1, 3, 1, 1))
    luma = sum(weight * colour[:, i] for i, weight in enumerate(LUMA))
    torch.testing.assert_close(bare(channels=1).prepare(colour)[:, 0], luma)
    assert torch.equal(bare(channels=3).prepare(colour), colour)
    assert torch.equal(bare(channels=1).prepare(gray), gray)


def test_mean_and_std_are_of_images_in_0_to_1():
    colour, mean, std = images(2, 3, 3, 4), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = bare(mean=mean, std=std).prepare(colour)
    for i in range(3):
        torch.testing.assert_close(found[:, i], (colour[:, i] * 0.5 + 0.5 - mean[i]) / std[i])
    assert torch.equal(bare().prepare(colour), colour)


def test_images_are_resized_with_antialiasing_and_left_alone_at_their_size():
    small, large = images(2, 3, 8, 10), images(2, 3, 20, 31)
    extractor = bare(size=(8, 10))
    assert torch.equal(extractor.prepare(small), small)
    wanted = interpolate(large, (8, 10), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(extractor.prepare(large), wanted)
    flat = torch.full((1, 3, 40, 40), 0.3, dtype=torch.float64)
    torch.testing.assert_close(extractor.prepare(flat), torch.full((1, 3, 8, 10), 0.3, dtype=torch.float64))
    stripes = torch.ones(1, 3, 32, 40, dtype=torch.float64)
    stripes[..., ::2] = -1  # too fine for the small image: without antialiasing they come out as black or white
    assert float(extractor.prepare(stripes)[..., 2:-2].abs().max()) < 0.3


def test_the_order_is_resize_then_normalise():
    large, mean, std = images(2, 3, 20, 30), (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    both = bare(size=(8, 8), mean=mean, std=std).prepare(large)
    resized = bare(size=(8, 8)).prepare(large)
    torch.testing.assert_close(both, bare(mean=mean, std=std).prepare(resized))


def test_half_precision_images_are_measured_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        assert bare(size=(4, 4)).prepare(images(1, 3, 9, 9).to(dtype)).dtype == torch.float32
    assert bare(size=(4, 4)).prepare(images(1, 3, 9, 9)).dtype == torch.float64


def test_features_are_flat_rows_in_the_order_of_the_images():
    batch = images(3, 3, 4, 4)
    found = FeatureExtractor("pool", nn.AdaptiveAvgPool2d(2))(batch)
    assert found.shape == (3, 12)
    torch.testing.assert_close(found[1], batch[1].view(3, 2, 2, 2, 2).mean((2, 4)).flatten())


def test_pixels_are_the_images_of_any_channels_themselves():
    for channels in (1, 3):
        batch = images(2, channels, 5, 4)
        assert torch.equal(pixels()(batch), batch.flatten(1))


def test_the_gradient_flows_to_the_image_through_everything():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh()).double()
    extractor = FeatureExtractor("conv", network, size=(5, 5), mean=(0.5,) * 3, std=(0.2,) * 3)
    for channels in (1, 3):
        batch = images(1, channels, 7, 7).requires_grad_()
        assert torch.autograd.gradcheck(extractor, (batch,), eps=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 2, 8, 8), (8, 8)])
def test_what_is_no_batch_of_gray_or_rgb_is_refused_by_name(shape):
    with pytest.raises(RequestError, match=r"^images: "):
        pixels()(torch.zeros(shape))


def test_mean_and_std_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="together"):
        bare(mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="channel"):  # they would make three channels of one
        bare(channels=1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="channel"):
        bare(channels=3, mean=(0.5,), std=(0.5, 0.5, 0.5))


def test_a_network_in_half_precision_answers_in_the_images_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    whole, half = (
        FeatureExtractor("x", network),
        FeatureExtractor("x", nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).bfloat16()),
    )
    half.network.load_state_dict(network.state_dict())
    batch = images(2, 3, 2, 2)
    assert (half(batch).dtype, half(batch.half()).dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(half(batch), whole(batch.float()).double(), atol=0.02, rtol=0.02)
    assert not torch.equal(half(batch), whole(batch))


def test_on_the_meta_device_there_are_features_and_gradients_and_no_digest():
    network = nn.Conv2d(3, 2, 3).to("meta")
    extractor = FeatureExtractor("conv", network, size=(5, 5), mean=(0.5,) * 3, std=(0.2,) * 3)
    assert extractor.digest == ""
    for side in (4, 9):  # enlarged, and made smaller
        batch = torch.zeros(2, 1, side, side, device="meta", requires_grad=True)
        features = extractor(batch)
        assert features.shape == (2, 18)
        features.sum().backward()
        assert batch.grad is not None
        assert batch.grad.shape == batch.shape


def test_what_a_classifier_calls_its_classes_is_kept():
    assert bare(classes=["ant", "bee"]).classes == ("ant", "bee")
    assert bare().classes == ()


def test_an_extractor_without_logits_says_so():
    assert not pixels().is_classifier
    with pytest.raises(RequestError, match=r"^features: 'pixels': .*digits-judge"):
        pixels().logits(images(1, 1, 8, 8))


# --- digests -----------------------------------------------------------------------------------------------------------


def linear(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(27, 4), nn.ReLU())


def digest(network: nn.Module | None = None, **words: Any) -> str:
    return FeatureExtractor(words.pop("name", "x"), network or linear(), **words).digest


def test_a_digest_is_of_weights_and_preprocessing_and_not_of_the_name():
    same = digest()
    assert digest() == same
    assert digest(name="another") == same
    moved = linear()
    with torch.no_grad():
        moved[1].weight[0, 0] += 1e-6  # pyright: ignore[reportIndexIssue]
    others = [
        digest(moved),
        digest(linear(seed=1)),
        digest(linear().half()),
        digest(size=(3, 3)),
        digest(channels=1),
        digest(mean=(0.5,) * 3, std=(0.5,) * 3),
        digest(mean=(0.5,) * 3, std=(0.25,) * 3),
    ]
    assert len({same, *others}) == 8


def test_networks_that_differ_without_differing_in_weights_have_their_own_digests():
    smooth, sharper = linear(), linear()
    smooth[2], sharper[2] = nn.Softplus(beta=3), nn.Softplus(beta=5)
    shuffled = nn.Sequential(nn.Flatten(), linear()[1])
    assert len({digest(), digest(smooth), digest(sharper), digest(shuffled)}) == 4


def test_other_features_of_the_same_network_have_their_own_digest():
    network = load_digits_classifier("judge")
    assert digest(network, channels=1) != digest(network, channels=1, features=network.features)
