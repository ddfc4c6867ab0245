"""Runs guided by inversion: from fitted targets to a run directory, with the path, clamp and condition of the fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.clip import save_clip
from support.killed import killed
from support.pipelines import tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.runs import contents

import handful
from handful.core.denoiser import Clamped
from handful.core.noise import Levels, noised
from handful.core.samplers import ddim
from handful.cost.estimate import cost_of
from handful.data.images import encode_png, read_image, write_png
from handful.errors import RequestError
from handful.generate.invert import InvertRequest, invert, prepare
from handful.guidance.inversion import Embeddings, own_targets
from handful.models import load
from handful.recipe.file import read_recipe
from handful.recipe.plan import ImageNoise, image_seed
from handful.recipe.schema import Recipe, recipe_from


def fit(targets: Path, out: Path, model: str, **options: Any) -> Path:
    asked = {"steps": 10, "epochs": 2, "segments": 2} | options
    invert(prepare(InvertRequest({"name": model}, **asked), targets, out))
    return out


def asked(embeddings: Path, model: str, term: dict[str, Any] | None = None, *others: dict[str, Any], **changes: Any) -> Recipe:
    inversion = {"method": "inversion", "embeddings": str(embeddings), **(term or {})}
    given = {"model": {"name": model}, "guidance": [inversion, *others], "per_class": 5, "cohort": 4}
    return recipe_from(given | changes)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    """Four inverted digits: paper where there is ink."""
    root = tmp_path_factory.mktemp("targets")
    for place in range(4):
        write_png(root / f"{place}.png", -read_image(digits_folder / "3" / f"{place:02d}.png", channels=1))
    return root


@pytest.fixture(scope="module")
def sge(tmp_path_factory: pytest.TempPathFactory, targets: Path) -> Path:
    return fit(targets, tmp_path_factory.mktemp("sge") / "digits.safetensors", "digits")


@pytest.fixture
def plain_model(tiny_model: Callable[..., str]) -> str:
    return tiny_model()


def images(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(out).items() if name.endswith("00.png") or "/0000" in name}


def test_a_run_takes_path_clamp_and_condition_of_the_fit_and_any_class_name(sge: Path, tmp_path: Path):
    out = tmp_path / "out"
    summary = handful.generate(asked(sge, "digits", classes=["babies", "10"]), out)
    assert (summary.images, summary.cohorts_failed) == (10, 0)
    rows = pq.ParquetFile(out / "manifest.parquet").read(use_threads=False).to_pylist()
    assert {(row["class"], row["label"]) for row in rows} == {("babies", None), ("10", None)}
    assert json.loads(rows[0]["guidance"])[0]["method"] == "inversion"
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert stored["sampler"] == {
        "name": "ddim",
        "steps": 10,
        "spacing": "trailing",
        "eta": 0.0,
        "variance": None,
        "recurrence": 1,
        "clamp": True,
    }
    assert len(stored["provenance"]["levels"]["sigma"]) == 8 + 1, "from the interval's top"
    assert len(stored["provenance"]["embeddings_sha256"]) == 64
    handful.generate(out / "recipe.yaml", tmp_path / "again")
    again = contents(tmp_path / "again")
    again.pop("recipe.yaml")
    assert again == {name: data for name, data in contents(out).items() if name != "recipe.yaml"}


def test_without_names_the_one_class_is_called_images(sge: Path, tmp_path: Path):
    handful.generate(asked(sge, "digits", per_class=1), tmp_path / "out")
    assert (tmp_path / "out" / "images" / "images" / "000000.png").is_file()


@pytest.mark.parametrize("clamp", [True, False])
def test_scale_0_is_plain_noising_and_denoising_to_the_byte(targets: Path, plain_model: str, tmp_path: Path, clamp: bool):
    """SDEdit, put together here from the model, the targets and DDIM."""
    file = fit(targets, tmp_path / "sge", plain_model, clamp=clamp)
    handful.generate(asked(file, plain_model, {"scale": 0.0}), tmp_path / "out")
    embeddings, denoiser, hi = Embeddings.load(file), load(plain_model), 8
    whole = denoiser.levels.spacing(10)
    path = Levels(whole.alpha[10 - hi :], whole.sigma[10 - hi :])
    real = torch.stack([read_image(targets / f"{place}.png", channels=1) for place in range(4)])
    for first, count in ((0, 4), (4, 1)):
        seeds = [image_seed(0, "images", index) for index in range(first, first + count)]
        noise = ImageNoise(seeds, denoiser.shape)()
        x = noised(real[own_targets(seeds, len(embeddings))], noise, path[0])
        with torch.no_grad():
            made = ddim(Clamped(denoiser) if clamp else denoiser, x, path, denoiser.condition([0] * count))
        for place, image in enumerate(made.clamp(-1, 1)):
            written = tmp_path / "out" / "images" / "images" / f"{first + place:06d}.png"
            assert written.read_bytes() == encode_png(image)


def test_guidance_brings_images_nearer_to_the_targets_than_sdedit(sge: Path, targets: Path, tmp_path: Path):
    """The mean ink is far from a digit's: what guidance has to bring is the domain."""
    real = torch.stack([read_image(file, channels=1) for file in targets.iterdir()])

    def distance(scale: float) -> float:
        out = tmp_path / f"{scale}"
        handful.generate(asked(sge, "digits", {"scale": scale}, per_class=12), out)
        made = torch.stack([read_image(file, channels=1) for file in (out / "images" / "images").glob("*.png")])
        return float((made.mean(0) - real.mean(0)).square().mean())

    assert distance(1.0) < 0.5 * distance(0.0)


