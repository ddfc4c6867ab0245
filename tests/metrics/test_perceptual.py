"""Perceptual distances: what they measure, that blocks change nothing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.drawn import images
from torch import nn

from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, load_extractor, pixels
from handful.metrics.perceptual import PerceptualDistance, as_images, feature_distance, load_distance

PLAIN = feature_distance(pixels(), unit=False)


def directions(*angles: float) -> torch.Tensor:
    """Images of two pixels, one at each angle on the unit circle."""
    turns = torch.tensor(angles).deg2rad()
    return torch.stack([turns.cos(), turns.sin()], 1).view(-1, 1, 1, 2)


def test_unit_features_give_the_chord_of_the_angle_between_them_whatever_their_length():
    distance = feature_distance(pixels())
    found = distance(directions(0, 0, 0, 30, -30), 0.1 * directions(0, 90, 180, 90, -30))
    np.testing.assert_allclose(found, [0, 2**0.5, 2, 1, 0], atol=1e-6)


def test_plain_features_give_the_euclidean_distance_in_pixels():
    first, second = images(3, 0), images(3, 1)
    wanted = (first - second).flatten(1).double().norm(dim=1)
    np.testing.assert_allclose(PLAIN(first, second), wanted, rtol=1e-6)


@pytest.mark.parametrize("distance", [PLAIN, feature_distance(pixels()), feature_distance(load_extractor("digits-judge"))])
def test_all_pairs_of_a_set_are_symmetric_with_zeros_on_the_diagonal(distance: PerceptualDistance):
    found = distance.pairs(images(70))
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()
    assert (found[~np.eye(70, dtype=bool)] > 0).all()
    np.testing.assert_allclose(found, distance.pairs(images(70), images(70)), atol=2e-3)  # sqrt of rounding near 0


def test_pairs_are_the_distances_one_by_one():
    first, second = images(70, 0), images(65, 1)
    found = PLAIN.pairs(first, second)
    np.testing.assert_array_equal(np.diag(found), PLAIN(first[:65], second))
    np.testing.assert_array_equal(found, PLAIN.pairs(second, first).T)


def test_memory_bounds_change_no_distance_but_the_number_of_evaluations():
    asked = []

    def embed(given: torch.Tensor) -> torch.Tensor:
        asked.append(len(given))
        return given.flatten(1)

    distance = PerceptualDistance("counted", "", embed)
    held, held_calls = distance.pairs(images(200)), sum(asked)
    asked.clear()
    again = distance.pairs(images(200), most_values=0)
    np.testing.assert_array_equal(held, again)
    assert held_calls <= 201 < sum(asked)
    assert max(asked) <= 64, "never more than a block at once"


def test_equal_networks_have_equal_digests_and_scaling_counts():
    assert feature_distance(pixels()).digest == feature_distance(pixels()).digest
    assert feature_distance(pixels()).digest != PLAIN.digest
    assert feature_distance(pixels()).name == "pixels"


def test_features_without_direction_are_refused():
    dead = FeatureExtractor("dead", nn.Hardtanh(0, 1), channels=None)
    with pytest.raises(RequestError, match=r"images: .1 of 2.: their dead features are all zero"):
        feature_distance(dead)(torch.tensor([0.5, -0.5]).view(2, 1, 1, 1), images(2, side=1).abs())


def test_a_distance_is_loaded_by_its_extractors_name():
    assert load_distance("digits-judge").name == "digits-judge"
    with pytest.raises(RequestError, match="Did you mean 'dinov2'"):
        load_distance("dinov")


@pytest.mark.parametrize(("name", "file"), [("lpips", "vgg16-"), ("lpips-vgg", "vgg16-"), ("lpips-alex:", "alexnet-")])
def test_lpips_without_weights_is_told_which_file_it_needs(name: str, file: str):
    with pytest.raises(RequestError, match=f"distance: '{name}': LPIPS needs the weights .* torchvision's {file}"):
        load_distance(name)


def test_values_outside_the_range_are_clamped_and_values_inside_are_not_copied():
    given = images(2)
    assert as_images(given, "x").data_ptr() == given.data_ptr()
    assert as_images(given * 3, "x").abs().max() == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (torch.zeros(0, 1, 8, 8), "this set is empty"),
        (torch.zeros(2, 8, 8), "images are a tensor"),
        (torch.zeros(2, 4, 8, 8), "images are a tensor"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "images are floats"),
        (torch.full((1, 1, 2, 2), float("nan")), "NaN or infinite"),
        (torch.full((1, 1, 2, 2), float("inf")), "NaN or infinite"),
    ],
)
def test_what_is_no_set_of_images_is_refused_by_its_name(given: torch.Tensor, problem: str):
    with pytest.raises(RequestError, match=f"^second: .*{problem}"):
        PLAIN.pairs(images(2), given)


def test_sets_of_other_sizes_or_channels_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^second: '4 x 4': this size differs from that of `first`, 8 x 8"):
        PLAIN.pairs(images(2), images(2, side=4))
    with pytest.raises(RequestError, match=r"^second: 3: this is the number of channels, but `first` has 1"):
        PLAIN.pairs(images(2), images(2, channels=3))
    with pytest.raises(RequestError, match=r"^second: 3: this is the number of images, but `first` has 2"):
        PLAIN(images(2), images(3))
