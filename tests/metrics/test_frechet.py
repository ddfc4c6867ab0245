"""Frechet distance: closed forms, an independent matrix square root, and the singular cases where others fail."""

import numpy as np
import pytest
import scipy.linalg
import torch

from handful.errors import RequestError
from handful.metrics import frechet, frechet_from_moments


def by_sqrtm(real, generated):
    """The textbook formula; sound only for well-conditioned covariances."""
    s1, s2 = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    shift = np.sum((real.mean(0) - generated.mean(0)) ** 2)
    return shift + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)


def test_equal_isotropic_gaussians_are_the_squared_distance_of_their_means():
    eye = np.eye(5)
    assert frechet_from_moments(np.zeros(5), eye, np.full(5, 2.0), eye) == pytest.approx(20)


def test_one_dimension_is_difference_of_means_and_of_deviations_squared():
    assert frechet_from_moments([1.0], [[9.0]], [4.0], [[25.0]]) == pytest.approx((1 - 4) ** 2 + (3 - 5) ** 2)


def test_commuting_covariances_have_the_closed_form():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6)
    found = frechet_from_moments(np.zeros(6), turn @ np.diag(a) @ turn.T, np.ones(6), turn @ np.diag(b) @ turn.T)
    assert found == pytest.approx(6 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))


def test_sets_stretched_along_an_axis_have_the_closed_form():
    """Generated is real times a diagonal: both covariances come from the same sample, so the identity is exact in 1-D."""
    real = np.random.default_rng(1).normal(size=(50, 1))
    assert frechet(real, 3 * real + 1) == pytest.approx((3 * real.mean() + 1 - real.mean()) ** 2 + (2 * real.std(ddof=1)) ** 2)


def test_two_pure_directions_at_an_angle():
    """Rank one each: tr sqrt(S1 S2) = |cos| of the angle between them, times both deviations."""
    u, v = np.array([1.0, 0, 0]), np.array([0.6, 0.8, 0])
    found = frechet_from_moments(np.zeros(3), 4 * np.outer(u, u), np.zeros(3), 9 * np.outer(v, v))
    assert found == pytest.approx(4 + 9 - 2 * 2 * 3 * 0.6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_scipy_sqrtm_on_well_conditioned_data(seed):
    rng = np.random.default_rng(seed)
    mix = np.eye(10) + 0.3 * rng.normal(size=(10, 10))
    real, generated = rng.normal(size=(400, 10)), rng.normal(size=(300, 10)) @ mix + 0.2
    assert frechet(real, generated) == pytest.approx(by_sqrtm(real, generated), rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(20, 30), (20, 200), (200, 30), (200, 200), (64, 65), (63, 64)])
def test_few_and_many_images_take_paths_that_agree(m, n):
    """frechet uses the features below D images, the covariance from D on; frechet_from_moments always the latter."""
    rng = np.random.default_rng(m + n)
    real, generated = rng.normal(size=(m, 64)), 0.7 * rng.normal(size=(n, 64)) + 0.1
    moments = [part for x in (real, generated) for part in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet(real, generated) == pytest.approx(frechet_from_moments(*moments), rel=1e-7)


@pytest.mark.parametrize("n", [2, 10, 63, 64, 500])
def test_a_set_against_itself_is_zero(n):
    real = np.random.default_rng(n).normal(size=(n, 64)) * np.logspace(3, -6, 64)
    assert 0 <= frechet(real, real) < 1e-9 * np.trace(np.cov(real, rowvar=False))


@pytest.mark.parametrize("n", [30, 400])
def test_sets_inside_a_subspace_equal_their_distance_inside_it(n):
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(40, 5)))[0].T
    real, generated = rng.normal(size=(n, 5)), 2 * rng.normal(size=(n, 5)) + 1
    assert frechet(real @ basis, generated @ basis) == pytest.approx(by_sqrtm(real, generated), rel=1e-7)


