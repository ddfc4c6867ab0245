"""Vendi score: sets whose effective number of images is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from handful.errors import RequestError
from handful.metrics import vendi

ORDERS = (0, 0.1, 0.5, 1, 2, 10, 1000, math.inf)


@pytest.mark.parametrize("order", ORDERS)
def test_images_all_alike_count_as_one(order):
    assert vendi(np.full((30, 5), 3.0), order) == pytest.approx(1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [12, 40])
def test_orthogonal_images_count_each(order, width):
    assert vendi(np.eye(12, width) * np.arange(1, 13)[:, None], order) == pytest.approx(12)


@pytest.mark.parametrize("order", ORDERS)
def test_equal_groups_of_copies_count_the_groups(order):
    """60 images, 4 features: the D x D form."""
    assert vendi(np.repeat(np.eye(4), 15, axis=0), order) == pytest.approx(4)


@pytest.mark.parametrize("order", ORDERS)
def test_unequal_groups_give_the_hill_number_of_their_shares(order):
    shares = np.array([0.5, 0.3, 0.2])
    expected = {1: math.exp(-np.sum(shares * np.log(shares))), math.inf: 2.0, 0: 3.0}
    hill = expected.get(order) or math.exp(math.log(np.sum((shares / 0.5) ** order)) / (1 - order)) * 0.5 ** (
        order / (1 - order)
    )
    assert vendi(np.repeat(np.eye(3), [50, 30, 20], axis=0), order) == pytest.approx(hill)


def test_two_images_at_an_angle_have_the_closed_form():
    """Eigenvalues of K/2 are (1 +- cos)/2."""
    cosine = 0.6
    p, q = (1 + cosine) / 2, (1 - cosine) / 2
    assert vendi([[1.0, 0], [cosine, 0.8]]) == pytest.approx(math.exp(-p * math.log(p) - q * math.log(q)))


def test_one_image_counts_one():
    assert vendi([[0.1, -3.0, 2.0]]) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_and_the_feature_form_agree(order):
    """The same vectors padded with zero features: D = 10 takes the feature form, D = 80 the kernel."""
    features = np.random.default_rng(0).normal(size=(50, 10))
    assert vendi(np.pad(features, ((0, 0), (0, 70))), order) == pytest.approx(vendi(features, order), rel=1e-9)


def test_orders_near_one_run_into_one():
    features = np.random.default_rng(1).normal(size=(20, 30))
    for step in (1e-4, 1e-8, 1e-12):
        assert vendi(features, 1 - step) == pytest.approx(vendi(features), rel=2 * step + 1e-12)
        assert vendi(features, 1 + step) == pytest.approx(vendi(features), rel=2 * step + 1e-12)


def test_falls_as_the_order_rises():
    features = np.random.default_rng(2).normal(size=(40, 8)) + 0.5
    scores = [vendi(features, order) for order in ORDERS]
    assert all(a > b for a, b in itertools.pairwise(scores))


def test_order_zero_is_the_rank_and_rounding_noise_is_not_counted():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 30))
    assert vendi(features, 0) == pytest.approx(3, rel=1e-12)
    assert vendi(features, 0.01) < 3


def test_blind_to_each_images_length_and_to_order_and_to_precision():
    rng = np.random.default_rng(4)
    features = rng.normal(size=(30, 50)).astype(np.float32)
    lengths = 10.0 ** rng.integers(-12, 12, size=(30, 1))
    expected = vendi(features)
    assert vendi(rng.permutation(features.astype(float) * lengths)) == pytest.approx(expected)
    assert vendi(torch.from_numpy(features)) == pytest.approx(expected)
    assert vendi(features * np.float32(1e-30)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("features", "order", "message"),
    [
        (
            np.vstack([np.ones((4, 3)), np.zeros((1, 3)), np.ones((2, 3))]),
            1,
            "features: 'row 4': an image of all-zero features has no direction",
        ),
        (np.ones((4, 3)), -1, "order: -1: an order is at least 0"),
        (np.ones((4, 3)), math.nan, "order: nan: an order"),
        (np.ones(4), 1, r"features: \(4,\): "),
        (np.ones((0, 4)), 1, r"features: \(0, 4\): this shape is empty"),
        (np.full((2, 2), np.inf), 1, "features: inf: at row 0, column 0"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_remedy(features, order, message):
    with pytest.raises(RequestError, match=message):
        vendi(features, order)
