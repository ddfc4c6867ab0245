"""A recipe says everything, and what is wrong with it is said by its dotted name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from handful.errors import RequestError
from handful.guidance.cfg import CFGRequest
from handful.guidance.chamfer import ChamferRequest
from handful.guidance.energy import EnergyRequest
from handful.recipe.file import overridden, parse_yaml, read_recipe, recipe_yaml
from handful.recipe.resolve import complete
from handful.recipe.schema import Recipe, for_model, recipe_from, with_defaults

DIGITS = {"model": {"name": "digits"}}


def refused(data: dict) -> RequestError:
    with pytest.raises(RequestError) as caught:
        recipe_from(data)
    return caught.value


def test_every_default_is_written_out():
    recipe, _ = with_defaults(recipe_from(DIGITS | {"exemplars": {"path": "/x"}}))
    data = yaml.safe_load(recipe_yaml(recipe))
    assert data["sampler"] == {
        "name": "dpmpp_2m",
        "steps": 18,
        "spacing": None,
        "eta": 0.0,
        "variance": None,
        "recurrence": 1,
        "clamp": None,
    }
    assert (data["per_class"], data["cohort"], data["seed"], data["format"]) == (64, 64, 0, 1)
    assert set(data["guidance"][0]) == set(ChamferRequest.model_fields)
    assert recipe_from(data) == recipe


def test_the_same_recipe_is_the_same_text():
    one = recipe_from({"model": {"name": "digits"}, "seed": 3, "classes": [1, "2"]})
    other = recipe_from({"classes": ["1", "2"], "seed": 3, "model": {"name": "digits"}})
    assert recipe_yaml(one) == recipe_yaml(other)


@pytest.mark.parametrize(
    ("data", "field", "said"),
    [
        ({}, "model", "digits"),
        ({"model": {}}, "model.name", "missing"),
        ({"model": "digits"}, "model", "name, null_class"),
        (DIGITS | {"sampler": {"stepz": 3}}, "sampler.stepz", "Did you mean 'steps'?"),
        (DIGITS | {"per_clas": 3}, "per_clas", "Did you mean 'per_class'?"),
        (DIGITS | {"per_class": 0}, "per_class", "greater than or equal to 1"),
        (DIGITS | {"per_class": "64"}, "per_class", "without quotes"),
        (DIGITS | {"per_class": 1.5}, "per_class", "whole number"),
        (DIGITS | {"per_class": True}, "per_class", "whole number"),
        (DIGITS | {"format": 2}, "format", "Choices: 1"),
        (DIGITS | {"sampler": {"name": "dpm"}}, "sampler.name", "ddpm"),
        (DIGITS | {"sampler": {"eta": 2}}, "sampler.eta", "less than or equal to 1"),
        (DIGITS | {"guidance": [{"method": "chamfr"}]}, "guidance[0].method", "Did you mean 'chamfer'?"),
        (DIGITS | {"guidance": [{"scale": 1}]}, "guidance[0].method", "chamfer, energy, auto, classifier"),
        (DIGITS | {"guidance": ["cfg"]}, "guidance[0]", "Write"),
        (DIGITS | {"guidance": [{"method": "cfg", "jacobian": "exact"}]}, "guidance[0].jacobian", "no such key"),
        (DIGITS | {"guidance": [{"method": "chamfer", "scale": -1}]}, "guidance[0].scale", "greater"),
        (DIGITS | {"guidance": [{"method": "chamfer", "jacobian": "none"}]}, "guidance[0].jacobian", "gaussian"),
        (DIGITS | {"guidance": [{"method": "cfg", "scale": float("nan")}]}, "guidance[0].scale", "finite"),
        (DIGITS | {"guidance": [{"method": "cfg", "noise": [0, float("inf")]}]}, "guidance[0].noise[1]", "null"),
        (DIGITS | {"guidance": [{"method": "cfg", "interval": [1, 0]}]}, "guidance[0].interval", "the low end comes first"),
        (
            DIGITS | {"guidance": [{"method": "chamfer", "hold": True, "normalize": "none"}]},
            "guidance[0].hold",
            "Set hold to false",
        ),
        ({"model": {"name": "digits", "device": "gpu"}}, "model.device", "cuda"),
        (DIGITS | {"classes": []}, "classes", "at least 1"),
        (DIGITS | {"classes": [False]}, "classes[0]", "quotes"),
        (DIGITS | {"chunk": {1, 2}}, "recipe", "quotes"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(data: dict, field: str, said: str):
    error = refused(data)
    assert error.field == field
    assert said in str(error)


def test_several_faults_are_told_together():
    error = refused(DIGITS | {"seed": "x", "cohort": 0})
    assert {"seed", "cohort"} <= {error.field, *(w.strip(":.") for w in str(error).split())}


def test_python_refuses_misspelt_names_too():
    with pytest.raises(RequestError, match="per_class"):
        Recipe(model={"name": "digits"}, per_clas=3)  # type: ignore[call-arg, arg-type]


def test_guidance_is_chamfer_where_there_are_exemplars_and_none_otherwise():
    assert with_defaults(recipe_from(DIGITS))[0].guidance == ()
    recipe, notes = with_defaults(recipe_from(DIGITS | {"exemplars": {"path": "/x"}}))
    assert recipe.guidance == (for_model(ChamferRequest(), "digits", 18),)
    assert [note.partition(",")[0] for note in notes[1:]] == ["guidance[0].features: pixels", "guidance[0].margin: 1"]
    assert with_defaults(recipe_from(DIGITS | {"exemplars": {"path": "/x"}, "guidance": []}))[0].guidance == ()


def test_in_pixels_chamfer_keeps_a_margin_unless_one_is_stated_and_elsewhere_it_is_the_papers():
    def margin(model: str, **said: object) -> float:
        done = for_model(ChamferRequest.model_validate(said), model, 18)
        return ChamferRequest.model_validate(done.model_dump()).margin

    assert margin("digits") == margin("/m", features="pixels") == 1
    assert margin("digits", margin=0.0) == margin("digits", features="digits-guide") == margin("/m") == 0


def test_another_model_compares_by_dinov2_unless_told_otherwise():
    data = {"model": {"name": "/m"}, "exemplars": {"path": "/x"}}
    assert with_defaults(recipe_from(data))[0].guidance == (ChamferRequest(features="dinov2", every=4, hold=True),)
    told = data | {"guidance": [{"method": "chamfer", "features": "pixels"}]}
    assert with_defaults(recipe_from(told))[0].guidance == (
        ChamferRequest(features="pixels", scale=0.2, jacobian="gaussian", every=1, hold=False, margin=1.0),
    ), "in pixels any model takes the settings that were measured there"


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "model: {name: x, name: y}", "a: [1", "a: !!python/object:os.system {}"])
def test_yaml_that_is_broken_ambiguous_or_unsafe_is_refused(text: str):
    with pytest.raises(RequestError, match=r"line [12]"):
        parse_yaml(text, "recipe", "r.yaml")


def test_a_number_with_an_exponent_is_a_number():
    assert parse_yaml("a: 4e-1\nb: 1e3", "recipe", "r")["a"] == 0.4


def test_paths_of_a_recipe_are_relative_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "here" / "guide.py").touch()
    text = (
        "model: {name: model}\nexemplars: {path: ../real}\nprovenance: {torch: '1'}\n"
        "guidance: [{method: chamfer, features: 'guide.py:make'}, {method: chamfer, features: facebook/dinov2-base}]"
    )
    (tmp_path / "here" / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe("here/recipe.yaml")
    assert recipe.model.name == str(tmp_path / "here" / "model")
    assert recipe.exemplars.path == str(tmp_path / "real")
    assert [term.model_dump()["features"] for term in recipe.guidance or ()] == [
        f"{tmp_path}/here/guide.py:make",
        "facebook/dinov2-base",
    ]


@pytest.mark.parametrize("content", [None, "", "- 1", "3: 4", b"\xff\xfe"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str | bytes | None):
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RequestError):
        read_recipe(path)


def test_options_override_the_recipe_and_keep_what_they_do_not_mention():
    data = {
        "model": {"name": "digits", "dtype": "bfloat16"},
        "guidance": [{"method": "chamfer", "scale": 0.1, "every": 3}, {"method": "cfg", "scale": 2}],
    }
    settings = ["guidance.chamfer.noise=[0.1, 3]", "guidance.0.hold=true", "model.null_class=10"]
    flags = {"sampler.steps": 5, "seed": None}
    changed = overridden(data, flags, guidance=["chamfer"], scale=0.7, settings=settings)
    recipe = recipe_from(changed)
    assert recipe.guidance == (ChamferRequest(scale=0.7, every=3, noise=(0.1, 3.0), hold=True),)
    assert recipe.model.dtype == "bfloat16"
    assert (recipe.model.null_class, recipe.sampler.steps) == (10, 5)
    assert data["guidance"][0] == {"method": "chamfer", "scale": 0.1, "every": 3}, "the original must not change"


def test_counts_by_class_change_the_classes_they_name_and_one_number_changes_all():
    def asked(data: dict[str, object], value: object) -> tuple[list[str] | None, dict[str, int]]:
        recipe = recipe_from(overridden(DIGITS | data, {"per_class": value}))
        classes = list(recipe.classes) if recipe.classes else None
        return classes, {name: recipe.images_of(name) for name in "012"}

    stored = {"classes": ["0", "1", "2"], "per_class": 8}
    assert asked(stored, {"1": 20}) == (["0", "1", "2"], {"0": 8, "1": 20, "2": 8})
    grown = stored | {"per_class": 64, "counts": {"0": 8, "1": 20, "2": 8}}
    assert asked(grown, {"2": 9})[1] == {"0": 8, "1": 20, "2": 9}
    assert asked(grown, 30)[1] == {"0": 30, "1": 30, "2": 30}
    assert asked({"per_class": {"0": 5, "1": 6}}, {"1": 7}) == (["0", "1"], {"0": 5, "1": 7, "2": 64})
    assert asked({}, {"1": 20})[0] == ["1"]
    with pytest.raises(RequestError, match="per_class: 'otter=5': otter is not among the classes"):
        asked(stored, {"otter": 5})
    with pytest.raises(RequestError, match="otter is not among the classes"):
        recipe_from(DIGITS | {"classes": ["0"], "per_class": {"0": 1, "otter": 5}})


def test_a_list_for_a_prompt_is_several_prompts_and_no_text():
    data = overridden(DIGITS, {}, settings=["model.prompts.cat=[a, b]"])
    assert recipe_from(data).model.prompts["cat"] == ("a", "b")
    text = overridden(DIGITS, {}, settings=["model.prompts.cat=a cat: on a mat"])
    assert text["model"]["prompts"]["cat"] == "a cat: on a mat"


def test_what_is_asked_for_and_has_no_effect_is_told_or_refused():
    words = {"model": {"name": "digits", "negative_prompt": "blurred"}, "exemplars": {"path": "/x"}, "guidance": []}
    _, notes = complete(recipe_from(words))
    assert [note.partition(":")[0] for note in notes] == ["exemplars", "model.negative_prompt"]
    assert complete(recipe_from(words | {"guidance": [{"method": "cfg"}, {"method": "energy"}]}))[1] == [
        "guidance[1].features: pixels, as none are named; they compare images with the exemplars"
    ]
    assert len(complete(recipe_from(words | {"start": {"depth": 0.5}}))[1]) == 1, "images start from the exemplars"
    with pytest.raises(RequestError, match=r"exemplars\.k: 4: there are no exemplars to draw"):
        complete(recipe_from(DIGITS | {"exemplars": {"k": 4}}))


def test_guidance_may_be_taken_away_or_made():
    assert overridden({"guidance": [{"method": "cfg"}]}, {}, guidance=["none"])["guidance"] == []
    made = recipe_from(overridden(DIGITS, {}, guidance=["chamfer", "cfg"], features="pixels"))
    assert made.guidance == (ChamferRequest(features="pixels"), CFGRequest())
    auto = overridden(DIGITS, {"exemplars.path": "/x"}, scale=0.3)
    assert recipe_from(auto).guidance == (ChamferRequest(scale=0.3),)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": ["none", "cfg"]},
        {"guidance": ["cgf"]},
        {"scale": 1.0},
        {"guidance": ["cfg", "chamfer"], "scale": 1.0},
        {"guidance": ["cfg"], "features": "pixels"},
        {"settings": ["seed"]},
        {"settings": ["=3"]},
        {"settings": ["seed.more=3"]},
        {"settings": ["sampler.steps=[1"]},
        {"guidance": ["cfg"], "settings": ["guidance.3.scale=1"]},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict):
    with pytest.raises(RequestError):
        overridden(DIGITS | {"seed": 1}, {}, **options)


def test_what_a_user_states_wins_over_the_models_own_defaults():
    term = for_model(ChamferRequest(scale=0.7, jacobian="exact"), "digits", 18)
    assert (term.scale, term.jacobian, term.features) == (0.7, "exact", "pixels")
    assert for_model(EnergyRequest(), "/m", 18) == EnergyRequest(features="dinov2", every=4, hold=True)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (4, 1), (7, 1), (10, 2), (18, 4), (30, 7), (40, 10)])
def test_every_left_open_guides_four_steps_or_a_few_more_and_holds_the_direction_between(steps: int, every: int):
    term = for_model(ChamferRequest(), "/m", steps)
    assert (term.every, term.hold) == (every, every > 1)
    assert for_model(ChamferRequest(normalize="none"), "/m", steps).hold is False
    assert for_model(ChamferRequest(every=2, hold=False), "/m", steps).hold is False


@pytest.mark.parametrize("given", ["{region}--{object}", "'{region}--{object}'", '"{region}--{object}"'])
def test_a_text_needs_no_quotes_on_the_command_line(given: str):
    assert overridden(DIGITS, {}, settings=[f"model.class_pattern={given}"])["model"]["class_pattern"] == "{region}--{object}"


def test_a_folder_of_features_becomes_absolute_with_its_size_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "dino").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, wanted in (("dino", f"{tmp_path}/dino"), ("dino@56", f"{tmp_path}/dino@56"), ("dinov2@112", "dinov2@112")):
        data = overridden(DIGITS, {}, guidance=["chamfer"], features=given)
        assert data["guidance"][0]["features"] == wanted
