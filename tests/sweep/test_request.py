"""What a sweep may ask for, and how it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.sweeps import digits_data

from handful.errors import RequestError
from handful.sweep import read_sweep, sweep_from
from handful.sweep.request import UtilityRequest

ROOT = Path("/data")


def changed(**changes):
    return sweep_from(digits_data(ROOT, **changes))


def test_what_is_left_out_has_the_defaults():
    asked = sweep_from(
        {"recipe": {"model": {"name": "digits"}}, "methods": {"none": {"guidance": []}}, "real": "/r", "judge": "pixels"}
    )
    assert (asked.seeds, asked.neighbours, asked.audit, asked.validation) == ((0,), 5, True, 0.5)
    assert (asked.objective, asked.within, asked.baseline) == ("robust_f1", {}, "none")
    assert asked.utility == UtilityRequest(), "downstream accuracy is measured unless it is null"


def test_paths_are_relative_to_the_sweeps_file_and_a_recipe_may_be_a_file(tmp_path):
    (tmp_path / "sweeps").mkdir()
    recipe = {
        "model": {"name": "digits"},
        "exemplars": {"path": "pool", "k": 4, "seed": 7},
        "seed": 3,
        "guidance": [{"method": "cfg"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "judge.py").write_text("")
    asked = {
        "recipe": "../recipe.yaml",
        "real": "../real",
        "judge": "../judge.py:load",
        "utility": {"test": "../test"},
        "methods": {"none": {"guidance": []}, "own": {"guidance": [{"method": "chamfer", "features": "../judge.py:guide"}]}},
    }
    (tmp_path / "sweeps" / "sweep.yaml").write_text(yaml.safe_dump(asked))
    found = read_sweep(tmp_path / "sweeps" / "sweep.yaml")
    assert found.recipe.exemplars.path == str(tmp_path / "pool"), "a recipe's paths are relative to the recipe"
    assert (found.real, found.judge) == (str(tmp_path / "real"), f"{tmp_path / 'judge.py'}:load")
    assert found.utility is not None
    assert found.utility.test == str(tmp_path / "test")
    assert getattr(found.methods["own"].guidance[0], "features", None) == f"{tmp_path / 'judge.py'}:guide"
    assert found.recipe.guidance is None, "the file's guidance is not used"
    assert (found.recipe.seed, found.recipe.exemplars.seed) == (0, 0), "nor are its seeds"


def test_settings_are_laid_over_the_file(tmp_path, monkeypatch):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(digits_data(ROOT)))
    monkeypatch.chdir(tmp_path)
    found = read_sweep("sweep.yaml", ["recipe.per_class=5", "seeds=[1, 2]", "methods.chamfer.guidance.0.margin=0.5"])
    assert (found.recipe.per_class, found.seeds) == (5, (1, 2))
    assert getattr(found.methods["chamfer"].guidance[0], "margin", None) == 0.5


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"objektive": "f1"}, "objektive", "Did you mean 'objective'"),
        ({"utility": {"step": 20}}, "utility.step", "Did you mean 'steps'"),
        ({"recipe": {"model": {"name": "digits", "clases": ["1"]}}}, "recipe.model.clases", "Did you mean 'classes'"),
        ({"recipe": {"model": {"name": "digits"}, "per_clas": 3}}, "recipe.per_clas", "Did you mean 'per_class'"),
        ({"methods": {"a": {"guidance": [], "scale": [1]}}}, "methods.a.scale", "Did you mean 'scales'"),
        ({"methods": {"cfg": {"guidance": [{"method": "cfg", "skale": 1}]}}}, "methods.cfg.guidance[0].skale", "'scale'"),
        ({"methods": {"a": {"guidance": [{"method": "chamfr"}]}}}, "methods.a.guidance[0].method", "Did you mean 'chamfer'"),
        ({"methods": {"a": {"guidance": [], "sampler": {"step": 3}}}}, "methods.a.sampler.step", "Did you mean 'steps'"),
        ({"methods": {"a": 3}}, "methods.a", "guidance, scales, term, k, sampler"),
        ({"seeds": [0, "1"]}, "seeds[1]", "without quotes"),
        ({"objective": "robust_f2"}, "objective", "Did you mean 'robust_f1'"),
        ({"within": {"cost": 1.15}}, "within", "cost_ratio"),
        ({"baseline": "nome"}, "baseline", "Did you mean 'none'"),
        ({"validation": 1.0}, "validation", "less than 1"),
        ({"audit": False, "objective": "gain_robust_f1"}, "objective", "audit"),
        ({"utility": None, "objective": "utility"}, "objective", "utility is null"),
        ({"seeds": [1, 1]}, "seeds", "listed twice"),
        ({"methods": {"none": {"guidance": [], "scales": [1.0]}}}, "methods.none.scales", "no term to scale"),
        ({"methods": {"none": {"guidance": [{"method": "cfg"}], "term": 1}}}, "methods.none.term", "counted from 0"),
        ({"methods": {"none": {"guidance": []}, "../x": {"guidance": []}}}, "methods", "folder"),
        ({"methods": {"none": {"guidance": [{"method": "cfg"}], "scales": [1, 2]}}}, "baseline", "several scales"),
        ({"recipe": {"model": {"name": "digits"}, "seed": 3}}, "recipe.seed", "under seeds"),
        ({"recipe": {"model": {"name": "digits"}, "guidance": [{"method": "cfg"}]}}, "recipe.guidance", "methods.NAME"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field_with_the_remedy(change, field, said):
    with pytest.raises(RequestError) as caught:
        changed(**change)
    assert caught.value.field == field
    assert said in str(caught.value)


def test_a_method_may_have_any_terms_name():
    """The union's tag is no part of a field's name, a method of that name is."""
    with pytest.raises(RequestError) as caught:
        changed(methods={"none": {"guidance": []}, "chamfer": {"guidance": [{"method": "chamfer", "margn": 1}]}})
    assert caught.value.field == "methods.chamfer.guidance[0].margn"


def test_a_missing_file_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_sweep(tmp_path / "nothing.yaml")
