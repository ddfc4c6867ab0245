"""The map puts like by like, is bounded for small sets, and is drawn with a legend."""

from __future__ import annotations

import numpy as np
import pytest

from handful.errors import RequestError
from handful.report.feature_map import bounded_perplexity, draw_map, feature_map


def clouds(n: int = 30) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=(n, 5)) + 40 * place for place, name in enumerate(("source", "generated", "targets"))}


def test_far_clouds_stay_apart_on_the_map():
    places = feature_map(clouds())
    centres = {name: values.mean(0) for name, values in places.items()}
    for name, values in places.items():
        own = np.linalg.norm(values - centres[name], axis=1).max()
        others = min(np.linalg.norm(values[:, None] - places[other], axis=2).min() for other in places if other != name)
        assert own < others


def test_a_seed_gives_one_map_and_other_seeds_draw_other_members():
    given = clouds()
    first, again = feature_map(given), feature_map(given)
    assert all((first[name] == again[name]).all() for name in given)
    assert len(feature_map(given, most=10)["source"]) == 10


def test_a_map_of_few_images_bounds_its_perplexity():
    assert bounded_perplexity(4) == 1
    assert bounded_perplexity(31) == 10
    assert bounded_perplexity(1000) == 30
    assert bounded_perplexity(1000, 50) == 50
    few = feature_map({"targets": np.eye(4)[:1], "generated": np.eye(4)[1:]})
    assert few["generated"].shape == (3, 2)
    assert np.isfinite(few["generated"]).all()


def test_features_of_one_number_can_be_mapped():
    assert np.isfinite(feature_map({"generated": np.arange(12.0)[:, None]})["generated"]).all()


def test_what_cannot_be_mapped_is_refused():
    with pytest.raises(RequestError, match=r"^features: 3: too few images for a map"):
        feature_map({"generated": np.eye(3)})
    with pytest.raises(RequestError, match=r"^features: 9: all images have the same features"):
        feature_map({"generated": np.ones((9, 4))})
    with pytest.raises(
        RequestError, match=r"^features of targets: 3: the number of features differs from that of `features of source`, 4"
    ):
        feature_map({"source": np.eye(4), "targets": np.eye(3)})
    with pytest.raises(RequestError, match=r"^perplexity: 0\.5"):
        feature_map(clouds(), perplexity=0.5)
    with pytest.raises(RequestError, match=r"^places: .*nothing to draw"):
        draw_map({"source": np.zeros((0, 2))}, 100)


def test_points_lie_where_the_map_says_and_targets_are_drawn_over_all():
    corner, centre = np.array([[-1.0, -1.0], [1.0, 1.0]]), np.array([[0.0, 0.0]])
    drawn = np.asarray(draw_map({"targets": centre, "source": np.concatenate([corner, centre])}, 200))
    top = 20  # the title's line
    assert tuple(drawn[top + 14, 14]) == tuple(drawn[top + 186, 186]) == (160, 160, 160)
    assert tuple(drawn[top + 100, 100]) == (200, 30, 30), "the star covers the dot"
    assert tuple(drawn[top + 14, 186]) == (255, 255, 255)


def test_the_legend_grows_by_a_line_a_set_and_fits_long_names():
    place = np.zeros((1, 2))
    one, two = draw_map({"a": place}, 150), draw_map({"a": place, "b": place + 1}, 150)
    assert two.height - one.height == 20
    assert draw_map({"a name that is longer than the map is wide": place}, 150).width > 250