def test_an_image_does_not_depend_on_its_cohort_where_only_inversion_guides(sge: Path, tmp_path: Path):
    """One image at a time through the network, as batches of other sizes may round otherwise."""
    made = {}
    for cohort, per_class in ((5, 5), (2, 5), (1, 7)):
        out = tmp_path / f"{cohort}"
        handful.generate(asked(sge, "digits", cohort=cohort, per_class=per_class, chunk=1), out, order=None)
        made[cohort] = [(out / "images" / "images" / f"{index:06d}.png").read_bytes() for index in range(5)]
    assert made[5] == made[2] == made[1]
    assert len(set(made[5])) == 5
    reversed_out = tmp_path / "reversed"
    handful.generate(asked(sge, "digits", cohort=2, chunk=1), reversed_out, order=[2, 1, 0])
    assert contents(reversed_out) == contents(tmp_path / "2")


@pytest.mark.parametrize("exchange", ["image", "none"])
def test_each_exchange_gives_other_images(sge: Path, tmp_path: Path, exchange: str):
    handful.generate(asked(sge, "digits"), tmp_path / "step")
    handful.generate(asked(sge, "digits", {"exchange": exchange}), tmp_path / "other")
    assert images(tmp_path / "step") != images(tmp_path / "other")


def test_it_composes_with_chamfer_and_classifier_free_guidance(sge: Path, digits_folder: Path, tmp_path: Path):
    exemplars = {"path": str(digits_folder), "per_class": 4}
    chamfer = {"method": "chamfer", "jacobian": "exact", "every": 1}
    handful.generate(asked(sge, "digits", None, chamfer, classes=["3"], exemplars=exemplars), tmp_path / "both")
    handful.generate(asked(sge, "digits", classes=["3"]), tmp_path / "alone")
    both = pq.ParquetFile(tmp_path / "both" / "manifest.parquet").read(use_threads=False).to_pylist()
    assert both[0]["nearest_exemplar"].startswith("3/")
    assert both[0]["label"] is None
    assert images(tmp_path / "both") != images(tmp_path / "alone")
    with_class = fit(digits_folder / "3", tmp_path / "class.safetensors", "digits", condition="3")
    handful.generate(asked(with_class, "digits", None, {"method": "cfg", "scale": 1.0}), tmp_path / "cfg")
    handful.generate(asked(with_class, "digits"), tmp_path / "none")
    assert images(tmp_path / "cfg") != images(tmp_path / "none"), "the null class is known, the class is the fitted one"


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bytes_also_after_the_file_has_moved(sge: Path, tmp_path: Path):
    recipe = asked(sge, "digits", per_class=8, cohort=1)
    handful.generate(recipe, tmp_path / "undisturbed")
    request, out = tmp_path / "r.yaml", tmp_path / "killed"
    request.write_text(yaml.safe_dump(recipe.as_dict() | {"sampler": {}}))
    marker = out / ".handful" / "cohorts" / "images-0000.parquet"
    killed(["generate", request, "--out", out, "--quiet"], marker.exists)
    assert not (out / "manifest.parquet").exists(), "it was killed too late to prove anything"
    moved = tmp_path / "moved.safetensors"
    shutil.copy(sge, moved)
    summary = handful.generate(asked(moved, "digits", per_class=8, cohort=1), out)
    assert summary.cohorts_resumed >= 1
    assert summary.cohorts_done >= 1
    assert images(out) == images(tmp_path / "undisturbed")