@pytest.mark.parametrize("n", [10, 400])
def test_sets_in_orthogonal_subspaces_share_nothing(n):
    rng = np.random.default_rng(3)
    real, generated = np.zeros((n, 20)), np.zeros((n, 20))
    real[:, :10], generated[:, 10:] = rng.normal(size=(n, 10)), rng.normal(size=(n, 10))
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]  # so that zeros become rounding noise
    real, generated = real @ turn, generated @ turn
    expected = (
        np.sum((real.mean(0) - generated.mean(0)) ** 2)
        + np.trace(np.cov(real, rowvar=False))
        + np.trace(np.cov(generated, rowvar=False))
    )
    assert frechet(real, generated) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [3, 300])
def test_constant_sets_are_the_squared_distance_of_their_points(n):
    assert frechet(np.full((n, 8), 5.0), np.full((n, 8), 7.0)) == pytest.approx(32)
    assert frechet(np.full((n, 8), 5.0), np.full((n, 8), 5.0)) == 0


def test_a_large_offset_costs_no_precision():
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(300, 20)), 1.5 * rng.normal(size=(300, 20))
    assert frechet(real + 1e6, generated + 1e6) == pytest.approx(frechet(real, generated), rel=1e-7)


def test_float32_and_torch_features_are_measured_in_float64():
    rng = np.random.default_rng(5)
    real, generated = (rng.normal(size=(300, 20)).astype(np.float32) for _ in range(2))
    expected = frechet(real.astype(np.float64), generated.astype(np.float64))
    assert frechet(real, generated) == pytest.approx(expected, rel=1e-12)
    assert frechet(torch.from_numpy(real), torch.from_numpy(generated)) == pytest.approx(expected, rel=1e-12)


def test_symmetric_and_blind_to_order_and_rotation():
    rng = np.random.default_rng(6)
    real, generated = rng.normal(size=(50, 20)), 2 * rng.normal(size=(90, 20))
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    expected = frechet(real, generated)
    assert frechet(generated, real) == pytest.approx(expected, rel=1e-10)
    assert frechet(rng.permutation(real) @ turn, generated[::-1] @ turn) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_never_negative_nan_or_complex(seed):
    rng = np.random.default_rng(seed)
    rank, n = rng.integers(1, 30), rng.integers(2, 80)
    real = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, 30)) * 10.0 ** rng.integers(-8, 8)
    found = frechet(real, real + 1e-12 * rng.normal(size=real.shape))
    assert isinstance(found, float)
    assert np.isfinite(found)
    assert found >= 0


GOOD = np.random.default_rng(0).normal(size=(12, 4))


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (GOOD[:1], GOOD, "real: 1: one image has no covariance. Give at least 2"),
        (GOOD, GOOD[:1], "generated: 1: one image has no covariance"),
        (GOOD, GOOD[:, :2], "generated: 2: the number of features differs from that of `real`, 4"),
        (GOOD * np.nan, GOOD, "real: nan: at row 0, column 0"),
        (GOOD, GOOD.ravel(), r"generated: \(48,\): features must"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_remedy(real, generated, message):
    with pytest.raises(RequestError, match=message):
        frechet(real, generated)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(3)), r"cov1: \(2, 2\): not \(D, D\) with the D of mean1, 3"),
        ((np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "mean2: 2: the number of features differs from that of `mean1`, 3"),
        ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1.0, 0.5], [0, 1]])), "cov2: 0.5: the matrix is not symmetric"),
        ((np.zeros(2), np.diag([1.0, -1]), np.zeros(2), np.eye(2)), "cov1: -1.0: this is its smallest eigenvalue"),
        ((np.array([np.nan, 0]), np.eye(2), np.zeros(2), np.eye(2)), "mean1: nan: at row 0, column 0"),
    ],
)
def test_moments_that_are_none_are_refused(moments, message):
    with pytest.raises(RequestError, match=message):
        frechet_from_moments(*moments)
