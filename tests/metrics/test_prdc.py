"""Precision, recall, density, coverage and the neighbours beneath them, against brute force and cases known exactly."""

import numpy as np
import pytest
import torch

from handful.errors import RequestError
from handful.metrics import PRDC, nearest, neighbour_radii, prdc
from handful.metrics._screen import direct, frame_of, lower_bounds, screened
from handful.metrics.prdc import expected_coverage


def squared_distances(a, b):
    """Every difference in float64: what everything else must equal, (len a, len b)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array([np.square(a - row).sum(axis=1) for row in b]).T


def brute_force(real, generated, k):
    within_real, within_generated = squared_distances(real, real), squared_distances(generated, generated)
    np.fill_diagonal(within_real, np.inf)
    np.fill_diagonal(within_generated, np.inf)
    real_radii, generated_radii = np.sort(within_real, 1)[:, k - 1], np.sort(within_generated, 1)[:, k - 1]
    across = squared_distances(real, generated)
    held = across <= real_radii[:, None]
    precision, recall = held.any(0).mean(), (across <= generated_radii).any(1).mean()
    return PRDC(precision, recall, held.sum() / (k * len(generated)), held.any(1).mean(), k, len(real), len(generated))


def hard_sets(kind, seed, dtype=np.float32):
    """Pairs of sets (real, generated), each with a reason to go wrong."""
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(90, 24)), rng.normal(size=(70, 24)) * 0.8
    if kind == "offset 1e4":
        real, generated = real + 1e4, generated + 1e4
    elif kind == "tiny spread far away":
        real, generated = 1e4 + real * 0.02, 1e4 + generated * 0.02
    elif kind == "ties":
        real, generated = np.round(real[:, :3]), np.round(generated[:, :3])
    elif kind == "duplicates":
        real, generated = real[rng.integers(0, 20, 90)], generated[rng.integers(0, 5, 70)]
    elif kind == "near-duplicates":
        real = real[rng.integers(0, 20, 90)] * (1 + 1e-6 * rng.normal(size=(90, 1)))
        generated = real[rng.integers(0, 90, 70)] * (1 + 1e-6 * rng.normal(size=(70, 1)))
    elif kind == "two far clusters":
        real[::2] += 1e6
        generated[::2] += 1e6
    elif kind == "outlier":
        real[0] = 1e12
    elif kind == "huge and tiny":
        real[::3] *= 1e15
        generated[::3] *= 1e-15
    elif kind == "far apart":
        generated += 1e5
    return real.astype(dtype), generated.astype(dtype)


HARD = (
    "plain",
    "offset 1e4",
    "tiny spread far away",
    "ties",
    "duplicates",
    "near-duplicates",
    "two far clusters",
    "outlier",
    "huge and tiny",
    "far apart",
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force_in_float64_on_hard_data(kind, dtype, k):
    real, generated = hard_sets(kind, seed=1, dtype=dtype)
    assert prdc(real, generated, k, block=32) == brute_force(real, generated, k)


@pytest.mark.parametrize("kind", HARD)
def test_radii_equal_brute_force_to_the_bit(kind):
    real, _ = hard_sets(kind, seed=2)
    squared = squared_distances(real, real)
    np.fill_diagonal(squared, np.inf)
    for k in (1, 5, 89):
        np.testing.assert_array_equal(neighbour_radii(real, k, block=40), np.sqrt(np.sort(squared, 1)[:, k - 1]))


@pytest.mark.parametrize("kind", HARD)
def test_nearest_equals_brute_force_and_takes_the_first_of_ties(kind):
    keys, queries = hard_sets(kind, seed=3)
    squared = squared_distances(queries, keys)
    for block in (1, 13, 2048):
        distance, index = nearest(queries, keys, block=block)
        np.testing.assert_array_equal(index, squared.argmin(1))
        np.testing.assert_array_equal(distance, np.sqrt(squared.min(1)))


def test_the_first_of_many_equal_keys_is_nearest():
    """More copies than are kept as spares, so that which of them are kept is left to chance."""
    rng = np.random.default_rng(19)
    keys = rng.normal(size=(5, 8))[rng.integers(0, 5, 300)]
    first = [int(np.flatnonzero((keys == key).all(1))[0]) for key in keys]
    for block in (50, 2048):
        distance, index = nearest(keys, keys, block=block)
        np.testing.assert_array_equal(index, first)
        assert (distance == 0).all()


def test_a_float32_gram_matrix_alone_gets_the_offset_case_wrong():
    """Shows that the hard cases are hard: the usual shortcut changes the neighbours."""
    real, _ = hard_sets("offset 1e4", seed=1)
    squares = (real * real).sum(1)
    gram = squares[:, None] + squares - 2 * real @ real.T
    np.fill_diagonal(gram, np.inf)
    exact = neighbour_radii(real, 5)
    assert np.abs(np.sqrt(np.maximum(np.sort(gram, 1)[:, 4], 0)) / exact - 1).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", HARD)
def test_screening_bounds_hold_for_every_pair(kind, dtype):
    real, generated = hard_sets(kind, seed=4, dtype=np.float64)
    frame = frame_of(real, generated)
    a, b = screened(real, frame, dtype), screened(generated, frame, dtype)
    lower = lower_bounds(a, b, np.empty(len(real) * len(generated), dtype)).astype(np.float64)
    i, j = np.divmod(np.arange(lower.size), len(generated))
    exact = direct(real, i, generated, j).reshape(lower.shape) * frame.squared
    assert (lower <= exact).all()
    assert (exact <= lower + a.slack[:, None] + b.slack).all()


def test_a_set_crowded_with_more_near_duplicates_than_spares_is_still_exact():
    """400 points within float32's blindness of each other: ranking falls to float64 and to the differences."""
    rng = np.random.default_rng(5)
    real = np.vstack([1e3 + 1e-5 * rng.normal(size=(400, 8)), -1e3 + rng.normal(size=(50, 8))])
    generated = real[rng.permutation(450)] + 1e-6 * rng.normal(size=(450, 8))
    assert prdc(real, generated, block=128) == brute_force(real, generated, 5)