def test_a_run_does_not_go_on_with_other_embeddings(sge: Path, targets: Path, tmp_path: Path):
    file = tmp_path / "sge.safetensors"
    shutil.copy(sge, file)
    handful.generate(asked(file, "digits"), tmp_path / "out")
    file.unlink()
    fit(targets, file, "digits", seed=1)
    with pytest.raises(RequestError, match="embeddings_sha256: "):
        handful.generate(asked(file, "digits"), tmp_path / "out")


def test_relative_paths_are_the_recipe_files(sge: Path, tmp_path: Path):
    shutil.copy(sge, tmp_path / "sge.safetensors")
    (tmp_path / "r.yaml").write_text("model: {name: digits}\nguidance: [{method: inversion, embeddings: sge.safetensors}]\n")
    assert handful.generate(tmp_path / "r.yaml", tmp_path / "out").images == 64


REFUSALS = [
    ({"scale": -1}, {}, "guidance[0].scale", "greater than or equal to 0"),
    ({"exchange": "both"}, {}, "guidance[0].exchange", "Choices: step, image, none"),
    ({"perturbation": -0.1}, {}, "guidance[0].perturbation", "greater than or equal to 0"),
    ({"embeddings": "/no/such/file"}, {}, "guidance[0].embeddings", "there is no such file"),
    ({}, {"sampler": {"steps": 18}}, "sampler.steps", "fitted with steps 10"),
    ({}, {"sampler": {"spacing": "leading"}}, "sampler.spacing", "fitted with spacing trailing"),
    ({}, {"sampler": {"clamp": False}}, "sampler.clamp", "fitted with clamp true"),
    ({"every": 9}, {}, "guidance[0].every", "it acts on none of 8 steps"),
    ({}, {"classes": ["a", "a"]}, "classes", "named twice"),
]


@pytest.mark.parametrize(("term", "changes", "field", "said"), REFUSALS)
def test_what_the_embeddings_cannot_is_refused_by_name(
    sge: Path, tmp_path: Path, term: dict[str, Any], changes: dict[str, Any], field: str, said: str
):
    with pytest.raises(RequestError) as refused:
        handful.generate(asked(sge, "digits", term, **changes), tmp_path / "out")
    assert refused.value.field == field
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_two_inversions_are_refused(sge: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="only from the targets of one inversion") as refused:
        handful.generate(asked(sge, "digits", None, {"method": "inversion", "embeddings": str(sge)}), tmp_path / "out")
    assert refused.value.field == "guidance[1]"


def test_without_a_file_it_says_how_to_name_one(tmp_path: Path):
    with pytest.raises(RequestError, match="--embeddings FILE"):
        recipe_from({"model": {"name": "digits"}, "guidance": [{"method": "inversion"}]})


@pytest.mark.parametrize("cut", [slice(0, -50), slice(0, 100)])
def test_a_damaged_file_is_refused(sge: Path, tmp_path: Path, cut: slice):
    file = tmp_path / "sge"
    file.write_bytes(sge.read_bytes()[cut])
    with pytest.raises(RequestError) as refused:
        handful.generate(asked(file, "digits"), tmp_path / "out")
    assert refused.value.field == "guidance[0].embeddings"


def test_another_model_is_refused_of_another_size_before_its_weights_are_read(
    sge: Path, tiny_model: Callable[..., str], tmp_path: Path
):
    with pytest.raises(RequestError, match="fitted on another model: its weights") as refused:
        handful.generate(asked(sge, tiny_model()), tmp_path / "out")
    assert refused.value.field == "guidance[0].embeddings"
    tiny_dit(tmp_path / "dit", classes=3)
    for weights in (tmp_path / "dit").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(RequestError, match="a model of 1 x 8 x 8, and this one has 4 x 8 x 8"):
        handful.generate(asked(sge, str(tmp_path / "dit")), tmp_path / "out")


