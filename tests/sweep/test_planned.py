"""Which sets a sweep makes, and by which recipes."""

from __future__ import annotations

import pytest
from support.sweeps import digits_data, digits_sweep

from handful.errors import RequestError
from handful.sweep import read_sweep, sweep_from
from handful.sweep.planned import Setting, completed, planned_sets
from handful.sweep.store import sweep_yaml

TWO = [{"method": "chamfer", "features": "pixels", "scale": 0.2}, {"method": "cfg", "scale": 3.0}]


def plan(root, **changes):
    return planned_sets(completed(digits_sweep(root, **changes)))


def test_every_seed_has_every_setting_once_and_the_baseline_first(digits):
    methods = {"chamfer": {"guidance": TWO[:1], "scales": [0.1, 0.3], "k": [2, 8]}, "none": {"guidance": []}}
    sets = plan(digits, methods=methods, seeds=[5, 6])
    settings = [Setting("none", 0.0, 0), *(Setting("chamfer", scale, k) for k in (2, 8) for scale in (0.1, 0.3))]
    assert [(each.seed, each.setting) for each in sets] == [(seed, one) for seed in (5, 6) for one in settings]
    assert list(dict.fromkeys(each.setting for each in sets)) == settings
    assert len({each.name for each in sets}) == len(sets), "no two sets share a directory"


def test_a_seed_is_of_the_noise_and_of_the_exemplars_draw_alike(digits):
    sets = [each for each in plan(digits, seeds=[5]) if each.setting.k]
    assert {(each.recipe.seed, each.recipe.exemplars.seed, each.recipe.exemplars.k) for each in sets} == {(5, 5, 4)}


def test_methods_that_no_exemplars_guide_are_given_none(digits):
    none = plan(digits)[0]
    assert (none.setting.k, none.recipe.exemplars.path) == (0, None)
    assert none.recipe.classes == ("1", "4"), "they generate the same classes all the same"


def test_classes_are_those_of_the_exemplars_where_none_are_named(digits):
    data = digits_data(digits)
    del data["recipe"]["classes"]
    assert {each.recipe.classes for each in planned_sets(completed(sweep_from(data)))} == {("1", "4")}


@pytest.mark.parametrize(("term", "scales"), [(0, (0.7, 3.0)), (1, (0.2, 0.7))])
def test_scales_go_into_the_term_that_is_named(digits, term, scales):
    sets = plan(digits, methods={"none": {"guidance": []}, "both": {"guidance": TWO, "scales": [0.7], "term": term}})
    assert tuple(each.scale for each in sets[1].recipe.guidance or ()) == scales
    assert sets[1].setting == Setting("both", 0.7, 4)


def test_without_scales_the_terms_own_scale_is_the_settings(digits):
    own = plan(digits, methods={"none": {"guidance": []}, "both": {"guidance": TWO, "term": 1}})[1]
    assert own.setting.scale == 3.0
    default = plan(digits, methods={"none": {"guidance": []}, "c": {"guidance": [{"method": "chamfer", "features": "pixels"}]}})
    assert default[1].setting.scale == 0.2, "what a recipe's default is in pixels"


def test_a_method_may_have_its_own_sampler_and_keeps_the_others_rest(digits):
    data = digits_data(digits, methods={"none": {"guidance": []}, "long": {"guidance": [], "sampler": {"steps": 9}}})
    data["recipe"]["sampler"] = {"name": "ddim", "steps": 3, "eta": 0.5}
    samplers = {each.setting.method: each.recipe.sampler for each in planned_sets(completed(sweep_from(data)))}
    assert [(s.name, s.steps, s.eta) for s in (samplers["none"], samplers["long"])] == [("ddim", 3, 0.5), ("ddim", 9, 0.5)]


def test_the_completed_request_as_yaml_is_the_same_sweep(digits, tmp_path):
    """Defaults depend on features and steps; written out, they must not be taken for something the user has stated."""
    request = completed(digits_sweep(digits, within={"flops_ratio": 1.5}, seeds=[0, 3]))
    (tmp_path / "sweep.yaml").write_bytes(sweep_yaml(request, {"torch": "0"}))
    again = completed(read_sweep(tmp_path / "sweep.yaml"))
    assert again == request
    assert planned_sets(again) == planned_sets(request)


def test_settings_that_contradict_each_other_name_their_method(digits):
    with pytest.raises(RequestError) as caught:
        plan(digits, methods={"none": {"guidance": []}, "rare": {"guidance": [{"method": "cfg", "every": 99}]}})
    assert caught.value.field == "methods.rare.guidance[0].every"


def test_exemplars_and_their_number_must_be_said(digits):
    data = digits_data(digits)
    del data["k"]
    with pytest.raises(RequestError, match=r"methods\.chamfer is guided by exemplars, and their number is missing"):
        planned_sets(completed(sweep_from(data)))
    data["recipe"]["exemplars"]["per_class"] = 6
    assert {each.setting.k for each in planned_sets(completed(sweep_from(data)))} == {0, 6}
    data["recipe"]["exemplars"] = {}
    with pytest.raises(RequestError, match="there are no exemplars to draw"):
        planned_sets(completed(sweep_from({**data, "k": [2]})))