@pytest.mark.parametrize("block", [1, 7, 64, 90, 5000])
def test_block_size_does_not_matter(block):
    real, generated = hard_sets("ties", seed=6)
    assert prdc(real, generated, block=block) == prdc(real, generated)


def test_order_of_images_does_not_matter():
    real, generated = hard_sets("plain", seed=7)
    rng = np.random.default_rng(7)
    assert prdc(rng.permutation(real), rng.permutation(generated)) == prdc(real, generated)


def test_translation_scale_and_rotation_do_not_matter():
    real, generated = hard_sets("plain", seed=8, dtype=np.float64)
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(24, 24)))[0]
    assert prdc(5 * real @ rotation + 300, 5 * generated @ rotation + 300) == prdc(real, generated)


def test_swapping_the_roles_swaps_precision_and_recall():
    real, generated = hard_sets("plain", seed=9)
    one, other = prdc(real, generated), prdc(generated, real)
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert one.precision != one.recall


def test_mode_collapse_has_high_precision_low_recall_low_coverage():
    """Pins the convention: generated images sit on one of ten real modes."""
    rng = np.random.default_rng(10)
    modes = 100 * rng.normal(size=(10, 16))
    real = np.repeat(modes, 40, axis=0) + rng.normal(size=(400, 16))
    generated = modes[0] + 0.5 * rng.normal(size=(400, 16))
    found = prdc(real, generated)
    assert found.precision > 0.99
    assert found.recall <= 0.1
    assert found.coverage <= 0.1
    assert found.f1 == pytest.approx(2 * found.precision * found.coverage / (found.precision + found.coverage))


def test_generated_noise_around_real_modes_has_low_precision_high_recall():
    rng = np.random.default_rng(11)
    real, generated = rng.normal(size=(300, 2)), 20 * rng.normal(size=(300, 2))
    found = prdc(real, generated)
    assert found.precision < 0.5
    assert found.recall > 0.95


def test_five_points_on_a_line_by_hand():
    """Radii at k = 1: real 1, 1, 2, 4; generated 0.5 and 5.5 have radius 5. Ties at the border count as inside."""
    found = prdc(np.array([[0.0], [1], [3], [7]]), np.array([[0.5], [5.5]]), k=1)
    # 0.5 is in the balls of 0 and 1 (radius 1); 5.5 in that of 7 (radius 4); 3 (radius 2) holds neither.
    assert (found.precision, found.density, found.coverage, found.recall) == (1.0, 1.5, 0.75, 1.0)


def test_a_set_against_itself_scores_one_and_density_counts_the_border():
    real, _ = hard_sets("plain", seed=12)
    found = prdc(real, real, k=4)
    assert (found.precision, found.recall, found.coverage, found.f1) == (1, 1, 1, 1)
    assert found.density == pytest.approx(1 + 1 / 4)


def test_density_of_a_fresh_sample_is_one_on_average():
    """n k/n balls are expected to hold an image. Beyond 5 standard errors of 40 draws: a false alarm has chance about 1e-5."""
    rng = np.random.default_rng(13)
    values = [prdc(rng.normal(size=(200, 8)), rng.normal(size=(200, 8))).density for _ in range(40)]
    assert abs(np.mean(values) - 1) < 5 * np.std(values) / np.sqrt(40)


def test_the_expected_coverage_of_few_and_of_many_images_is_what_fresh_samples_get():
    draw = np.random.default_rng(0)
    for m, n, k in ((100, 12, 5), (60, 60, 5), (40, 90, 3)):
        found = [prdc(draw.normal(size=(m, 3)), draw.normal(size=(n, 3)), k).coverage for _ in range(60)]
        # the standard error is below 0.01: a false alarm is five of them
        assert np.mean(found) == pytest.approx(expected_coverage(m, n, k), abs=0.03)


def test_exact_copies_are_inside_balls_of_radius_zero():
    """Open balls would call these copies unrealistic."""
    real = np.repeat(np.eye(3), 10, axis=0)
    found = prdc(real, real[::2])
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert (neighbour_radii(real, 5) == 0).all()


