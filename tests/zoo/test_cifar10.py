"""The packaged CIFAR-10: the weights are what their cards say, the features are the labels', and no image is in the package."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import handful
from handful.core.noise import noised
from handful.data.shared_exemplars import ExemplarFeatures, View
from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.features.softplus import softened
from handful.judge.audit import TRANSFORMS
from handful.models import load, skeleton
from handful.recipe.schema import recipe_from, with_defaults
from handful.zoo import exemplars_path, zoo_path
from handful.zoo.cifar10 import CLASSES, JUDGES, UNTOUCHED, load_cifar10_classifier, load_real_features, probe
from handful.zoo.cifar_resnet import Block, CifarResNet
from handful.zoo.cifar_vit import Merge

ROLES = ("guide", "judge")
SIZES = {"guide": 64, "judge": 64, "simclr": 128}  # of the features


@pytest.fixture(scope="module")
def exemplars() -> ExemplarFeatures:
    return ExemplarFeatures.load(exemplars_path("cifar10-exemplars"))


def named_rightly(role: str, features: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of features that the classifier's own last layer names as labelled."""
    classifier = load_cifar10_classifier(role)
    return float((classifier.linear(features).argmax(1) == labels).double().mean())


def test_the_model_knows_its_classes_and_its_null_class():
    outline = skeleton("cifar10")
    assert outline.shape == (3, 32, 32)
    assert tuple(outline.classes) == CLASSES
    assert outline.null_class == 10
    assert outline.has_null


def test_the_weights_are_bfloat16_and_small():
    folder = zoo_path("cifar10")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(file, framework="pt") as held:
        assert {held.get_slice(name).get_dtype() for name in held.keys()} == {"BF16"}  # noqa: SIM118
    assert file.stat().st_size < 36e6
    others = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path != file)
    assert others < 8e6


def test_the_model_takes_noise_off_a_picture_it_never_saw():
    denoiser = load("cifar10")
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.parameters())
    at, x0 = denoiser.levels.at(100), probe()
    x_t = noised(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), at)
    with torch.no_grad():
        found = denoiser(x_t, at, denoiser.condition([10]))
    error, before = ((each - x0).square().mean().sqrt() for each in (found, x_t / at.alpha))
    assert error < 0.6 * before


@pytest.mark.parametrize("role", SIZES)
def test_a_classifier_is_frozen_and_answers_with_features_and_logits_by_name(role):
    extractor = load_extractor(f"cifar10-{role}")
    assert extractor.is_classifier
    assert extractor.classes == CLASSES
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    images = probe().repeat(2, 1, 1, 1).requires_grad_()
    features = extractor(images)
    assert features.shape == (2, SIZES[role])
    torch.testing.assert_close(extractor.network.linear(features), extractor.logits(images))  # type: ignore[operator]
    features.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_an_unknown_classifier_is_refused():
    with pytest.raises(RequestError, match="guide, judge, simclr"):
        load_cifar10_classifier("jury")


def test_guide_and_judge_are_two_networks():
    guide, judge = (load_cifar10_classifier(role) for role in ROLES)
    depths = [sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) + 1 for network in (guide, judge)]
    assert depths == [20, 56]
    assert load_extractor("cifar10-guide").digest != load_extractor("cifar10-judge").digest


def test_the_unrelated_judge_shares_neither_layers_nor_activations_with_the_guide():
    judge = load_cifar10_classifier("simclr")
    kinds = {type(module) for module in judge.modules()}
    assert not kinds & {torch.nn.BatchNorm2d, torch.nn.ReLU}
    assert torch.nn.LayerNorm in kinds
    with pytest.raises(RequestError, match="calls no ReLU"):
        softened(load_extractor("cifar10-simclr"), 3.0)


def test_merging_tokens_joins_the_four_of_a_square():
    merge = Merge(2, 8)
    merge.norm, merge.reduce = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    grid = torch.arange(16.0).view(4, 4)
    tokens = torch.stack([grid.flatten(), -grid.flatten()], 1)[None]
    first = merge(tokens)[0, 0]
    assert first[::2].tolist() == [0, 1, 4, 5]
    assert merge(tokens)[0, 3, ::2].tolist() == [10, 11, 14, 15]


