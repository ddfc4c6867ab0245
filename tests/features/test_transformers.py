"""transformers' models as extractors: the same numbers as transformers itself, gradients, and what is refused unread."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.vision import CLASSIFIERS, MEAN, POOLED, PREPROCESSING, STD, UNFIT, random_images, save_vision_model
from torch import Tensor, nn

from handful.errors import RequestError
from handful.features.registry import extractor_skeleton, load_extractor

CONVOLUTIONAL = ("ConvNext", "ResNet", "Swin")  # these take any size without being told


def normalised(images: Tensor) -> Tensor:
    return ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def image_half(model: Any) -> Any:
    return getattr(model, "vision_model", model) if type(model).__name__ in ("CLIPModel", "SiglipModel") else model


@torch.no_grad()
def reference(model: Any, images: Tensor, **words: Any) -> Tensor:
    """transformers' own pooled output, or its logits with every classifier taken off."""
    given = normalised(images)
    if type(model).__name__ in POOLED:
        return image_half(model)(pixel_values=given, **words).pooler_output.flatten(1)
    heads = ("cls_classifier", "distillation_classifier") if hasattr(model, "cls_classifier") else ("classifier",)
    kept = {name: getattr(model, name) for name in heads}
    for name in heads:
        setattr(model, name, nn.Flatten())
    answer = model(pixel_values=given, **words)
    for name, head in kept.items():
        setattr(model, name, head)
    return torch.cat([answer.cls_logits, answer.distillation_logits], 1) if len(heads) == 2 else answer.logits


# --- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*POOLED, *CLASSIFIERS])
def test_features_are_those_of_transformers_own_forward(tmp_path, kind):
    model = save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path))
    batch = random_images(3, 3, 28, 28).float()
    found, wanted = extractor(batch), reference(model, batch)
    assert float(wanted.std(0).max()) > 1e-3, "the images must not look alike to it"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extractor(batch[:1]), found[:1], rtol=1e-4, atol=1e-5)
    gray = batch[:, :1]
    assert torch.equal(extractor(gray), extractor(gray.repeat(1, 3, 1, 1)))
    assert torch.equal(extractor(batch.half()), extractor(batch.half().float()))
    assert (kind in CLASSIFIERS) == extractor.is_classifier


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_and_class_names_are_those_of_the_classifier(tmp_path, kind):
    model = save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path))
    batch = random_images(2, 3, 28, 28).float()
    with torch.no_grad():
        torch.testing.assert_close(extractor.logits(batch), model(pixel_values=normalised(batch)).logits, rtol=1e-5, atol=1e-5)
    assert extractor.classes == ("ant", "bee", "cow", "doe", "elk")


def test_the_last_layer_on_the_features_gives_the_logits(tmp_path):
    model = save_vision_model(tmp_path, "ResNetForImageClassification")
    extractor = load_extractor(str(tmp_path))
    batch = random_images(2, 3, 28, 28).float()
    torch.testing.assert_close(model.classifier[1](extractor(batch)), extractor.logits(batch))


def test_asking_twice_and_asking_for_logits_leaves_nothing_behind(tmp_path):
    save_vision_model(tmp_path, "ViTForImageClassification")
    extractor = load_extractor(str(tmp_path))
    batch = random_images(2, 3, 28, 28).float()
    first = extractor(batch)
    extractor.logits(batch)
    assert torch.equal(extractor(batch), first)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in extractor.modules())


# --- preprocessing -----------------------------------------------------------------------------------------------------


