"""Random views: of every image its own, of the right size and range, and what is switched off stays as it is."""

import pytest
import torch

from handful.data.augmentation import random_view

PICTURES = 2 * torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(5)) - 1


def views(images=PICTURES, seed=0, **options):
    return random_view(images, torch.Generator().manual_seed(seed), **options)


def test_a_seed_gives_its_views_in_size_and_range():
    found = views()
    assert found.shape == PICTURES.shape
    assert found.abs().max() <= 1
    torch.testing.assert_close(found, views(), rtol=0, atol=0)
    assert not torch.equal(found, views(seed=1))


def test_every_image_has_draws_of_its_own():
    found = views(PICTURES[:1].expand(8, -1, -1, -1))
    assert all(not torch.equal(found[i], found[j]) for i in range(8) for j in range(i))


def test_a_plain_picture_stays_plain_and_without_jitter_keeps_its_colour():
    plain = torch.tensor([0.5, -0.2, 0.1]).view(1, 3, 1, 1).expand(32, 3, 16, 16)
    torch.testing.assert_close(views(plain, jitter=0, gray=0), plain)
    seen = views(plain)
    assert seen.std((2, 3)).max() < 1e-5
    assert (seen - plain).abs().max() > 0.1


def test_gray_takes_all_colour_from_the_jittered():
    found = views(jitter=0.1, gray=1.0)
    colourless = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.6 < colourless.double().mean() < 0.95  # four of five are jittered


def test_the_smallest_crop_zooms_in_and_half_are_mirrored():
    ramp = torch.linspace(-1, 1, 16).expand(256, 3, 16, 16).contiguous()
    whole = views(ramp, area=1.0, jitter=0, gray=0)
    rising = whole[:, 0, 8, -1] > whole[:, 0, 8, 0]
    assert 0.4 < rising.double().mean() < 0.6
    zoomed = views(ramp, area=0.1, jitter=0, gray=0)

    def spread(images):
        return (images[:, 0, 8, -1] - images[:, 0, 8, 0]).abs().mean()

    assert spread(zoomed) < 0.8 * spread(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_keeps_the_images_precision(dtype):
    assert views(PICTURES.to(dtype)).dtype == dtype
