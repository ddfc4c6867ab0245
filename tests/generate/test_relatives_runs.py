"""Runs by the relatives and baselines: APG, CADS, limited-interval CFG, TFG and those it unites; through recipes, to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import tiny_stable_diffusion
from support.runs import contents, digits_recipe, tiny_recipe

from handful.data.images import read_image
from handful.errors import RequestError
from handful.generate.job import prepare
from handful.generate.run import run
from handful.recipe.file import read_recipe
from handful.recipe.schema import Recipe, recipe_from

RECIPES = Path(__file__).parents[2] / "recipes"
PRESETS = {
    "universal": "2302.07121",
    "freedom": "2303.09833",
    "mpgd": "2311.16424",
    "tfg": "2409.15761",
    "cfg-interval": "2404.07724",
}
CADS: dict[str, Any] = {"method": "cads", "tau1": 0.3, "scale": 0.3, "mix": 0.8}
CFG: dict[str, Any] = {"method": "cfg", "scale": 1.0}
EXACT: dict[str, Any] = {
    "method": "classifier",
    "classifier": "digits-guide",
    "scale": 1.0,
    "jacobian": "exact",
    "normalize": "none",
    "every": 1,
}


def digits(folder: Path, *guidance: dict[str, Any], **changes: Any) -> Recipe:
    """Of four images of one class, unless changed."""
    return digits_recipe(folder, guidance=list(guidance), **{"classes": ["1"], "per_class": 4, **changes})


def images_of(recipe: Recipe, out: Path) -> dict[str, bytes]:
    summary = run(prepare(recipe, out))
    assert not summary.failures
    return {file: data for file, data in contents(out).items() if file.endswith(".png") and file.startswith("images")}


def preset(name: str, **changes: Any) -> Recipe:
    return read_recipe(RECIPES / f"digits-{name}.yaml").model_copy(update={"per_class": 4, "classes": ("3", "8"), **changes})


# --- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_its_paper_and_runs(name: str, tmp_path: Path):
    assert f"arXiv {PRESETS[name]}" in (RECIPES / f"digits-{name}.yaml").read_text()
    asked = preset(name)
    few = asked.sampler.model_copy(update={"steps": 5})
    assert len(images_of(asked.model_copy(update={"sampler": few}), tmp_path / "out")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_at_its_own_number_of_steps(name: str, tmp_path: Path):
    assert len(images_of(preset(name), tmp_path / "out")) == 8


def test_outside_its_interval_the_presets_cfg_never_asks_the_unconditional_network(tmp_path: Path):
    """By the labels that the network itself is given, level by level."""
    job = prepare(preset("cfg-interval", classes=("3",)), tmp_path / "out")
    null, asked = job.denoiser.null_class, []
    assert job.recipe.guidance is not None
    low, high = job.recipe.guidance[0].noise
    job.denoiser.network.register_forward_pre_hook(  # type: ignore[attr-defined, operator]
        lambda _network, given, words: asked.append((float(given[1][0]), set(words["class_labels"].tolist()))), with_kwargs=True
    )
    run(job)
    times = {float(job.denoiser.levels.time(level).float()): float(level.ratio) for level in list(job.levels)[:-1]}
    inside = {time for time, ratio in times.items() if low <= ratio <= (high or 0)}
    assert 0 < len(inside) < len(times) == 18
    assert {time for time, labels in asked if null in labels} == inside
    assert len(asked) == len(times) + len(inside)


# --- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["shift", "held"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_tfg_with_nothing_of_its_own_is_plain_exact_guidance_to_the_byte(
    sampler: str, rule: str, digits_folder: Path, tmp_path: Path
):
    """Recurrence 1, no inner steps (mu is 0), views that nothing disturbs: the same files; unguided ones differ."""
    exact = {**EXACT, "rule": rule}
    still = {**exact, "inner": 1, "smoothing": {"samples": 4, "noise": 0.0}}
    none = {**exact, "scale": 0.0, "jacobian": "identity", "inner": 4}
    steps = {"per_class": 3, "cohort": 2, "sampler": {"name": sampler, "steps": 4, "recurrence": 1}}
    plain = images_of(digits(digits_folder, exact, **steps), tmp_path / "plain")
    special = images_of(digits(digits_folder, still, none, **steps), tmp_path / "special")
    assert len(plain) == 3
    assert plain == special
    assert plain != images_of(digits(digits_folder, **steps), tmp_path / "unguided")


def test_recurrence_inner_steps_and_smoothing_each_make_other_images(digits_folder: Path, tmp_path: Path):
    ways = {
        "plain": ([EXACT], 1),
        "recurrence": ([EXACT], 2),
        "smoothing": ([{**EXACT, "smoothing": {"samples": 2, "noise": 0.5}}], 1),
        "inner": ([EXACT, {**EXACT, "jacobian": "identity", "scale": 0.2, "inner": 3}], 1),
    }
    made = [
        images_of(
            digits(digits_folder, *guidance, per_class=2, sampler={"name": "ddim", "steps": 4, "recurrence": recurrence}),
            tmp_path / name,
        )
        for name, (guidance, recurrence) in ways.items()
    ]
    assert all(one != other for place, one in enumerate(made) for other in made[:place])


# --- APG and CADS ------------------------------------------------------------------------------------------------------


def test_scale_zero_of_either_is_no_guidance_to_the_byte(digits_folder: Path, tmp_path: Path):
    none = images_of(digits(digits_folder), tmp_path / "none")
    off = [{**CADS, "scale": 0.0}, {"method": "apg", "scale": 0.0}]
    assert images_of(digits(digits_folder, *off), tmp_path / "off") == none
    assert images_of(digits(digits_folder, CADS), tmp_path / "cads") != none
    assert images_of(digits(digits_folder, {"method": "apg", "scale": 2.0}), tmp_path / "apg") != none


def test_apg_with_everything_kept_is_cfg(digits_folder: Path, tmp_path: Path):
    whole = {"method": "apg", "scale": 1.0, "parallel": 1.0, "momentum": 0.0}
    assert _near(
        images_of(digits(digits_folder, whole), tmp_path / "apg"),
        tmp_path / "apg",
        digits(digits_folder, CFG),
        tmp_path / "cfg",
    )


def test_every_relative_composes_with_chamfer_and_a_classifier_in_one_run(digits_folder: Path, tmp_path: Path):
    chamfer = {"method": "chamfer", "features": "pixels"}
    vendi, cvsg = ({"method": name, "features": "pixels", "scale": 0.1, "every": 2} for name in ("vendi", "cvsg"))
    held = {**EXACT, "rule": "held", "jacobian": "identity", "scale": 0.1, "inner": 2}
    terms = [CADS, CFG, {"method": "apg", "scale": 0.5}, chamfer, vendi, cvsg, EXACT, held]
    asked = digits(digits_folder, *terms, sampler={"name": "ddim", "steps": 4, "recurrence": 2}, per_class=2)
    images = images_of(asked, tmp_path / "one")
    assert images == images_of(asked, tmp_path / "again")
    assert len(images) == 2


def test_an_image_noised_by_cads_does_not_depend_on_its_cohort(digits_folder: Path, tmp_path: Path):
    four, two = (digits(digits_folder, CADS, CFG, cohort=cohort) for cohort in (4, 2))
    assert _near(images_of(four, tmp_path / "4"), tmp_path / "4", two, tmp_path / "2")


def test_prompts_are_noised_in_a_run_and_the_same_run_gives_the_same_bytes(tmp_path: Path):
    tiny_stable_diffusion(tmp_path / "sd")
    asked = {"model": {"name": str(tmp_path / "sd")}, "classes": ["cat"], "per_class": 2, "sampler": {"steps": 3}}
    noised = recipe_from({**asked, "guidance": [{**CADS, "scale": 1.0}, CFG]})
    first = images_of(noised, tmp_path / "one")
    assert first == images_of(noised, tmp_path / "again")
    assert first != images_of(recipe_from({**asked, "guidance": [CFG]}), tmp_path / "clean")


def _near(found: dict[str, bytes], at: Path, other: Recipe, out: Path) -> bool:
    """Whether another run's images are these, but for rounding of one step of 255."""
    names = images_of(other, out).keys()
    gaps = [(read_image(at / name, channels=1) - read_image(out / name, channels=1)).abs().max() for name in names]
    return found.keys() == names and bool(torch.stack(gaps).max() < 1.5 * 2 / 255)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "field", "said"),
    [
        ([{**CADS, "tau1": 0.9, "tau2": 0.6}], "guidance[0].tau1, tau2", "clean up to tau1"),
        ([CFG, CADS, CADS], "guidance[2].method", "there are two of them"),
        ([{"method": "cads", "tau3": 1}], "guidance[0].tau3", "no such key"),
        ([{"method": "apg", "parallel": 2}], "guidance[0].parallel", "less than or equal to 1"),
        ([{"method": "apg", "momentum": 0.5}], "guidance[0].momentum", "less than or equal to 0"),
        ([{**EXACT, "inner": 3}], "guidance[0].inner", "inner steps move x0_hat"),
        ([{**EXACT, "smoothing": {"samples": 0}}], "guidance[0].smoothing.samples", "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    guidance: list[dict[str, Any]], field: str, said: str, digits_folder: Path, tmp_path: Path
):
    with pytest.raises(RequestError) as refused:
        prepare(digits(digits_folder, *guidance), tmp_path / "out")
    assert refused.value.field == field
    assert said in str(refused.value)


def test_models_that_cannot_be_told_otherwise_are_refused(tiny_model: Callable[..., str], tmp_path: Path):
    untold = tiny_model()
    for guidance, said in (([CADS], "this model is unconditional"), ([{"method": "apg"}], "no null class")):
        with pytest.raises(RequestError, match=said) as refused:
            prepare(tiny_recipe(untold, guidance=guidance), tmp_path / "out")
        assert refused.value.field == "guidance[0]"


def test_a_compiled_network_whose_labels_would_be_noised_is_refused(tmp_path: Path):
    asked = recipe_from({"model": {"name": "digits", "compile": True}, "guidance": [CADS]})
    with pytest.raises(RequestError, match=r"model.compile: True: cads changes the network's embedding"):
        prepare(asked, tmp_path / "out")


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_recurrence_is_refused_where_a_step_cannot_be_repeated(sampler: str, digits_folder: Path, tmp_path: Path):
    asked = digits(digits_folder, EXACT, sampler={"name": sampler, "steps": 4, "recurrence": 2})
    with pytest.raises(RequestError, match=f"sampler.recurrence: 2: the sampler {sampler} can't repeat a step"):
        prepare(asked, tmp_path / "out")
