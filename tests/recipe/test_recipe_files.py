"""The files of recipes/: each can be read and is complete, and the presets of classifier guidance say what the paper does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import adm
from support.clip import save_clip
from support.pipelines import tiny_stable_diffusion
from support.pipelines_dit import tiny_dit
from support.vision import save_vision_model

from handful.cost.estimate import cost_of
from handful.features.registry import FeatureExtractor, extractor_skeleton
from handful.generate import prepare
from handful.generate.run import run
from handful.guidance import CFG, Classifier, Pull, Timing
from handful.guidance.classifier import ClassifierRequest
from handful.guidance.method import Context, PotentialRequest, make_terms
from handful.recipe.file import read_recipe, recipe_yaml
from handful.recipe.resolve import complete
from handful.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
MODELS = {"adm-imagenet128-elucd": "128x128_diffusion.pt", "edm-imagenet64-elucd": "edm-imagenet-64x64-cond-adm.pkl"}


def completed(name: str) -> Recipe:
    return complete(read_recipe(RECIPES / f"{name}.yaml"))[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_can_be_read_is_complete_and_can_be_written_again(path: Path):
    for part in read_recipe(path).parts:
        recipe, _ = complete(part)
        for term in recipe.guidance or ():
            if isinstance(term, PotentialRequest):
                assert term.every is not None
                assert term.hold is not None
        assert complete(recipe)[0] == recipe
        assert recipe_yaml(recipe)
    assert recipe_yaml(read_recipe(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_how_to_run_it_and_what_comes_out(path: Path):
    comment = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"handful generate recipes/{path.name}" in comment or f"handful cost recipes/{path.name}" in comment
    assert re.search(r"Differen(ces|t)\b|handful's own|(formula|rule) is the paper's", comment), "what of the publication?"
    if path.stem.endswith("elucd") or path.stem == "sd15-clip":
        assert "Differences." in comment
        assert "2310.11311" in comment
        assert "Not run here" in comment


# --- the presets of classifier guidance ---------------------------------------------------------------------------------


def term_of(name: str) -> Classifier:
    """The preset's classifier term, of a network that stands for its own."""
    guidance = completed(name).guidance or ()
    network = torch.nn.Linear(1, 3)
    stand_in = FeatureExtractor("stand-in", network, classify=network)
    extractors = {term.key: stand_in for term in guidance if isinstance(term, PotentialRequest)}
    (term,) = [term for term in make_terms(guidance, Context(extractors)) if isinstance(term, Classifier)]
    return term


def classifier_of(name: str) -> ClassifierRequest:
    (request,) = [term for term in completed(name).guidance or () if isinstance(term, ClassifierRequest)]
    return request


@pytest.mark.parametrize("name", ["adm-imagenet128-elucd", "dit-xl-2-256-elucd"])
def test_the_ddpm_presets_are_the_papers(name: str):
    """s = 1, tau1 = 1, tau2 = 0.5, beta = 3, c = 0.3, 250 ancestral steps; `tests/guidance` holds this pull to the formula."""
    term, request, recipe = term_of(name), classifier_of(name), completed(name)
    assert (term.scale, term.tau1, term.tau2, request.softplus) == (1.0, 1.0, 0.5, 3.0)
    assert term.pull == Pull(rule="ancestral", normalize="none", jacobian="identity", input="x0_hat")
    assert term.timing == Timing(boost=0.3)
    assert (recipe.sampler.name, recipe.sampler.steps, recipe.sampler.spacing) == ("ddpm", 250, "linspace")
    assert request.by_label
    cfg = make_terms((recipe.guidance or ())[:1], Context()) if name.startswith("dit") else []
    assert [each.scale for each in cfg if isinstance(each, CFG)] == ([0.5] if name.startswith("dit") else [])
    assert recipe.sampler.clamp is (True if name.startswith("adm") else None)


def test_the_edm_preset_is_the_papers():
    """w = 0.004, a = 0.3, beta = 5, tau1 = 1, tau2 = 0, before each step of Heun's method."""
    term, request, recipe = (
        term_of("edm-imagenet64-elucd"),
        classifier_of("edm-imagenet64-elucd"),
        completed("edm-imagenet64-elucd"),
    )
    assert (term.scale, term.tau1, term.tau2, request.softplus) == (0.004, 1.0, 0.0, 5.0)
    assert term.pull == Pull(rule="before", input="x_t", normalize="sample")
    assert term.timing == Timing(gain="edm", boost=0.3)
    assert (recipe.sampler.name, recipe.sampler.steps, recipe.sampler.clamp) == ("heun", 18, False)