def test_a_generated_set_of_one_repeated_image_has_no_recall():
    rng = np.random.default_rng(14)
    real = rng.normal(size=(100, 8))
    found = prdc(real, np.repeat(real[:1] + 0.01, 60, axis=0))
    assert found.precision == 1
    assert found.recall == 0
    assert 0 < found.coverage < 0.4


def test_nothing_shared_scores_zero_and_f1_does_not_divide_by_zero():
    real, generated = hard_sets("far apart", seed=15)
    found = prdc(real, generated)
    assert (found.precision, found.recall, found.density, found.coverage, found.f1) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_count_as_their_numpy_values(dtype):
    real, generated = (torch.from_numpy(features).to(dtype) for features in hard_sets("plain", seed=16))
    found = prdc(real.requires_grad_(), generated)
    assert found == prdc(real.detach().double().numpy(), generated.double().numpy())


def test_integers_non_contiguous_and_mixed_precision_features_are_taken():
    rng = np.random.default_rng(17)
    real, generated = rng.integers(0, 255, (40, 30), dtype=np.uint8), rng.integers(0, 255, (50, 30))
    assert prdc(real, generated) == prdc(real.astype(float), generated.astype(float))
    assert prdc(real[::2, ::3], generated[::-1, ::3].astype(np.float32)) == prdc(
        np.ascontiguousarray(real[::2, ::3]).astype(float), generated[:, ::3].astype(float)
    )


def test_the_smallest_possible_sets_work():
    found = prdc(np.array([[0.0], [1]]), np.array([[0.0], [9]]), k=1)
    assert (found.precision, found.coverage) == (0.5, 1.0)


GOOD = np.random.default_rng(0).normal(size=(12, 4))


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (GOOD[0], GOOD, 5, r"real: \(4,\): features must have the shape \(n, D\). Give one row of features per image"),
        (GOOD, GOOD[None], 5, r"generated: \(1, 12, 4\): "),
        (GOOD[:0], GOOD, 5, r"real: \(0, 4\): this shape is empty"),
        (GOOD[:, :0], GOOD, 5, r"real: \(12, 0\): this shape is empty"),
        (
            GOOD,
            GOOD[:, :3],
            5,
            r"generated: 3: the number of features differs from that of `real`, 4. Extract both with the same",
        ),
        (GOOD[:5], GOOD, 5, r"real: 5: too few images for k = 5 .*Give at least 6, or k <= 4\.$"),
        (GOOD, GOOD[:3], 5, r"generated: 3: too few images for k = 5 .*or k <= 2\.$"),
        (GOOD, GOOD[:1], 1, r"generated: 1: too few images for k = 1 .*Give at least 2\.$"),
        (GOOD, GOOD, 0, r"k: 0: this is too small. Give at least 1"),
        (GOOD, GOOD, 2.5, r"k: 2.5: this is not a whole number"),
        (np.where(np.arange(4) == 2, np.nan, GOOD), GOOD, 5, r"real: nan: at row 0, column 2; features must be finite"),
        (GOOD, np.where(np.arange(12)[:, None] == 7, -np.inf, GOOD), 5, r"generated: -inf: at row 7, column 0"),
        (GOOD * 1e40, GOOD, 5, r"real: .*at most 1e\+30"),
        (GOOD.astype(complex), GOOD, 5, r"real: dtype\('complex128'\): features must be real numbers"),
        (GOOD.astype(str), GOOD, 5, r"real: dtype\('<U"),
    ],
)
def test_errors_name_the_argument_the_value_and_the_remedy(real, generated, k, message):
    with pytest.raises(RequestError, match=message):
        prdc(real, generated, k)


def test_a_k_that_an_error_proposes_works():
    assert prdc(GOOD[:5], GOOD, k=4).k == 4


def test_helpers_refuse_what_prdc_refuses():
    with pytest.raises(RequestError, match=r"features: 5: too few images for k = 5"):
        neighbour_radii(GOOD[:5], 5)
    with pytest.raises(RequestError, match=r"keys: 2: the number of features differs from that of `queries`, 4"):
        nearest(GOOD, GOOD[:, :2])
    with pytest.raises(RequestError, match=r"keys: \(0, 4\): this shape is empty"):
        nearest(GOOD, GOOD[:0])
    with pytest.raises(RequestError, match=r"block: 0: this is too small"):
        prdc(GOOD, GOOD, block=0)


def test_memory_stays_bounded_by_the_block():
    """A full 6,000 x 6,000 float64 matrix would be 288 MB; numpy's allocations peak far below."""
    import tracemalloc

    rng = np.random.default_rng(18)
    real, generated = (rng.normal(size=(6000, 16)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    prdc(real, generated, block=512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_the_answer_reads_as_the_dict_that_users_of_the_prdc_package_know():
    points = np.random.default_rng(0).normal(size=(20, 3))
    found = prdc(points, points)
    assert found["coverage"] == found.coverage == 1.0
    assert dict(found)["precision"] == found.precision
    with pytest.raises(KeyError):
        found["accuracy"]
