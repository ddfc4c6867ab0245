"""Runs guided by a file of features: the same images as from the folder, and nothing but what the file holds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.pipelines import tiny_stable_diffusion
from support.runs import contents, digits_recipe

import handful
from handful.data.exemplars import Exemplars
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.generate import prepare
from handful.generate.describe import plan_as_text
from handful.models import skeleton
from handful.recipe.exemplar_source import too_few_left
from handful.recipe.schema import recipe_from

GUIDED = [{"method": "chamfer", "features": "digits-guide", "every": 2, "margin": 0.5}]


@pytest.fixture(scope="module")
def shared(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of each digit, drawn with seed 0, as the packaged guide sees them."""
    file = tmp_path_factory.mktemp("shared") / "digits.safetensors"
    images = Exemplars.from_folder(digits_folder, channels=1, size=(8, 8), k=4)
    ExemplarFeatures.of(images, [load_extractor("digits-guide")], (1, 2)).save(file)
    return file


def rows(out: Path) -> list[dict[str, Any]]:
    return pq.ParquetFile(out / "manifest.parquet").read(use_threads=False).to_pylist()


def test_images_are_the_same_to_the_byte_from_the_folder_and_from_its_features(digits_folder, shared, tmp_path):
    for name, given in (("folder", digits_folder), ("features", shared)):
        handful.generate(digits_recipe(given, guidance=GUIDED), tmp_path / name)
    folder, features = (
        {name: held for name, held in contents(tmp_path / out).items() if name.startswith("images/")}
        for out in ("folder", "features")
    )
    assert folder == features
    assert len(folder) == 12 + 1
    by_file, by_number = rows(tmp_path / "folder"), rows(tmp_path / "features")
    drawn = Exemplars.from_folder(digits_folder, channels=1, size=(8, 8), k=4)
    for one, other in zip(by_file, by_number, strict=True):
        name, _, number = other.pop("nearest_exemplar").partition("/")
        assert one.pop("nearest_exemplar") == f"{name}/{drawn.files[name][int(number)].name}"
        assert one == other


def test_fewer_exemplars_are_the_first_ones(digits_folder, shared, tmp_path):
    """k = 2 of a file of 4 is what a file of 2 gives."""
    images = Exemplars.from_folder(digits_folder, channels=1, size=(8, 8), k=2)
    ExemplarFeatures.of(images, [load_extractor("digits-guide")]).save(tmp_path / "two.safetensors")
    of_four, of_two = (
        prepare(digits_recipe(given, exemplars={"path": str(given), "per_class": 2}, guidance=GUIDED), tmp_path / "out")
        for given in (shared, tmp_path / "two.safetensors")
    )
    assert of_four.exemplars is not None
    assert of_two.exemplars is not None
    assert of_four.exemplars.counts == {"1": 2, "4": 2}
    extractor = load_extractor("digits-guide")
    found, expected = (job.exemplars.seen_by(extractor, 1, None) for job in (of_four, of_two))
    assert all(bool((found[name] - values).abs().max() < 1e-5) for name, values in expected.items())


def test_a_run_goes_on_with_the_same_features_wherever_they_lie_and_not_with_others(shared, digits_folder, tmp_path):
    recipe, out = digits_recipe(shared, guidance=GUIDED), tmp_path / "out"
    handful.generate(recipe, out)
    whole = contents(out)
    (out / "images" / "1" / "000001.png").unlink()
    moved = tmp_path / "elsewhere" / "moved.safetensors"
    moved.parent.mkdir()
    shutil.copy(shared, moved)
    summary = handful.generate(digits_recipe(moved, guidance=GUIDED), out)
    assert (summary.cohorts_done, summary.cohorts_resumed) == (1, 3)
    assert contents(out) == whole
    images = Exemplars.from_folder(digits_folder, channels=1, size=(8, 8), k=4, seed=1)
    ExemplarFeatures.of(images, [load_extractor("digits-guide")], seed=1).save(moved)
    with pytest.raises(RequestError, match="exemplars_sha256"):
        handful.generate(digits_recipe(moved, guidance=GUIDED), out)
    with pytest.raises(RequestError, match="exemplars_sha256"):
        prepare(digits_recipe(digits_folder, guidance=GUIDED), out)


