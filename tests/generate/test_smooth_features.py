"""Potentials of features with Softplus for ReLU: exemplars are seen by the same smooth network, and only by that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handful.cost.estimate import cost_of
from handful.data.exemplars import Exemplars
from handful.data.images import write_png
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.features.softplus import softened
from handful.generate import prepare
from handful.generate.run import _exemplar_features, run
from handful.guidance.chamfer import ChamferRequest
from handful.guidance.classifier import ClassifierRequest
from handful.guidance.energy import EnergyRequest
from handful.recipe.extractors import load_for
from handful.recipe.schema import for_model, recipe_from
from handful.runs.metadata import guided_by
from handful.zoo.digits import load_digits_split


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real 3s and four 7s."""
    folder, split = tmp_path_factory.mktemp("digits"), load_digits_split()
    for label in (3, 7):
        (folder / str(label)).mkdir()
        for number, image in enumerate(split.train_images[split.train_labels == label][:4]):
            write_png(folder / str(label) / f"{number}.png", image)
    return folder


def recipe(exemplars: Path, *terms: dict[str, object]):
    return recipe_from(
        {
            "model": {"name": "digits"},
            "exemplars": {"path": str(exemplars)},
            "sampler": {"steps": 4},
            "per_class": 3,
            "guidance": [{"features": "digits-guide", **term} for term in terms],
        }
    )


def test_the_exemplars_are_seen_by_the_softened_network(digits, tmp_path):
    job = prepare(recipe(digits, {"method": "energy", "softplus": 3.0}, {"method": "chamfer"}), tmp_path / "out")
    features = _exemplar_features(job, tmp_path / "cache")["3"]
    plain = load_extractor("digits-guide")
    images = job.exemplars.images["3"]  # type: ignore[union-attr]
    torch.testing.assert_close(features["digits-guide softplus 3", 1], softened(plain, 3.0)(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["digits-guide", 1], plain(images), rtol=1e-5, atol=1e-5)


def test_it_guides_costs_the_same_and_the_run_knows_who_guided(digits, tmp_path):
    made = {}
    for name, term in (("sharp", {}), ("smooth", {"softplus": 3.0}), ("hard", {"softplus": 1e30})):
        asked = recipe(digits, {"method": "energy", **term})
        assert run(prepare(asked, tmp_path / name)).failures == []
        made[name] = [file.read_bytes() for file in sorted((tmp_path / name / "images").rglob("*.png"))]
    assert made["smooth"] != made["sharp"]
    assert made["hard"] == made["sharp"]
    assert guided_by(tmp_path / "smooth", "digits-guide", load_extractor("digits-guide").digest)
    costs = [cost_of(recipe(digits, {"method": "energy", **term})).recipe.flops_per_image for term in ({}, {"softplus": 3.0})]
    assert costs[0] == costs[1]


def test_a_smooth_term_shares_its_network_with_a_classifier_as_smooth():
    energy, classifier = EnergyRequest(features="digits-guide", softplus=3), ClassifierRequest(classifier="digits-guide")
    assert energy.key != classifier.key
    assert energy.key == classifier.model_copy(update={"softplus": 3.0}).key
    assert energy.key != energy.model_copy(update={"softplus": 3.0000001}).key
    assert load_for(energy.looks).digest == softened(load_extractor("digits-guide"), 3.0).digest


def test_features_without_a_relu_are_refused_before_anything_is_written(digits, tmp_path):
    for features in ("pixels", "digits-judge"):
        with pytest.raises(RequestError, match="calls no ReLU") as caught:
            prepare(recipe(digits, {"method": "chamfer", "features": features, "softplus": 3.0}), tmp_path / "out")
        assert caught.value.field == "guidance[0].softplus"
    assert not (tmp_path / "out").exists()


def test_features_alone_serve_a_smooth_term_only_if_they_were_taken_so(digits, tmp_path):
    drawn = Exemplars.from_folder(digits, channels=1, size=(8, 8))
    plain = load_extractor("digits-guide")
    for name, extractor in (("plain", plain), ("smooth", softened(plain, 3.0))):
        ExemplarFeatures.of(drawn, [extractor]).save(tmp_path / f"{name}.safetensors")
    asked = {"method": "energy", "softplus": 3.0}
    assert run(prepare(recipe(tmp_path / "smooth.safetensors", asked), tmp_path / "out")).failures == []
    with pytest.raises(RequestError, match="digits-guide softplus 3"):
        prepare(recipe(tmp_path / "plain.safetensors", asked), tmp_path / "other")


def test_the_packaged_guides_energy_is_smooth_and_cheap_unless_said_otherwise():
    term = for_model(EnergyRequest(), "cifar10", 18)
    assert (term.features, term.softplus, term.jacobian, term.every, term.hold) == ("cifar10-guide", 3.0, "gaussian", 4, True)
    assert (term.scale, term.smoothing.shift) == (0.3, 2)
    assert term.reduce is None, "the full size: docs/findings.md, section 9"
    assert for_model(EnergyRequest(softplus=None, jacobian="exact"), "cifar10", 18).softplus is None
    assert for_model(ChamferRequest(), "cifar10", 18).softplus is None
