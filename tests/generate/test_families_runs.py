"""Runs of models of latents and prompts: what only they can get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.runs import contents

from handful.data.images import write_png
from handful.errors import RequestError
from handful.generate import prepare
from handful.generate.run import run
from handful.judge.evaluate import evaluate
from handful.models.prompts import Prompts
from handful.recipe.file import read_recipe
from handful.recipe.plan import Cohort
from handful.recipe.schema import Recipe, recipe_from


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for name in ("cat", "golden_retriever"):
        for place in range(4):
            (root / name).mkdir(exist_ok=True)
            write_png(root / name / f"{place}.png", torch.rand(3, 20, 20, generator=random) * 2 - 1)
    return root


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(folder)
    return folder


def recipe(folder: Path, photos: Path | None, **changes: Any) -> Recipe:
    data: dict[str, Any] = {"model": {"name": str(folder)}, "per_class": 3, "cohort": 2, "sampler": {"steps": 4}}
    if photos is not None:
        data |= {"exemplars": {"path": str(photos)}, "guidance": [{"method": "chamfer", "features": "pixels", "scale": 0.3}]}
    return recipe_from({**data, **changes})


def test_a_text_model_generates_a_folder_a_class_and_writes_every_prompt_out(stable_diffusion, photos, tmp_path):
    job = prepare(recipe(stable_diffusion, photos), tmp_path / "out")
    summary = run(job)
    assert (summary.images, summary.failures) == (6, [])
    written = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert written.model.prompts == {"cat": "a photo of a cat", "golden_retriever": "a photo of a golden retriever"}
    term: Any = (written.guidance or ())[0]
    assert term.reduce == job.denoiser.preview_factor > 1, "latents are looked at through the linear map"
    assert len(list((tmp_path / "out" / "images" / "cat").glob("*.png"))) == 3


@pytest.mark.filterwarnings("ignore")
def test_geodes_exemplars_bring_their_prompts_and_the_run_is_measured_by_region(stable_diffusion, tmp_path):
    random, rows = torch.Generator().manual_seed(0), ["file_path,object,region"]
    for region in ("Africa", "EastAsia"):
        for place in range(6):
            rows.append(f"{region}_bag_{place}.png,hand_bag,{region}")
            (tmp_path / "GeoDE" / "images").mkdir(parents=True, exist_ok=True)
            write_png(
                tmp_path / "GeoDE" / "images" / f"{region}_bag_{place}.png", torch.rand(3, 20, 20, generator=random) * 2 - 1
            )
    (tmp_path / "GeoDE" / "index.csv").write_text("\n".join(rows))
    source = Path(f"geode:{tmp_path / 'GeoDE'}@6")
    changes: Any = {"exemplars": {"path": str(source), "k": 2}, "per_class": 4, "sampler": {"steps": 2}}
    asked = recipe(stable_diffusion, source, **changes)
    job = prepare(asked, tmp_path / "out")
    assert any("model.template says otherwise" in note for note in job.notes)
    run(job)
    written = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert written.exemplars.path == str(source)
    assert written.model.prompts == {name: name for name in ("hand bag in Africa", "hand bag in East Asia")}
    found = evaluate(tmp_path / "out", judge="pixels", audit=False, ceiling=False)  # the eight that guided nothing
    assert found.groups is not None
    assert {name: (each.n_real, each.n_generated) for name, each in found.groups.per_group.items()} == {
        "Africa": (4, 4),
        "East Asia": (4, 4),
    }
    own = recipe(stable_diffusion, source, model={"name": str(stable_diffusion), "template": "a {}, please"})
    assert prepare(own, tmp_path / "own").recipe.model.prompts["hand bag in Africa"] == "a hand bag in Africa, please"


def test_an_interrupted_run_through_the_linear_preview_ends_with_the_same_bytes(stable_diffusion, photos, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(prepare(recipe(stable_diffusion, photos), whole))
    run(prepare(recipe(stable_diffusion, photos), parts), order=[3, 2, 1, 0])
    for name in ("cat-0000", "golden_retriever-0001"):
        (parts / ".handful" / "cohorts" / f"{name}.parquet").unlink()
    run(prepare(recipe(stable_diffusion, photos), parts))
    assert contents(parts) == contents(whole)


def test_prompts_are_encoded_by_the_first_of_many_processes_and_read_by_the_others(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, encoded, encode = recipe(stable_diffusion, None, classes=["cat", "dog"]), list[str](), Prompts.remember

    def remember(self: Prompts, prompts: Sequence[str]) -> None:
        encoded.extend(prompt for prompt in prompts if prompt not in self._kept)
        encode(self, prompts)

    monkeypatch.setattr(Prompts, "remember", remember)
    run(prepare(asked, tmp_path / "first"))
    assert encoded == ["a photo of a cat", "a photo of a dog"]
    run(prepare(asked, tmp_path / "second"))
    assert len(encoded) == 2
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    (file,) = (tmp_path / "cache" / "prompts").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    prepare(asked, tmp_path / "third")
    assert len(encoded) == 4, "a damaged file is no embedding"
    model = {"name": str(stable_diffusion), "negative_prompt": "blurred"}
    prepare(recipe(stable_diffusion, None, classes=["cat", "dog"], model=model), tmp_path / "other")
    assert len(encoded) == 6, "another negative prompt is another null embedding"


def test_a_written_recipe_can_be_narrowed_to_some_of_its_classes(stable_diffusion, photos, tmp_path):
    run(prepare(recipe(stable_diffusion, photos), tmp_path / "out"))
    narrowed = read_recipe(tmp_path / "out" / "recipe.yaml").model_copy(update={"classes": ("cat",)})
    assert [cohort.class_name for cohort in prepare(narrowed, tmp_path / "less").cohorts] == ["cat", "cat"]


def test_the_same_weights_with_another_scheduler_tokenizer_or_scaling_are_another_model(stable_diffusion, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(stable_diffusion, model)
    asked = recipe(model, None, classes=["cat"])
    run(prepare(asked, tmp_path / "out"))
    for file, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 5),
        ("vae/config.json", "scaling_factor", 0.5),
    ):
        before = (model / file).read_text()
        (model / file).write_text(json.dumps({**json.loads(before), key: value}))
        with pytest.raises(RequestError, match="model_sha256"):
            prepare(asked, tmp_path / "out")
        (model / file).write_text(before)
    prepare(asked, tmp_path / "out")


def test_a_text_model_must_be_told_which_classes(stable_diffusion, tmp_path):
    with pytest.raises(RequestError, match=r"^classes: .*--classes cat,dog"):
        prepare(recipe(stable_diffusion, None), tmp_path / "out")
    with pytest.raises(RequestError, match=r"^model\.classes: .*prompts, not labels"):
        prepare(
            recipe(stable_diffusion, None, model={"name": str(stable_diffusion), "classes": ["cat"]}, classes=["cat"]),
            tmp_path / "out",
        )


def test_decoding_is_halved_while_memory_is_short(stable_diffusion, photos, tmp_path, monkeypatch):
    job = prepare(recipe(stable_diffusion, photos, classes=["cat"]), tmp_path / "out")
    decode: Any = job.denoiser.decode

    def short(x0: torch.Tensor) -> torch.Tensor:
        if len(x0) > 1:
            raise torch.OutOfMemoryError
        return decode(x0)

    monkeypatch.setattr(job.denoiser, "decode", short)
    summary = run(job)
    assert (summary.images, summary.failures) == (3, [])


def test_what_the_configs_tell_is_refused_without_weights(stable_diffusion, photos, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(stable_diffusion, model, ignore=shutil.ignore_patterns("*.safetensors"))
    for field, changes in (
        ("model.resolution", {"model": {"name": str(model), "resolution": [17, 16]}}),
        ("guidance[0].reduce", {"guidance": [{"method": "chamfer", "features": "pixels", "reduce": 3}]}),
        ("model.template", {"model": {"name": str(model), "template": "a photo"}}),
        ("guidance[0].features", {"guidance": [{"method": "chamfer", "features": "/nowhere"}]}),
        ("model", {}),
    ):
        with pytest.raises(RequestError) as caught:
            prepare(recipe(model, photos, **changes), tmp_path / "out")
        assert caught.value.field == field, str(caught.value)
    assert not (tmp_path / "out").exists()


def test_dit_takes_its_labels_and_its_null_class(photos, tmp_path):
    tiny_dit(tmp_path / "dit")
    guidance = [{"method": "cfg", "scale": 1.0}, {"method": "chamfer", "features": "pixels", "reduce": 1}]
    for name, label in (("cat", "3"), ("golden_retriever", "207")):
        shutil.copytree(photos / name, tmp_path / "by-label" / label)
    job = prepare(recipe(tmp_path / "dit", tmp_path / "by-label", guidance=guidance), tmp_path / "out")
    assert job.recipe.model.null_class == 1000
    assert job.cohorts[0] == Cohort("3", 3, 0, 0, 2)
    assert run(job).failures == []
