"""A prepared real set measures as the plain metrics do, and its bootstrap draws spread as repeated experiments do."""

import time

import numpy as np
import pytest

from handful.errors import RequestError
from handful.metrics import frechet, prdc
from handful.metrics.catalogue import METRICS
from handful.metrics.reference import Reference, Sets, draw_counts, redrawn_frechet, redrawn_mean, redrawn_members


def redrawn(reference: Reference, generated: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """What the table of metrics says of every draw."""
    sets = Sets(reference, generated)
    names = ("precision", "density", "coverage", "f1", "frechet")
    return {metric.name: metric.redraw(sets, counts) for metric in METRICS if metric.name in names and metric.redraw}


def sets(m: int, n: int, width: int, seed: int = 0, scale: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    real, made = random.normal(size=(m, width)), scale * random.normal(size=(n, width)) + 0.2
    return real.astype(np.float32), made.astype(np.float32)


def test_a_reference_measures_as_the_plain_metrics_do_however_often():
    real, made = sets(120, 90, 12)
    reference = Reference(real, 4)
    for generated in (made, made[:40], made):
        assert reference.prdc(generated) == prdc(real, generated, 4)
        assert reference.frechet(generated) == frechet(real, generated)


def test_members_name_the_balls_that_hold_an_image_and_one_image_in_each():
    real, made = sets(80, 60, 6)
    found = Reference(real, 3).members(made)
    within = np.sort(np.square(real[:, None].astype(float) - real[None]).sum(2), axis=1)[:, 3]  # itself is the 0th
    inside = np.square(real[:, None].astype(float) - made[None]).sum(2) <= within[:, None]
    np.testing.assert_array_equal(found.held, inside.sum(0))
    np.testing.assert_array_equal(found.holds, inside.sum(1))
    assert (found.one[found.holds == 0] == -1).all()
    assert inside[found.holds > 0, found.one[found.holds > 0]].all()


def test_draws_hold_as_many_images_of_each_class_as_there_are_and_the_seed_decides():
    labels = ["a"] * 30 + ["b"] * 20
    counts = draw_counts(labels, 40, 3)
    assert counts.shape == (40, 50)
    assert (counts[:, :30].sum(1) == 30).all()
    assert (counts[:, 30:].sum(1) == 20).all()
    assert np.array_equal(counts, draw_counts(labels, 40, 3))
    assert not np.array_equal(counts, draw_counts(labels, 40, 4))
    # a share of (1 - 1/n)^n = .36 is left out; 2,000 places, spread .007: 5 of them a false alarm in a million
    assert np.mean(counts == 0) == pytest.approx(0.36, abs=0.035)
    # classes of few images: from all, or one image alone would always be drawn once
    few = draw_counts(["a"] * 30 + ["b"] * 7, 40, 3)
    assert (few.sum(1) == 37).all()
    assert len(set(few[:, 30:].sum(1))) > 3


def test_a_fixed_number_of_each_class_is_no_chance():
    """Two classes far apart, 40 images each: the Frechet distance spreads as it does with 40 of each, and no more."""
    random = np.random.default_rng(0)
    apart = np.repeat([[0.0], [20.0]], 40, axis=0)

    def fresh() -> np.ndarray:
        return random.normal(size=(80, 4)) + apart

    reference = Reference(random.normal(size=(80, 4)) + apart, 5)
    spread = np.std([reference.frechet(fresh()) for _ in range(60)])
    made, labels = fresh(), ["a"] * 40 + ["b"] * 40
    found = redrawn(reference, made, draw_counts(labels, 200, 0))["frechet"].std()
    assert 0.6 * spread < found < 2 * spread
    assert redrawn(reference, made, draw_counts(["all"] * 80, 200, 0))["frechet"].std() > 4 * spread


def test_the_draw_that_takes_every_image_once_is_the_set_itself():
    real, made = sets(100, 70, 10)
    drawn = redrawn(Reference(real, 5), made, np.ones((1, 70), np.int32))
    direct = prdc(real, made, 5)
    for name in ("precision", "density", "coverage", "f1"):
        assert drawn[name][0] == pytest.approx(getattr(direct, name), abs=1e-12)
    assert drawn["frechet"][0] == pytest.approx(frechet(real, made), rel=1e-9)


def test_draws_of_precision_density_and_frechet_measure_the_repeated_images():
    real, made = sets(100, 70, 10)
    counts = draw_counts(["a"] * 70, 5, 0)
    drawn = redrawn(Reference(real, 5), made, counts)
    found = Reference(real, 5).members(made)
    for draw, count in enumerate(counts):
        repeated = np.repeat(made, count, axis=0)
        assert drawn["precision"][draw] == pytest.approx(np.repeat(found.held > 0, count).mean())
        assert drawn["density"][draw] == pytest.approx(np.repeat(found.held, count).mean() / 5)
        assert drawn["frechet"][draw] == pytest.approx(frechet(real, repeated), rel=1e-9)
    np.testing.assert_allclose(redrawn_mean(np.arange(70), counts), [np.repeat(np.arange(70), c).mean() for c in counts])


def test_coverage_without_an_image_is_exactly_coverage_of_the_others():
    real, made = sets(60, 30, 8)
    reference = Reference(real, 3)
    counts = np.ones((30, 30), np.int32) - np.eye(30, dtype=np.int32)
    left_out = redrawn_members(reference.members(made), counts)["coverage"]
    direct = [reference.prdc(np.delete(made, row, axis=0)).coverage for row in range(30)]
    np.testing.assert_allclose(left_out, direct, atol=1e-12)
    assert len(set(direct)) > 2


def test_the_frechet_distance_of_many_features_is_taken_where_they_vary():
    """200 features of rank 20: the leading directions hold everything, so each draw is exact."""
    real, made = sets(150, 120, 20)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(200, 20)))[0].T
    wide = [(part @ turn).astype(np.float64) for part in (real, made)]
    counts = draw_counts(["a"] * 120, 3, 0)
    for draw, count in zip(redrawn_frechet(wide[0], wide[1], counts, directions=64), counts, strict=True):
        assert draw == pytest.approx(frechet(wide[0], np.repeat(wide[1], count, axis=0)), rel=1e-6)


