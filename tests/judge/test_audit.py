"""The mild transforms: mild, what they say they are, and deadly to what is not in the picture."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from handful.judge.audit import TRANSFORMS, jpeg, lowpass, noise, resample
from handful.zoo.digits import load_digits_classifier, load_digits_split


def smooth(n: int, c: int, h: int, w: int) -> Tensor:
    """Images without fine detail: one slow wave each."""
    y, x = torch.meshgrid(torch.linspace(0, 2, h), torch.linspace(0, 2, w), indexing="ij")
    phase = torch.arange(n * c).view(n, c, 1, 1) * 0.7
    return 0.8 * torch.sin(y + 1.3 * x + phase)


def checkerboard(h: int, w: int, height: float) -> Tensor:
    """The finest pattern there is, up and down by `height`."""
    return height * (1 - 2.0 * ((torch.arange(h)[:, None] + torch.arange(w)) % 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_smooth_images_nearly_as_they_are_and_in_range(name, channels):
    images = smooth(4, channels, 24, 32)
    found = TRANSFORMS[name](images)
    assert found.shape == images.shape
    assert float(found.abs().max()) <= 1
    difference = (found - images).square().mean((1, 2, 3)).sqrt()
    assert float(difference.max()) < 0.12
    assert float(difference.min()) > 0


@pytest.mark.parametrize(
    ("name", "height"), [("resample", 0.5), ("resample", 0.02), ("jpeg", 0.02), ("lowpass", 0.5), ("lowpass", 0.02)]
)
def test_the_finest_pattern_does_not_survive(name, height):
    """Resampling and the low-pass take it at any height; JPEG where it is faint. (Noise keeps it always.)"""
    images, pattern, apply = 0.5 * smooth(4, 1, 24, 32), checkerboard(24, 32, height), TRANSFORMS[name]
    left = (apply(images + pattern) - apply(images))[..., 2:-2, 2:-2]
    kept = (left * pattern[2:-2, 2:-2]).mean() / pattern.square().mean()
    assert abs(float(kept)) < 0.05


def test_jpeg_is_pillows_at_its_quality():
    images = smooth(2, 3, 16, 24)
    for quality in (30, 60, 95):
        found = jpeg(images, quality)
        for image, read in zip(images, found, strict=True):
            pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
            wanted = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(read, wanted, rtol=0, atol=1e-6)


def test_worse_quality_and_a_smaller_factor_cost_more():
    images = 0.8 * smooth(4, 1, 24, 32) + checkerboard(24, 32, 0.1)

    def cost(found: Tensor) -> float:
        return float((found - images).square().mean())

    assert cost(jpeg(images, 95)) < cost(jpeg(images, 60)) < cost(jpeg(images, 5))
    assert cost(resample(images, 0.9)) < cost(resample(images, 0.5)) < cost(resample(images, 0.1))


def test_resampling_a_constant_image_changes_nothing():
    images = torch.full((2, 1, 8, 8), -0.4)
    torch.testing.assert_close(resample(images), images, rtol=0, atol=1e-5)


def test_resampling_survives_the_smallest_images():
    assert resample(torch.zeros(1, 1, 1, 1), 0.1).tolist() == [[[[0.0]]]]


@pytest.mark.parametrize("size", [(4, 4), (4, 9), (8, 8), (33, 32)])
@pytest.mark.parametrize("pattern", ["board", "columns", "rows"])
def test_the_lowpass_damps_the_finest_patterns_by_more_than_five_borders_included(size, pattern):
    """Also the pattern of +-0.05 that JPEG makes larger instead (docs/findings.md, section 4)."""
    height, width = size
    rows, columns = (1 - 2.0 * (torch.arange(side) % 2) for side in size)
    board = {"board": rows[:, None] * columns, "columns": columns.expand(height, -1), "rows": rows[:, None].expand(-1, width)}
    images = 0.05 * board[pattern].expand(2, 3, -1, -1)
    assert float(lowpass(images).abs().max()) < 0.05 / 5


def test_jpeg_keeps_a_pattern_that_the_lowpass_takes():
    images = checkerboard(32, 32, 0.05).expand(1, 1, -1, -1)
    assert float(jpeg(images).abs().mean()) > 0.05
    assert float(lowpass(images).abs().mean()) < 0.002


def test_the_lowpass_is_a_gaussian_of_its_deviation():
    """A point becomes the Gaussian, which keeps its sum; a wave keeps exp(-(deviation omega)^2 / 2) of its height."""
    point = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    point[..., 7, 7] = 1
    spread = lowpass(point, 1.2)[0, 0]
    offsets = torch.arange(15, dtype=torch.float64) - 7
    assert float(spread.sum()) == pytest.approx(1, abs=1e-9)
    assert float((spread.sum(0) * offsets**2).sum()) == pytest.approx(1.2**2, rel=1e-3)
    assert torch.equal(spread, spread.T)
    omega = 2 * torch.pi / 16
    wave = torch.cos(omega * torch.arange(64, dtype=torch.float64)).expand(1, 1, 5, -1)
    kept = lowpass(wave)[0, 0, 2, 8:56] @ wave[0, 0, 2, 8:56] / wave[0, 0, 2, 8:56].square().sum()
    assert float(kept) == pytest.approx(float(torch.exp(torch.tensor(-((0.7 * omega) ** 2) / 2))), rel=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 4), (8, 8), (17, 5)])
def test_the_lowpass_leaves_flat_images_and_the_range_at_any_size(size):
    flat = torch.full((2, 3, *size), -0.4)
    torch.testing.assert_close(lowpass(flat), flat, rtol=0, atol=1e-6)
    wild = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    found = lowpass(wild)
    assert found.shape == wild.shape
    assert float(found.max()) <= 1
    assert float(found.min()) >= -1


def test_noise_has_its_deviation_and_its_seed():
    """16,384 values: a deviation off by 4 % has a chance below 1e-12."""
    images = torch.zeros(16, 1, 32, 32)
    found = noise(images, 0.1)
    assert float(found.std()) == pytest.approx(0.1, rel=0.04)
    assert torch.equal(noise(images, 0.1), found)
    other = noise(images, 0.1, seed=1)
    assert abs(float(torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1])) < 0.05
    assert noise(images.double(), 0.1).dtype == torch.float64


def test_real_digits_survive_every_transform_to_the_judge():
    """What a person sees stays: the judge's accuracy on real held-out digits falls by less than 4 points."""
    split, judge = load_digits_split(), load_digits_classifier("judge")

    def accuracy(images: Tensor) -> float:
        return float((judge(images).argmax(1) == split.test_labels).double().mean())

    plain = accuracy(split.test_images)
    for name, apply in TRANSFORMS.items():
        assert accuracy(apply(split.test_images)) > plain - 0.04, name
