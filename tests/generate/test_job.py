"""What can't be done is said before it starts, and a directory is only ever written by the recipe that began it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from support.runs import contents, digits_recipe, tiny_recipe

import handful
from handful.data.images import write_png
from handful.errors import RequestError
from handful.generate import prepare
from handful.generate.run import run
from handful.recipe.schema import Recipe, recipe_from
from handful.runs import provenance
from handful.runs import run_directory as directory_module


def test_what_is_impossible_is_said_before_anything_is_written(
    tiny_model: Callable[..., str], digits_folder: Path, tmp_path: Path
):
    plain, real = tiny_model(2), {"path": str(digits_folder)}
    (tmp_path / "file").touch()
    one = tmp_path / "one" / "0"
    one.mkdir(parents=True)
    write_png(one / "a.png", torch.zeros(1, 8, 8))
    nul = tmp_path / "nul"
    for name in ("CON", "b"):
        shutil.copytree(digits_folder / "0", nul / name)
    chamfer = {"method": "chamfer"}
    cases: list[tuple[str, Recipe, Path]] = [
        ("exemplars.path", tiny_recipe(plain, guidance=[{"method": "chamfer"}]), tmp_path / "out"),
        ("guidance[0]", tiny_recipe(plain, guidance=[{"method": "cfg"}]), tmp_path / "out"),
        ("exemplars", tiny_recipe(plain, exemplars={"path": str(tmp_path / "nothing")}), tmp_path / "out"),
        ("exemplars", tiny_recipe(plain, exemplars=real), tmp_path / "out"),  # ten classes for two labels
        ("exemplars", tiny_recipe("digits", exemplars={"path": str(tmp_path / "one")}), tmp_path / "out"),
        ("exemplars.k", tiny_recipe("digits", exemplars=real | {"k": 9}), tmp_path / "out"),
        ("classes", tiny_recipe("digits", exemplars=real, classes=["11"]), tmp_path / "out"),
        ("classes", tiny_recipe(plain, exemplars={"path": str(nul)}, guidance=[]), tmp_path / "out"),
        ("guidance[0].features", digits_recipe(digits_folder, guidance=[chamfer | {"features": "/no"}]), tmp_path / "out"),
        (
            "guidance[0].every",
            tiny_recipe("digits", exemplars=real, sampler={"steps": 4}, guidance=[chamfer | {"every": 5}]),
            tmp_path / "out",
        ),
        ("model.preview_decoder", tiny_recipe(plain, model={"name": plain, "preview_decoder": "x/y"}), tmp_path / "out"),
        ("model.template", tiny_recipe(plain, model={"name": plain, "template": "a sketch of a {}"}), tmp_path / "out"),
        ("model.attention", tiny_recipe(plain, model={"name": plain, "attention": "flash"}), tmp_path / "out"),
        ("model.vae_slicing", tiny_recipe(plain, model={"name": plain, "vae_slicing": True}), tmp_path / "out"),
        ("model.offload", tiny_recipe(plain, model={"name": plain, "offload": "model"}), tmp_path / "out"),
        ("model.resolution", tiny_recipe(plain, model={"name": plain, "resolution": [16, 16]}), tmp_path / "out"),
        ("sampler.variance", tiny_recipe(plain, sampler={"name": "ddpm", "variance": "learned"}), tmp_path / "out"),
        ("sampler.variance", tiny_recipe(plain, sampler={"variance": "small"}), tmp_path / "out"),
        ("model", tiny_recipe("/nothing"), tmp_path / "out"),
        ("model.device", tiny_recipe(plain, model={"name": plain, "device": "cuda:99"}), tmp_path / "out"),
        ("model.classes", tiny_recipe(plain, model={"name": plain, "classes": ["a", "b", "c"]}), tmp_path / "out"),
        ("steps", tiny_recipe(plain, sampler={"steps": 1001}), tmp_path / "out"),
        ("spacing", tiny_recipe(plain, sampler={"spacing": "karras"}), tmp_path / "out"),
        ("sampler.eta", tiny_recipe(plain, sampler={"eta": 0.5}), tmp_path / "out"),
        ("out", tiny_recipe(plain), tmp_path / "file"),
        ("out", tiny_recipe(plain), tmp_path / "file" / "below"),
        ("out", tiny_recipe(plain), tmp_path),
        ("out", digits_recipe(digits_folder), digits_folder / "out"),
        ("out", digits_recipe(digits_folder), digits_folder),
    ]
    before = sorted(tmp_path.rglob("*"))
    for field, recipe, out in cases:
        with pytest.raises(RequestError) as caught:
            prepare(recipe, out)
        assert caught.value.field == field, str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_that_holds_something_else_is_left_alone(tiny_model: Callable[..., str], tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"thesis\.tex"):
        handful.generate(tiny_recipe(tiny_model(2)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "recipe.yaml").write_text("eggs: 3")
    (tmp_path / ".handful").mkdir()
    with pytest.raises(RequestError, match="it is not the recipe of a run"):
        handful.generate(tiny_recipe(tiny_model(2)), tmp_path)


def test_files_of_the_users_in_a_run_directory_stay(tiny_model: Callable[..., str], tmp_path: Path):
    recipe, out = tiny_recipe(tiny_model(2)), tmp_path / "out"
    handful.generate(recipe, out)
    (out / "notes.txt").write_text("mine")
    (out / "images" / "0" / "000002.png").unlink()
    handful.generate(recipe, out)
    assert (out / "notes.txt").read_text() == "mine"


def test_another_recipes_run_is_refused_with_the_difference(
    tiny_model: Callable[..., str], digits_folder: Path, tmp_path: Path
):
    out, recipe = tmp_path / "out", digits_recipe(digits_folder)
    handful.generate(recipe, out)
    wanted = contents(out)
    other = digits_recipe(digits_folder, sampler={"steps": 5}, guidance=[{"method": "chamfer", "scale": 0.5}])
    with pytest.raises(RequestError) as caught:
        handful.generate(other, out)
    assert "sampler.steps: 4 there, 5 now" in str(caught.value)
    assert "guidance[0].scale: 0.2 there, 0.5 now" in str(caught.value)
    assert "per_class" not in str(caught.value)
    assert contents(out) == wanted


def test_the_same_exemplars_at_another_place_are_the_same(digits_folder: Path, tmp_path: Path):
    shutil.copytree(digits_folder, tmp_path / "real")
    handful.generate(digits_recipe(tmp_path / "real"), tmp_path / "out")
    (tmp_path / "real").rename(tmp_path / "moved")
    assert handful.generate(digits_recipe(tmp_path / "moved"), tmp_path / "out").cohorts_resumed == 4
    for name in ("1", "4"):
        for file in (tmp_path / "moved" / name).iterdir():
            write_png(file, torch.zeros(1, 8, 8))
    with pytest.raises(RequestError, match="exemplars_sha256"):
        handful.generate(digits_recipe(tmp_path / "moved"), tmp_path / "out")


def test_other_versions_do_not_continue_a_run_unless_told_to(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out = tiny_recipe(tiny_model(2)), tmp_path / "out"
    handful.generate(recipe, out)
    version = provenance.installed
    monkeypatch.setattr(provenance, "installed", lambda name: "99" if name == "torch" else version(name))
    assert handful.generate(recipe, out).cohorts_resumed == 4, "nothing is left to make, so nothing can differ"
    (out / "images/0/000000.png").unlink()
    with pytest.raises(RequestError, match=r"torch .* then, 99 now.*--allow-version-change"):
        handful.generate(recipe, out)
    assert handful.generate(recipe, out, allow_version_change=True).cohorts_done == 1
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert stored["provenance"]["torch"] == version("torch")
    assert any("99 now" in note for note in stored["provenance"]["notes"])


def test_a_run_that_began_meanwhile_is_noticed(tiny_model: Callable[..., str], tmp_path: Path):
    model, out = tiny_model(2), tmp_path / "out"
    late = prepare(tiny_recipe(model, seed=1), out)
    handful.generate(tiny_recipe(model), out)
    with pytest.raises(RequestError, match="seed: 0 there, 1 now"):
        run(late)


def test_too_little_space_is_said_at_the_start(tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directory_module.RunDirectory, "free_bytes", lambda self: 5_000_000)
    with pytest.raises(RequestError, match=r"disk has 5\.00 MB free, but 2,000 images may need 1"):
        prepare(tiny_recipe(tiny_model(2), per_class=1000), tmp_path / "out")


@pytest.mark.parametrize("method", ["chamfer", "energy"])
def test_guidance_without_exemplars_is_refused_by_its_own_name(method: str, tmp_path: Path):
    asked = recipe_from({"model": {"name": "digits"}, "guidance": [{"method": method}]})
    with pytest.raises(RequestError, match=f"exemplars.path: {method} guidance needs exemplars"):
        prepare(asked, tmp_path / "out")