@pytest.mark.parametrize(
    ("m", "n", "width", "scale"), [(200, 200, 8, 0.9), (200, 200, 8, 0.5), (400, 40, 8, 1.0), (100, 400, 6, 1.0)]
)
def test_the_draws_spread_as_much_as_new_images_of_the_generator_do(m, n, width, scale):
    """80 fresh sets against the draws of four of them, the real set kept: neither half nor double.

    (Measured by drawing alone, coverage of 40 images would spread half as much as it does.)
    """
    real, _ = sets(m, 1, width)
    reference = Reference(real, 5)
    fresh = [sets(1, n, width, seed, scale)[1] for seed in range(1, 81)]
    scores = [reference.prdc(made) for made in fresh]
    wanted = {name: np.std([getattr(s, name) for s in scores]) for name in ("precision", "density", "coverage", "f1")}
    wanted["frechet"] = np.std([reference.frechet(made) for made in fresh])
    drawn = [redrawn(reference, made, draw_counts(["a"] * n, 200, seed)) for seed, made in enumerate(fresh[:4])]
    for name, spread in wanted.items():
        found = np.mean([each[name].std() for each in drawn])
        assert 0.7 * spread - 0.001 < found < 2 * spread + 0.003, name


def test_a_thousand_images_of_768_features_are_drawn_two_hundred_times_in_seconds():
    real, made = sets(1000, 1000, 768)
    start = time.process_time()
    drawn = redrawn(Reference(real, 5), made, draw_counts(["a"] * 1000, 200, 0))
    assert time.process_time() - start < 20  # 0.7 on one core of the machine that this was written on
    assert all(np.isfinite(values).all() and values.shape == (200,) for values in drawn.values())


def test_too_few_real_images_for_k_are_refused():
    with pytest.raises(RequestError, match=r"^real: 5"):
        Reference(np.eye(5), 5).members(np.eye(5))