def test_a_shortcut_without_weights_keeps_every_second_pixel_and_pads_with_zero_channels():
    """With the residual branch silenced a block is its shortcut (He et al. 2015, option A)."""
    block = Block(2, 4).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.arange(32.0).view(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)
    assert sum(parameter.numel() for parameter in CifarResNet(20).parameters()) == 269_722  # the paper's 0.27 M, table 6


@pytest.mark.parametrize("role", SIZES)
def test_the_card_states_the_accuracy(role):
    folder = zoo_path("cifar10") / role
    stated = json.loads((folder / "config.json").read_text())["test_accuracy"]
    assert f"{stated:.4f}" in (folder / "README.md").read_text()


def test_the_third_partys_licence_is_there():
    text = (zoo_path("cifar10") / "LICENSE.md").read_text()
    assert "Copyright (c) 2018, Yerlan Idelbayev" in text
    assert "Redistributions in binary form must reproduce" in text


def test_the_exemplars_are_32_of_each_class_as_guide_judge_and_the_smooth_guide_see_them(exemplars):
    assert exemplars.classes == list(CLASSES)
    assert set(exemplars.counts.values()) == {32}
    assert exemplars.shape == (3, 32, 32)
    extractors = [load_extractor(f"cifar10-{role}") for role in ROLES]
    smooth = softened(extractors[0], 3.0)
    assert set(exemplars.features) == {View(each.digest, 1) for each in (*extractors, smooth)} | {View(smooth.digest, 2)}
    assert "first 32 images of each class" in exemplars.source
    assert exemplars.licence
    assert len({content for of_class in exemplars.hashes.values() for content in of_class}) == 320


@pytest.mark.parametrize("role", ROLES)
def test_the_exemplars_features_are_of_the_class_they_are_filed_under(exemplars, role):
    found = exemplars.seen_by(load_extractor(f"cifar10-{role}"), 1)
    labels = torch.arange(10).repeat_interleave(32)
    assert named_rightly(role, torch.cat([found[name] for name in CLASSES]), labels) > 0.75


@pytest.mark.parametrize("role", JUDGES)
def test_the_real_features_are_the_packaged_judges_of_the_class_they_are_filed_under(role):
    real = load_real_features(role)
    assert real.judge == load_extractor(f"cifar10-{role}").digest
    labels = torch.tensor([CLASSES.index(name) for name in real.labels])
    assert labels.bincount().tolist() == [100] * 10
    stated = json.loads((zoo_path("cifar10") / role / "config.json").read_text())["test_accuracy"]
    # the stated accuracy is that of 10,000 images: 1,000 of them miss it by more than 0.05 once in 20,000 draws
    assert named_rightly(role, real.features[UNTOUCHED], labels) == pytest.approx(stated, abs=0.05)
    for features in real.features.values():
        assert features.shape == (1000, SIZES[role])
        assert features.isfinite().all()


def test_the_real_features_know_todays_transforms():
    """JPEG by another version of the codec may differ by some levels; another quality, or another transform, differs more."""
    real = load_real_features()
    assert set(real.features) == {UNTOUCHED, *TRANSFORMS}
    for name, transform in TRANSFORMS.items():
        assert float((transform(probe()) - real.probes[name]).abs().mean()) < 0.01, "tools/package_cifar10.py --only features"


def test_no_image_and_no_thumbnail_is_in_the_package():
    for file in ("exemplars.safetensors", "real-judge.safetensors", "real-simclr.safetensors"):
        with safe_open(zoo_path("cifar10") / file, framework="pt") as held:
            shapes = {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118
        assert all(len(shape) == 2 and shape[1] in (64, 128) for name, shape in shapes.items() if not name.startswith("probe/"))


def test_features_that_are_automatic_are_the_guides():
    recipe, notes = with_defaults(recipe_from({"model": {"name": "cifar10"}, "exemplars": {"path": "cifar10-exemplars"}}))
    assert any("cifar10-guide" in note for note in notes)
    assert [term.features for term in recipe.guidance or ()] == ["cifar10-guide"]  # type: ignore[union-attr]


def test_the_packaged_exemplars_guide_the_packaged_model(tmp_path):
    asked = {
        "model": {"name": "cifar10"},
        "exemplars": {"path": "cifar10-exemplars", "k": 4},
        "classes": ["frog"],
        "per_class": 2,
        "sampler": {"steps": 2},
    }
    summary = handful.generate(recipe_from(asked), tmp_path / "out")
    assert (summary.images, summary.failures) == (2, [])