@pytest.mark.parametrize(
    ("name", "parameters"), [("microsoft/resnet-50", 25_557_032), ("microsoft/resnet-101@128", 44_549_160)]
)
def test_their_classifiers_are_known_without_any_file(name: str, parameters: int):
    """The published numbers of parameters (He et al. 2015; torchvision's table)."""
    outline = extractor_skeleton(name)
    assert sum(each.numel() for each in outline.parameters()) == parameters
    assert outline.logits(torch.zeros(1, 3, 40, 40, device="meta")).shape == (1, 1000)
    assert outline.size == ((128, 128) if "@" in name else (224, 224))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plain", "cfg"), [("dit-xl-2-256-elucd", 7.4, 3.7), ("sd15-clip", 1.74, 0.90)])
def test_the_cost_that_a_preset_states_is_what_is_counted(name: str, plain: float, cfg: float):
    found = cost_of(read_recipe(RECIPES / f"{name}.yaml"))
    assert found.ratio_to_plain == pytest.approx(plain, rel=0.01)
    assert found.ratio_to_cfg == pytest.approx(cfg, rel=0.01)
    text = (RECIPES / f"{name}.yaml").read_text()
    assert f"{plain:g} times plain sampling's" in text
    assert re.search(rf"{cfg:.2f}|{cfg:g} times classifier-free guidance's", text)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model of each family, and a tiny ResNet and CLIP in the place of the classifiers."""
    root = tmp_path_factory.mktemp("tiny")
    adm.saved(root, adm.Variant(classes=4), name="adm.pt")
    (root / "edm.py").write_text("from support.edm import Preconditioned\n\n\ndef network():\n    return Preconditioned()\n")
    tiny_dit(root / "dit")
    tiny_stable_diffusion(root / "sd")
    (root / "resnet").mkdir()
    save_vision_model(root / "resnet", "ResNetForImageClassification")
    (root / "clip").mkdir()
    save_clip(root / "clip")
    models = {
        "adm-imagenet128-elucd": "adm.pt",
        "edm-imagenet64-elucd": "edm.py:network",
        "dit-xl-2-256-elucd": "dit",
        "sd15-clip": "sd",
    }
    classifiers = dict.fromkeys(models, "resnet") | {"sd15-clip": "clip"}
    return {name: (str(root / models[name]), str(root / classifiers[name])) for name in models}


def tiny(name: str, stand_ins: dict[str, Any], scale: float | None = None) -> Recipe:
    """The preset with tiny networks, two images of two classes and five steps."""
    recipe, (model, classifier) = read_recipe(RECIPES / f"{name}.yaml"), stand_ins[name]
    classes = ("goldfish", "otter") if name == "sd15-clip" else ("1", "3")
    guidance = tuple(
        term.model_copy(update={"classifier": classifier} | ({} if scale is None else {"scale": scale}))
        if isinstance(term, ClassifierRequest)
        else term
        for term in recipe.guidance or ()
    )
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": model, "dtype": "float32"}),
            "classes": classes,
            "per_class": 2,
            "cohort": 2,
            "guidance": guidance,
            "sampler": recipe.sampler.model_copy(update={"steps": 5}),
        }
    )


@pytest.mark.parametrize("name", ["adm-imagenet128-elucd", "edm-imagenet64-elucd", "dit-xl-2-256-elucd", "sd15-clip"])
def test_the_presets_run_and_their_term_changes_the_images(name: str, stand_ins: dict[str, Any], tmp_path: Path):
    told = {}
    for kind, scale in (("preset", None), ("plain", 0.0), ("strong", 0.5)):
        job = prepare(tiny(name, stand_ins, scale), tmp_path / kind)
        summary = run(job)
        assert (summary.failures, summary.images) == ([], 4)
        assert {name: list(each.values()) for name, each in job.targets.items()} == (
            {"goldfish": [0], "otter": [1]} if name == "sd15-clip" else {"1": [1], "3": [3]}
        )
        files = sorted((tmp_path / kind / "images").rglob("*.png"))
        told[kind] = {str(path.relative_to(tmp_path / kind)): path.read_bytes() for path in files}
    assert all(told["strong"][file] != told["plain"][file] for file in told["plain"])
    if name != "edm-imagenet64-elucd":  # its w, 0.004, may move an image by less than a gray level
        assert told["preset"] != told["plain"]