def test_latents_are_fitted_and_guided_with_the_label_that_they_were_told(targets: Path, tmp_path: Path):
    tiny_dit(tmp_path / "dit", classes=3)
    file = fit(targets, tmp_path / "sge", str(tmp_path / "dit"), condition="2", chunk=3)
    embeddings = Embeddings.load(file)
    assert embeddings.shape == (4, 8, 8)
    assert embeddings.fitted["told"] == {"label": 2, "prompt": None, "null_class": 3, "clamp": False, "spacing": "trailing"}
    assert handful.generate(asked(file, str(tmp_path / "dit"), per_class=2), tmp_path / "out").images == 2
    assert read_image(tmp_path / "out" / "images" / "images" / "000001.png", channels=3).shape == (3, 16, 16)


@pytest.mark.parametrize(("condition", "prompt"), [(None, ""), ("a dark cat", "a dark cat")])
def test_prompted_models_are_told_the_prompt_of_the_fit_whatever_the_class(
    targets: Path, tmp_path: Path, condition: str | None, prompt: str
):
    model = str(tmp_path / "sd")
    tiny_stable_diffusion(tmp_path / "sd")
    file = fit(targets, tmp_path / "sge", model, condition=condition)
    handful.generate(asked(file, model, per_class=1, classes=["dogs"]), tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["model"]["prompts"] == {"dogs": prompt}
    data = asked(file, model).as_dict() | {"model": {"name": model, "prompts": {"images": "x"}}, "sampler": {}}
    with pytest.raises(RequestError, match="work only with it") as refused:
        handful.generate(recipe_from(data), tmp_path / "other")
    assert refused.value.field == "model.prompts"
    assert cost_of(asked(file, model)).guided == [("inversion", 6)]


def test_its_cost_is_that_of_the_part_of_the_path_that_is_walked(sge: Path):
    found = cost_of(asked(sge, "digits"))
    assert (found.steps, found.recipe.evaluations, found.guided) == (8, 8.0, [("inversion", 6)])
    assert found.recipe.flops_per_image == found.plain.flops_per_image
    with_chamfer = cost_of(asked(sge, "digits", None, {"method": "chamfer", "jacobian": "exact", "every": 2}))
    assert with_chamfer.recipe.flops_per_image > found.recipe.flops_per_image


def test_a_file_of_the_librarys_own_needs_no_more_than_the_models_digest(targets: Path, plain_model: str, tmp_path: Path):
    from handful.guidance.inversion_fit import fit as library_fit
    from handful.runs.provenance import model_digest

    denoiser = load(plain_model)
    real = torch.stack([read_image(file, channels=1) for file in sorted(targets.iterdir())])
    found = library_fit(denoiser, real, segments=1, epochs=1, model=model_digest(denoiser))
    found.save(tmp_path / "sge")
    handful.generate(asked(tmp_path / "sge", plain_model, per_class=1), tmp_path / "out")
    stored = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (stored["sampler"]["clamp"], stored["sampler"]["spacing"]) == (False, None)


def test_crdi_and_clip_run_side_by_side_from_their_recipe_file(
    targets: Path, tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model()
    fit(targets, tmp_path / "babies.safetensors", model)
    (tmp_path / "clip").mkdir()
    save_clip(tmp_path / "clip")
    text = (Path(__file__).parents[2] / "recipes" / "ffhq-babies-crdi-clip.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("ffhq_10m.pt", model).replace("classifier: clip", "classifier: ./clip"))
    recipe = read_recipe(tmp_path / "recipe.yaml").model_copy(update={"per_class": 4, "cohort": 2})
    assert recipe.guidance is not None
    alone = recipe.model_copy(update={"guidance": recipe.guidance[:1]})
    seen = {}
    for name, each in (("both", recipe), ("alone", alone)):
        assert handful.generate(each, tmp_path / name).failures == []
        seen[name] = [path.read_bytes() for path in sorted((tmp_path / name / "images").rglob("*.png"))]
    assert len(seen["both"]) == 4
    assert seen["both"] != seen["alone"]
