"""CLIP as a classifier: transformers' own logits, gradients, what runs without weights, and text-to-image guided by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support.clip import save_clip
from support.pipelines import tiny_stable_diffusion, tokenizer
from support.vision import MEAN, STD, random_images, save_vision_model
from torch import Tensor

from handful.cost.estimate import cost_of
from handful.cost.operations import Count
from handful.errors import RequestError
from handful.features.clip import clip_classifier, clip_skeleton, is_clip
from handful.generate import prepare
from handful.generate.run import run
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.extractors import class_prompts, load_for
from handful.recipe.schema import Recipe, recipe_from

PROMPTS = {"cat": "a photo of a cat", "dog": "a very long photo of 2 dogs", "owl": "owl"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(folder)
    return folder


def normalised(images: Tensor) -> Tensor:
    return ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# --- the same numbers --------------------------------------------------------------------------------------------------


def test_logits_and_their_gradients_are_transformers_own(tmp_path: Path):
    model = save_clip(tmp_path)
    images = random_images(4, 3, 28, 28).float()
    extractor = clip_classifier(str(tmp_path), PROMPTS)
    given = tokenizer()(list(PROMPTS.values()), padding=True, return_tensors="pt")
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    wanted, found = model(**given, pixel_values=normalised(x)).logits_per_image, extractor.logits(y)
    assert wanted.shape == found.shape == (4, 3)
    assert float(wanted.detach().std(0).min()) > 0.01, "the images must not look alike to it"
    assert float(wanted.detach().std(1).min()) > 0.01, "the prompts must not either"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(each.log_softmax(1)[:, 1].sum(), at)[0] for each, at in ((wanted, x), (found, y))]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert extractor.is_classifier
    assert extractor.classes == ("cat", "dog", "owl")


def test_features_are_transformers_image_embeddings(tmp_path: Path):
    model = save_clip(tmp_path)
    images = random_images(2, 3, 28, 28).float()
    found = clip_classifier(str(tmp_path), PROMPTS)(images)
    with torch.no_grad():
        wanted = model.get_image_features(pixel_values=normalised(images)).pooler_output
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_prompts_logits_depend_on_no_other_prompt(clip: Path):
    images = random_images(2, 3, 28, 28).float()
    together = clip_classifier(str(clip), PROMPTS).logits(images)
    for place, (name, prompt) in enumerate(PROMPTS.items()):
        alone = clip_classifier(str(clip), {name: prompt}).logits(images)
        torch.testing.assert_close(alone[:, 0], together[:, place], rtol=1e-5, atol=1e-5)


def test_a_side_is_taken_as_for_features(clip: Path):
    extractor = clip_classifier(f"{clip}@56", PROMPTS)
    assert extractor.size == (56, 56)
    assert extractor.logits(random_images(1, 3, 20, 20).float()).shape == (1, 3)
    with pytest.raises(RequestError, match="multiple of the network's patch"):
        clip_classifier(f"{clip}@30", PROMPTS)


def test_the_digest_tells_prompts_and_weights(tmp_path: Path, clip: Path):
    save_clip(tmp_path, seed=1)
    made = [
        clip_classifier(str(clip), PROMPTS),
        clip_classifier(str(clip), {**PROMPTS, "owl": "an owl"}),
        clip_classifier(str(tmp_path), PROMPTS),
    ]
    assert len({each.digest for each in made}) == 3
    assert clip_classifier(str(clip), PROMPTS).digest == made[0].digest


# --- which names are CLIPs ---------------------------------------------------------------------------------------------


def test_clips_are_known_by_name_or_by_their_config(tmp_path: Path, clip: Path):
    for kind in ("CLIPVisionModel", "SiglipModel", "ViTForImageClassification"):
        save_vision_model(tmp_path / kind, kind)
        assert not is_clip(str(tmp_path / kind))
    assert all(map(is_clip, ("clip", "clip@112", "openai/clip-vit-base-patch32", str(clip), f"{clip}@56")))
    (tmp_path / "net.pt").write_bytes(b"")
    for name in ("digits-guide", "pixels", "dinov2", "clip@x", "own.py:clip", "a/b.py", str(tmp_path / "net.pt"), "/no", "no"):
        assert not is_clip(name), name


# --- without weights ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_skeleton_costs_what_the_real_one_costs(tmp_path: Path, clip: Path):
    shutil.copytree(clip, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "vocab*", "merges*"))
    outline, real = clip_skeleton(str(tmp_path / "bare"), PROMPTS), clip_classifier(str(clip), PROMPTS)
    assert all(each.is_meta for each in (*outline.parameters(), *outline.buffers()))
    counted = []
    for extractor, device in ((outline, "meta"), (real, "cpu")):
        with Count() as count:
            extractor.logits(torch.zeros(2, 3, 20, 20, device=device))
        counted.append(count.total)
    assert counted[0] == counted[1] > 0
    assert {name: each.shape for name, each in outline.state_dict().items()} == {
        name: each.shape for name, each in real.state_dict().items()
    }


def test_the_known_clips_need_no_file_to_be_counted():
    outline = load_for(ClassifierRequest(classifier="clip").looks, ["cat", "dog"], meta=True)
    assert outline.logits(torch.zeros(1, 3, 64, 64, device="meta")).shape == (1, 2)
    # ViT-L/14: 303.2 M of the image half, 0.8 M of its projection
    assert sum(each.numel() for each in outline.parameters()) == pytest.approx(304.0e6, rel=1e-3)


def test_cost_counts_it_as_features(stable_diffusion: Path):
    told = cost_of(recipe(stable_diffusion, {"classifier": "clip"}))
    assert told.recipe.parts["features"] > 1e9
    assert told.recipe.parts["features backward"] > 1e9
    assert told.networks["features: clip"] == pytest.approx(304.0e6, rel=1e-3)


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_come_from_the_template_or_are_given():
    asked = ClassifierRequest(classifier="clip", template="a sketch of a {}, {}", prompts={"owl": "a bird"})
    assert class_prompts(asked.looks, ["big_cat", "owl"]) == {"big_cat": "a sketch of a big cat, big cat", "owl": "a bird"}
    more = ClassifierRequest(classifier="clip", prompts={"cat": "1", "dog": "2"})
    assert class_prompts(more.looks, ["cat"]) == {"cat": "1"}, "a recipe can be narrowed to some of its classes"


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"template": "a photo"}, "template", "where the class name goes"),
        ({"template": "a {name}"}, "template", "where the class name goes"),
        ({"template": "a {} in {region}"}, "template", "no other braces"),
        ({"template": "a {} {"}, "template", "no other braces"),
        ({"prompts": {"fox": "a fox"}}, "prompts", "cat, dog"),
        ({"prompts": {"cat": "  "}}, "prompts.cat", "empty"),
        ({"prompts": {"cat": "an animal", "dog": "an animal"}}, "prompts.dog", "'cat' has the same"),
    ],
)
def test_prompts_that_can_not_be_made_are_refused(changes: dict[str, Any], field: str, said: str):
    with pytest.raises(RequestError) as caught:
        class_prompts(ClassifierRequest(classifier="clip", **changes).looks, ["cat", "dog"])
    assert caught.value.field == field
    assert said in str(caught.value)


def test_a_prompt_that_is_too_long_is_refused_not_cut(clip: Path):
    with pytest.raises(RequestError, match=r"^prompts: .*102 tokens, and this CLIP reads 77"):
        clip_classifier(str(clip), {"a": "x " * 100, "b": "y"})


def test_two_terms_with_other_prompts_look_with_two_extractors():
    one = ClassifierRequest(classifier="clip")
    others = [
        ClassifierRequest(classifier="clip", **changes)
        for changes in ({"template": "a {}"}, {"prompts": {"cat": "x"}}, {"softplus": 3.0})
    ]
    assert len({each.key for each in (one, *others)}) == 4


# --- a recipe ----------------------------------------------------------------------------------------------------------


def recipe(model: Path, term: dict[str, Any], **changes: Any) -> Recipe:
    data = {
        "model": {"name": str(model)},
        "classes": ["cat", "golden_retriever"],
        "per_class": 2,
        "cohort": 2,
        "sampler": {"steps": 4},
        "guidance": [{"method": "classifier", "scale": 0.3, "every": 1, **term}],
    }
    return recipe_from({**data, **changes})


def test_text_to_image_is_guided_to_what_clip_is_told(stable_diffusion: Path, clip: Path, tmp_path: Path):
    energies: dict[float, list[float]] = {}
    for scale in (0.0, 0.3):
        asked = recipe(stable_diffusion, {"classifier": str(clip), "scale": scale})
        job = prepare(asked, tmp_path / str(scale))
        assert job.targets == {"cat": {0: 0}, "golden_retriever": {0: 1}}
        assert job.extractors[str(clip)].classes == ("cat", "golden_retriever")
        summary = run(job)
        assert (summary.images, summary.failures) == (4, [])
        table = pq.ParquetFile(tmp_path / str(scale) / "manifest.parquet").read(use_threads=False)
        energies[scale] = table.column("energy_classifier").to_pylist()
    for plain, guided in zip(energies[0.0], energies[0.3], strict=True):
        assert guided < plain, "-log p(class | image) falls, of each image as its file holds it"


def test_what_this_clip_lacks_is_refused_before_any_work(stable_diffusion: Path, clip: Path, tmp_path: Path):
    for missing, said in (
        ("model.safetensors", "transformers can't load it"),
        ("preprocessor_config.json", "can't load"),
        ("config.json", "no config.json"),
    ):
        broken = tmp_path / missing
        shutil.copytree(clip, broken)
        (broken / missing).unlink()
        with pytest.raises(RequestError) as caught:
            prepare(recipe(stable_diffusion, {"classifier": str(broken)}), tmp_path / "out")
        assert caught.value.field == "guidance[0].classifier"
        assert said in str(caught.value)
    broken = tmp_path / "tokenizer"
    shutil.copytree(clip, broken, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*", "special*"))
    with pytest.raises(RequestError) as caught:
        prepare(recipe(stable_diffusion, {"classifier": str(broken)}), tmp_path / "out")
    assert caught.value.field == "guidance[0].classifier"
    assert "tokenizer's files are missing" in str(caught.value)
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["vocab_size"] = 30
    shutil.copytree(clip, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="tokenizer belongs to another model"):
        clip_classifier(str(tmp_path / "other"), PROMPTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("term", "changes", "field", "said"),
    [
        ({"softplus": 3.0}, {}, "guidance[0].softplus", "calls no ReLU"),
        ({}, {"classes": ["cat"]}, "guidance[0].tau2", "tau2 0"),
        ({"template": "x"}, {}, "guidance[0].template", "{}"),
        ({"prompts": {"fox": "a fox"}}, {}, "guidance[0].prompts", "cat, golden_retriever"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(stable_diffusion, clip, tmp_path, term, changes, field, said):
    with pytest.raises(RequestError) as caught:
        prepare(recipe(stable_diffusion, {"classifier": str(clip), **term}, **changes), tmp_path / "out")
    assert caught.value.field == field
    assert said in str(caught.value)


def test_one_class_is_guided_by_its_logit_alone(stable_diffusion: Path, clip: Path, tmp_path: Path):
    asked = recipe(stable_diffusion, {"classifier": str(clip), "tau2": 0.0}, classes=["cat"])
    assert run(prepare(asked, tmp_path / "out")).failures == []


def test_prompts_for_a_classifier_that_is_told_none_are_refused(stable_diffusion: Path, tmp_path: Path):
    save_vision_model(tmp_path / "net", "ResNetForImageClassification")
    for name, given in (("prompts", {"cat": "x"}), ("template", "a {}")):
        with pytest.raises(RequestError, match=rf"^guidance\[0\]\.{name}: .*takes no prompts; only CLIP does"):
            prepare(recipe(stable_diffusion, {"classifier": str(tmp_path / "net"), name: given}), tmp_path / "out")


def test_a_half_read_config_is_no_clip(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    assert not is_clip(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    assert is_clip(str(tmp_path))
