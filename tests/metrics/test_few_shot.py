"""Measurements of few-shot generation, on sets whose answers are known without measuring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.drawn import images
from torch import Tensor
from torch.nn.functional import conv2d, pad

from handful.errors import RequestError
from handful.features.registry import pixels
from handful.metrics.few_shot import copied, intra_distance, mc_ssim, nearest_targets, reconstruction, ssim, ssim_window
from handful.metrics.perceptual import feature_distance

PLAIN = feature_distance(pixels(), unit=False)


def points(*places: tuple[float, float]) -> Tensor:
    """Images of two pixels: Euclidean distances are those of points in the plane."""
    return torch.tensor(places).view(-1, 1, 1, 2)


# --- intra-distance ----------------------------------------------------------------------------------------------------

TARGETS = points((-0.8, 0.0), (0.8, 0.0), (0.0, 0.9))
# A triangle of sides .3, .4, .5 at the first target, one image at the second, none at the third.
GENERATED = points((-0.8, 0.0), (-0.5, 0.0), (-0.8, 0.4), (0.7, 0.0))


def test_clusters_of_known_distances_give_their_mean_and_small_ones_count_nothing():
    found = intra_distance(GENERATED, TARGETS, PLAIN)
    assert found.sizes == found.compared == (3, 1, 0)
    assert found.values == pytest.approx((0.4, 0.0, 0.0), abs=1e-6)
    assert found.mean == pytest.approx(0.4 / 3)
    assert found.distance == "pixels, not scaled"


def test_copies_of_the_targets_have_no_variety():
    assert intra_distance(TARGETS.repeat(5, 1, 1, 1), TARGETS, PLAIN).mean == 0


def test_the_order_of_images_and_of_targets_changes_nothing():
    generated, targets = images(60), images(4, 1)
    found = intra_distance(generated, targets, PLAIN, most=None)
    mixed = intra_distance(generated[torch.randperm(60)], targets[[2, 0, 3, 1]], PLAIN, most=None)
    assert mixed.sizes == tuple(found.sizes[place] for place in (2, 0, 3, 1))
    assert mixed.values == pytest.approx([found.values[place] for place in (2, 0, 3, 1)])


def test_memory_bounds_change_nothing():
    generated, targets = images(300), images(3, 1)
    wide = intra_distance(generated, targets, PLAIN, most=None)
    assert intra_distance(generated, targets, PLAIN, most=None, most_values=1) == wide


def test_a_cap_draws_members_by_its_seed_without_bias():
    generated, targets = images(400, side=4), images(2, 1, side=4)
    whole = intra_distance(generated, targets, PLAIN, most=None)
    drawn = [intra_distance(generated, targets, PLAIN, most=20, seed=seed) for seed in range(40)]
    assert drawn[0] == intra_distance(generated, targets, PLAIN, most=20, seed=0)
    assert len({one.mean for one in drawn}) == 40
    assert drawn[0].compared == (20, 20)
    assert drawn[0].sizes == whole.sizes
    means = np.array([one.mean for one in drawn])
    assert abs(means.mean() - whole.mean) < 5 * means.std() / 40**0.5  # a false alarm in a million


def test_of_equal_targets_the_first_gets_all():
    found = intra_distance(GENERATED, TARGETS[[0, 0, 1]], PLAIN)
    assert found.sizes == (3, 0, 1)


def test_one_target_gets_everything_and_one_image_has_no_variety():
    assert intra_distance(GENERATED, TARGETS[:1], PLAIN).sizes == (4,)
    assert intra_distance(GENERATED[:1], TARGETS, PLAIN).mean == 0


def test_bad_requests_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^most: 1: a single image has no distances"):
        intra_distance(GENERATED, TARGETS, PLAIN, most=1)
    with pytest.raises(RequestError, match=r"^generated: .*this set is empty"):
        intra_distance(GENERATED[:0], TARGETS, PLAIN)
    with pytest.raises(RequestError, match=r"^targets: .*this set is empty"):
        intra_distance(GENERATED, TARGETS[:0], PLAIN)
    with pytest.raises(RequestError, match=r"^targets: 3: this is the number of channels, but `generated` has 1"):
        intra_distance(images(2), images(2, channels=3), PLAIN)
    with pytest.raises(RequestError, match=r"^targets: '9 x 9': this size differs from that of `generated`, 8 x 8"):
        intra_distance(images(2), images(2, side=9), PLAIN)


# --- copying -----------------------------------------------------------------------------------------------------------


def test_the_nearest_target_and_its_distance():
    distance, index = nearest_targets(GENERATED, TARGETS, PLAIN)
    assert index.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(distance, [0, 0.3, 0.4, 0.1], atol=1e-6)


def test_copies_are_found_and_held_out_images_score_the_quantile():
    targets, held_out = images(10), images(400, 1)
    assert copied(targets, targets, held_out, PLAIN) == 1
    assert copied(held_out, targets, held_out, PLAIN, quantile=0.05) == pytest.approx(0.05)
    with pytest.raises(RequestError, match=r"^held_out: '9 x 9'"):
        copied(targets, targets, images(3, side=9), PLAIN)


# --- SSIM --------------------------------------------------------------------------------------------------------------


def direct_ssim(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Wang et al.'s formula on bytes (data range 255), in float64, edges mirrored; (n,)."""
    a, b = ((one.double() + 1) * 127.5 for one in (a, b))
    place = torch.arange(window, dtype=torch.float64) - window // 2
    line = torch.exp(-place.square() / (2 * (1.5 * window / 11) ** 2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(a.shape[1], 1, window, window)

    def smooth(x: Tensor) -> Tensor:
        return conv2d(pad(x, (window // 2,) * 4, mode="reflect"), kernel, groups=a.shape[1])

    mu_a, mu_b = smooth(a), smooth(b)
    var_a, var_b, cov = smooth(a * a) - mu_a**2, smooth(b * b) - mu_b**2, smooth(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    full = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return full.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("side", "window"), [(3, 3), (4, 3), (5, 5), (6, 5), (7, 7), (8, 7), (9, 9), (10, 9), (11, 11), (32, 11)]
)
def test_ssim_is_its_formula_on_bytes_with_the_window_that_fits(side: int, window: int):
    a, b = images(4, 0, 3, side), images(4, 1, 3, side)
    b = 0.5 * a + 0.5 * b
    assert ssim_window(side, side + 1) == window
    np.testing.assert_allclose(ssim(a, b), direct_ssim(a, b, window), atol=1e-7)


def test_ssim_of_flat_images_is_the_luminance_term_alone():
    dark, light = torch.full((1, 1, 16, 16), -0.5), torch.full((1, 1, 16, 16), 0.5)
    c1 = 0.01**2
    wanted = (2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1)  # not -1, as it were on values below 0
    assert ssim(dark, light)[0] == pytest.approx(wanted, abs=1e-7)


def test_too_small_images_are_refused():
    with pytest.raises(RequestError, match=r"^images: '2 x 9': they are too small for SSIM"):
        ssim(torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 9))
    with pytest.raises(RequestError, match=r"^second: 3: this is the number of images, but `first` has 2"):
        ssim(images(2), images(3))


def test_targets_that_are_among_the_generated_images_are_covered_wholly():
    targets, others = images(3), images(20, 1)
    found = mc_ssim(targets, torch.cat([others, targets]))
    assert found.values == pytest.approx((1, 1, 1), abs=1e-7)
    assert found.nearest == (20, 21, 22)
    assert found.window == 7
    assert found.mean == pytest.approx(1, abs=1e-7)


def test_mode_coverage_is_the_largest_ssim_and_counts_missed_modes():
    targets, generated = images(3), torch.cat([images(1), images(9, 1)])
    found = mc_ssim(targets, generated)
    wanted = [float(max(direct_ssim(target[None].expand_as(generated), generated, 7))) for target in targets]
    assert found.values == pytest.approx(wanted, abs=1e-7)
    assert found.mean == pytest.approx(sum(wanted) / 3, abs=1e-7)
    assert found.values[0] > 0.999 > 0.8 > max(found.values[1:])


def test_mode_coverage_does_not_depend_on_order_or_on_blocks():
    targets, generated = images(4), images(50, 1)
    found = mc_ssim(targets, generated)
    order = torch.randperm(50)
    mixed = mc_ssim(targets.flip(0), generated[order], most_pixels=1)
    assert mixed.values == pytest.approx(found.values[::-1], abs=1e-6)
    assert [int(order[place]) for place in mixed.nearest] == list(found.nearest[::-1])


# --- reconstruction ----------------------------------------------------------------------------------------------------


def test_a_perfect_reconstruction():
    found = reconstruction(images(5), images(5), PLAIN)
    assert (found.mse.mean, found.mse.standard_error, found.n, found.window) == (0, 0, 5, 7)
    assert found.ssim.mean == pytest.approx(1, abs=1e-7)
    assert found.perceptual is not None
    assert found.perceptual.mean == 0


def test_errors_of_known_size_with_their_standard_error():
    real = torch.zeros(3, 1, 8, 8)
    off = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    found = reconstruction(real, real + off, PLAIN)
    squares = np.array([0.01, 0.04, 0.09])
    assert found.mse.mean == pytest.approx(squares.mean(), rel=1e-6)
    assert found.mse.standard_error == pytest.approx(squares.std(ddof=1) / 3**0.5, rel=1e-6)
    assert found.perceptual is not None
    assert found.perceptual.mean == pytest.approx(0.2 * 8, rel=1e-6)
    assert found.distance == "pixels, not scaled"


def test_one_image_has_no_standard_error_and_without_a_distance_none_is_told():
    found = reconstruction(images(1), images(1, 1))
    assert found.mse.standard_error is None
    assert found.ssim.mean == pytest.approx(float(direct_ssim(images(1), images(1, 1), 7)), abs=1e-7)
    assert (found.perceptual, found.distance) == (None, None)


def test_reconstructions_that_do_not_fit_are_refused_by_name():
    with pytest.raises(RequestError, match=r"^reconstructed: 2: this is the number of reconstructions, for 3 images"):
        reconstruction(images(3), images(2))
    with pytest.raises(RequestError, match=r"^reconstructed: 3: this is the number of channels, but `real` has 1"):
        reconstruction(images(3), images(3, channels=3))