def test_preprocessing_is_that_of_transformers_own_processor_where_nothing_is_cropped(tmp_path):
    """PIL's bicubic filter rounds to whole grey levels, ours does not: one level is 1 / 255 / std."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, resample=3, image_mean=MEAN, image_std=STD)
    save_vision_model(tmp_path, "ViTModel")
    processor.save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path))
    for height, width in ((28, 28), (40, 61)):
        picture = np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8)
        wanted = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        found = extractor.prepare(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)
        assert float((found - wanted).abs().max()) < (1e-5 if height == 28 else 1.6 / 255 / min(STD))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ({"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 36}}, 28),
        ({"crop_size": 28, "do_center_crop": True, "size": {"shortest_edge": 36}}, 28),
        ({"crop_size": 36, "do_center_crop": False, "size": {"height": 28, "width": 28}}, 28),
        ({"size": {"shortest_edge": 28}}, 28),
        ({"size": 28}, 28),
    ],
    ids=["crop", "crop as a number", "no crop", "edge", "number"],
)
def test_the_network_is_fed_the_size_that_is_left_after_cropping(tmp_path, size, wanted):
    save_vision_model(tmp_path, "Dinov2Model", {**size, "image_mean": MEAN, "image_std": STD})
    extractor = load_extractor(str(tmp_path))
    assert (extractor.size, extractor.mean, extractor.std) == ((wanted, wanted), MEAN, STD)


def test_without_normalisation_the_network_sees_images_in_0_to_1(tmp_path):
    save_vision_model(tmp_path, "Dinov2Model", {"size": 28, "do_normalize": False})
    batch = random_images(2, 3, 28, 28)
    torch.testing.assert_close(load_extractor(str(tmp_path)).prepare(batch), (batch + 1) / 2)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"image_mean": MEAN, "image_std": STD}, "has no size"),
        ({"size": 28, "image_std": STD}, "has no image_mean and image_std"),
        ({**PREPROCESSING, "do_flip_channel_order": True}, "do_flip_channel_order: True"),
        ({**PREPROCESSING, "rescale_factor": 1 / 127.5}, "rescale_factor: 0.0078"),
        ({**PREPROCESSING, "include_top": True}, "include_top: True"),
    ],
)
def test_preprocessing_that_is_not_known_is_refused_before_the_weights(tmp_path, said, problem):
    save_vision_model(tmp_path, "Dinov2Model", said)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RequestError, match=rf"^features: .*{problem}"):
        load_extractor(str(tmp_path))


# --- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*POOLED, *CLASSIFIERS])
def test_gradients_reach_an_image_of_any_size_and_no_weight(tmp_path, kind):
    save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path))
    batch = random_images(2, 1, 50, 40).float().requires_grad_()
    extractor(batch).square().sum().backward()
    assert batch.grad is not None
    assert float(batch.grad[0].abs().amin(0).max()) > 0
    assert not any(one.requires_grad for one in extractor.parameters())


@pytest.mark.parametrize("kind", ["Dinov2Model", "ResNetForImageClassification"])
def test_the_gradient_is_the_finite_difference(tmp_path, kind):
    save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path)).double()
    batch = random_images(1, 3, 33, 30).requires_grad_()
    assert torch.autograd.gradcheck(extractor, (batch,), eps=1e-6, atol=1e-6, fast_mode=True)


# --- another size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "Dinov2Model",
        "DINOv3ViTModel",
        "CLIPModel",
        "SiglipModel",
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "SwinForImageClassification",
        "ConvNextModel",
    ],
)
def test_another_side_is_fed_to_the_network_with_its_positions_interpolated(tmp_path, kind):
    model = save_vision_model(tmp_path, kind)
    usual, extractor = load_extractor(str(tmp_path)), load_extractor(f"{tmp_path}@56")
    assert extractor.size == (56, 56)
    assert extractor.digest != usual.digest
    batch = random_images(2, 3, 56, 56).float()
    told = not kind.startswith(("Dino", "DINO", *CONVOLUTIONAL))  # the others interpolate, or need not
    wanted = reference(model, batch, **({"interpolate_pos_encoding": True} if told else {}))
    torch.testing.assert_close(extractor(batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [0, 30])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused_naming_both_that_are_near(tmp_path, side):
    save_vision_model(tmp_path, "Dinov2Model")
    near = "@14 or .*@28" if side == 0 else "@28 or .*@42"
    with pytest.raises(
        RequestError, match=rf"^features: .*@{side}': .*multiple of the network's patch size, 14\. Write .*{near}"
    ):
        load_extractor(f"{tmp_path}@{side}")


def test_a_network_that_takes_one_size_only_is_refused_another(tmp_path):
    save_vision_model(tmp_path, "CLIPModel")
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "size": 42}))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RequestError, match=r"^features: .*CLIPVisionModel can't be run on images of 42 x 42 \(Input"):
        load_extractor(str(tmp_path))


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("BertModel", "a BertModel takes input_ids, not images"),
        ("DetrForObjectDetection", "a DetrModel can't be run on images of 28 x 28"),
        ("YolosForObjectDetection", "saved as a YolosForObjectDetection, without the weights of a pooled output"),
        ("ViTForMaskedImageModeling", "saved as a ViTForMaskedImageModeling, without the weights of a pooled output"),
        ("ViTMAEModel", "a ViTMAEModel has no pooled output and is not an image classifier"),
        ("Siglip2VisionModel", "a Siglip2VisionModel can't be run on images of 28 x 28"),
    ],
)
def test_what_gives_no_features_is_refused_before_its_weights_are_read(tmp_path, kind, problem):
    assert kind in UNFIT
    save_vision_model(tmp_path, kind)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    for load in (load_extractor, extractor_skeleton):
        with pytest.raises(RequestError, match=rf"^features: .*{problem}"):
            load(str(tmp_path))


def test_a_classifier_without_classes_is_refused(tmp_path):
    save_vision_model(tmp_path, "ViTForImageClassification", id2label={})
    with pytest.raises(RequestError, match=r"^features: .*no last linear layer of a ViTForImageClassification"):
        load_extractor(str(tmp_path))


def test_a_directory_without_config_preprocessing_or_weights_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"^features: .*holds no config\.json"):
        load_extractor(str(tmp_path))
    save_vision_model(tmp_path, "Dinov2Model")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match=r"^features: .*image processor"):
        load_extractor(str(tmp_path))
    save_vision_model(tmp_path, "Dinov2Model")
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RequestError, match=r"^features: .*transformers can't load it"):
        load_extractor(str(tmp_path))


def test_a_model_whose_weights_lack_a_part_is_refused_and_not_filled_at_random(tmp_path):
    model = save_vision_model(tmp_path, "Dinov2Model")
    state = {key: value for key, value in model.state_dict().items() if "layer.1." not in key}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"^features: .*weights are missing, first encoder\.layer\.1\."):
        load_extractor(str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path):
    model = save_vision_model(tmp_path, "Dinov2Model")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"^features: .*model\.safetensors"):
        load_extractor(str(tmp_path))


def test_weights_saved_in_half_precision_run_in_float32(tmp_path):
    model = save_vision_model(tmp_path, "Dinov2Model")
    model.half().save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path))
    assert {one.dtype for one in extractor.parameters()} == {torch.float32}


# --- skeletons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*POOLED, *CLASSIFIERS])
def test_the_skeleton_is_the_extractor_without_its_weights(tmp_path, kind):
    save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    skeleton = extractor_skeleton(str(tmp_path))
    shapes = [{key: value.shape for key, value in one.state_dict().items()} for one in (extractor, skeleton)]
    assert shapes[0] == shapes[1]
    assert {value.device.type for value in skeleton.parameters()} == {"meta"}
    assert (skeleton.size, skeleton.classes, skeleton.digest) == (extractor.size, extractor.classes, "")
    batch = torch.zeros(2, 3, 50, 40, device="meta", requires_grad=True)
    features = skeleton(batch)
    assert features.shape == extractor(random_images(2, 3, 50, 40).float()).shape
    features.sum().backward()
    assert batch.grad is not None