def test_the_recipe_of_a_run_is_run_again_with_the_seed_of_the_draw(digits_folder, tmp_path):
    images = Exemplars.from_folder(digits_folder, channels=1, size=(8, 8), k=4, seed=5)
    file, out = tmp_path / "five.safetensors", tmp_path / "out"
    ExemplarFeatures.of(images, [load_extractor("digits-guide")], seed=5).save(file)
    handful.generate(digits_recipe(file, guidance=GUIDED, per_class=2), out)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["exemplars"]["seed"] == 5
    handful.generate(out / "recipe.yaml", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    with pytest.raises(RequestError, match=r"^exemplars.seed: 1: .* made with seed 5"):
        prepare(digits_recipe(file, exemplars={"path": str(file), "seed": 1}, guidance=GUIDED), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"guidance": [{"method": "chamfer", "features": "pixels"}]}, "guidance[0].features", "digits-guide at reduce 1"),
        ({"guidance": [{"method": "chamfer"}]}, "guidance[0].features", "has no features of this extractor"),
        ({"guidance": [GUIDED[0] | {"reduce": 4}]}, "guidance[0].features", "reduce 4"),
        ({"guidance": [{"method": "cfg"}, GUIDED[0] | {"features": "digits-judge"}]}, "guidance[1].features", "digits-judge"),
        ({"exemplars": {"k": 5}}, "exemplars.k", "'1' has 4"),
        ({"classes": ["1", "eleven"]}, "classes", "there are no exemplars of this class"),
    ],
)
def test_what_a_file_of_features_can_not_do_is_said_before_the_work(shared, tmp_path, changes, field, said):
    exemplars = {"path": str(shared)} | changes.pop("exemplars", {})
    with pytest.raises(RequestError) as caught:
        prepare(digits_recipe(shared, exemplars=exemplars, **({"guidance": GUIDED} | changes)), tmp_path / "out")
    assert caught.value.field == field
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_features_of_images_of_another_size_are_refused(digits_folder, tmp_path):
    images = Exemplars.from_folder(digits_folder, channels=1, size=(16, 16), k=4)
    ExemplarFeatures.of(images, [load_extractor("digits-guide")]).save(tmp_path / "large.safetensors")
    with pytest.raises(RequestError, match="come from images of 16 x 16 x 1, and the model makes images of 8 x 8 x 1"):
        prepare(digits_recipe(tmp_path / "large.safetensors", guidance=GUIDED), tmp_path / "out")


def test_without_a_potential_of_exemplars_the_file_says_which_classes(shared, tmp_path):
    recipe = digits_recipe(shared, guidance=[{"method": "cfg"}], classes=None, per_class=1, sampler={"steps": 2})
    job = prepare(recipe, tmp_path / "out")
    assert [cohort.class_name for cohort in job.cohorts] == [str(digit) for digit in range(10)]
    assert "4 of each class, as features alone" in plan_as_text(job)


BLURRED = """
from torch import nn
from handful.features.registry import FeatureExtractor

def blurred():
    return FeatureExtractor("blurred", nn.AdaptiveAvgPool2d(2), channels=3)
"""


def test_a_model_of_latents_looks_through_its_decoder_since_the_linear_map_needs_images(tmp_path):
    tiny_stable_diffusion(tmp_path / "model")
    (tmp_path / "mine.py").write_text(BLURRED)
    features = f"{tmp_path / 'mine.py'}:blurred"
    outline = skeleton(tmp_path / "model")
    images = Exemplars.from_tensors({"cat": torch.rand(3, *outline.image_shape) * 2 - 1})
    ExemplarFeatures.of(images, [load_extractor(features)]).save(tmp_path / "cats.safetensors")
    asked: dict[str, Any] = {
        "model": {"name": str(tmp_path / "model")},
        "per_class": 2,
        "sampler": {"steps": 2},
        "exemplars": {"path": str(tmp_path / "cats.safetensors")},
        "guidance": [{"method": "chamfer", "features": features}],
    }
    job = prepare(recipe_from(asked), tmp_path / "out")
    term: Any = (job.recipe.guidance or ())[0]
    assert term.reduce == 1
    assert handful.generate(recipe_from(asked), tmp_path / "out").images == 2
    asked["guidance"][0]["reduce"] = outline.preview_factor
    with pytest.raises(RequestError, match=r"^guidance\[0\].reduce: .* fitted to exemplars, .* Give a folder"):
        prepare(recipe_from(asked), tmp_path / "other")


@pytest.mark.parametrize(
    ("k", "counts", "said"),
    [
        (None, {"a": 40, "b": 30}, "all images are exemplars; .*needs 6 others of each class.* 5. Use --k 24 or less"),
        (28, {"a": 40, "b": 30}, "class 'b' has 2 images besides its exemplars"),
        (4, {"a": 5}, "Add images, or give them another folder"),
        (24, {"a": 40, "b": 30}, None),
    ],
)
def test_too_few_images_left_to_test_on_are_told_with_the_k_that_leaves_enough(tmp_path, k, counts, said):
    recipe = recipe_from({"model": {"name": "digits"}, "exemplars": {"path": str(tmp_path), "k": k}})
    notes = too_few_left(recipe, counts)
    assert notes == [] if said is None else re.search(said, notes[0])
