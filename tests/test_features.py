"""The extractor's contract: what a network is fed, what comes back, and what its digest stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from handful.errors import RequestError
from handful.features import FeatureExtractor, load_extractor, pixels
from handful.zoo.classifier import DigitsClassifier
from handful.zoo.digits import load_digits_classifier, load_digits_split

LUMA = (0.299, 0.587, 0.114)


def images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.rand(n, c, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bare(**words: Any) -> FeatureExtractor:
    """An extractor whose features are what its network is fed."""
    return FeatureExtractor("bare", nn.Identity(), **words)


# --- what the network is fed -------------------------------------------------------------------------------------------


def test_gray_is_repeated_and_colour_comes_to_luma():
    gray, colour = images(2, 1, 3, 4), images(2, 3, 3, 4)
    assert torch.equal(bare(channels=3).prepare(gray), gray.repeat(1, 3, 1, 1))
    luma = sum(weight * colour[:, i] for i, weight in enumerate(LUMA))
    torch.testing.assert_close(bare(channels=1).prepare(colour)[:, 0], luma)
    assert torch.equal(bare(channels=3).prepare(colour), colour)
    assert torch.equal(bare(channels=1).prepare(gray), gray)


def test_mean_and_std_are_of_images_in_0_to_1():
    colour, mean, std = images(2, 3, 3, 4), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = bare(mean=mean, std=std).prepare(colour)
    for i in range(3):
        torch.testing.assert_close(found[:, i], (colour[:, i] * 0.5 + 0.5 - mean[i]) / std[i])
    assert torch.equal(bare().prepare(colour), colour)


def test_images_are_resized_with_antialiasing_and_left_alone_at_their_size():
    small, large = images(2, 3, 8, 10), images(2, 3, 20, 31)
    extractor = bare(size=(8, 10))
    assert torch.equal(extractor.prepare(small), small)
    wanted = interpolate(large, (8, 10), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(extractor.prepare(large), wanted)
    flat = torch.full((1, 3, 40, 40), 0.3, dtype=torch.float64)
    torch.testing.assert_close(extractor.prepare(flat), torch.full((1, 3, 8, 10), 0.3, dtype=torch.float64))
    stripes = torch.ones(1, 3, 32, 40, dtype=torch.float64)
    stripes[..., ::2] = -1  # too fine for the small image: without antialiasing they come out as black or white
    assert float(extractor.prepare(stripes)[..., 2:-2].abs().max()) < 0.3


def test_the_order_is_resize_then_normalise():
    large, mean, std = images(2, 3, 20, 30), (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    both = bare(size=(8, 8), mean=mean, std=std).prepare(large)
    resized = bare(size=(8, 8)).prepare(large)
    torch.testing.assert_close(both, bare(mean=mean, std=std).prepare(resized))


def test_half_precision_images_are_measured_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        assert bare(size=(4, 4)).prepare(images(1, 3, 9, 9).to(dtype)).dtype == torch.float32
    assert bare(size=(4, 4)).prepare(images(1, 3, 9, 9)).dtype == torch.float64


def test_features_are_flat_rows_in_the_order_of_the_images():
    batch = images(3, 3, 4, 4)
    found = FeatureExtractor("pool", nn.AdaptiveAvgPool2d(2))(batch)
    assert found.shape == (3, 12)
    torch.testing.assert_close(found[1], batch[1].view(3, 2, 2, 2, 2).mean((2, 4)).flatten())


def test_pixels_are_the_images_of_any_channels_themselves():
    for channels in (1, 3):
        batch = images(2, channels, 5, 4)
        assert torch.equal(pixels()(batch), batch.flatten(1))


def test_the_gradient_flows_to_the_image_through_everything():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh()).double()
    extractor = FeatureExtractor("conv", network, size=(5, 5), mean=(0.5,) * 3, std=(0.2,) * 3)
    for channels in (1, 3):
        batch = images(1, channels, 7, 7).requires_grad_()
        assert torch.autograd.gradcheck(extractor, (batch,), eps=1e-6, atol=1e-6)
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 2, 8, 8), (8, 8)])
def test_what_is_no_batch_of_gray_or_rgb_is_refused_by_name(shape):
    with pytest.raises(RequestError, match=r"^images: "):
        pixels()(torch.zeros(shape))


def test_mean_and_std_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="together"):
        bare(mean=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="channel"):  # they would make three channels of one
        bare(channels=1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="channel"):
        bare(channels=3, mean=(0.5,), std=(0.5, 0.5, 0.5))


# --- digests -----------------------------------------------------------------------------------------------------------


def linear(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(27, 4), nn.ReLU())


def digest(network: nn.Module | None = None, **words: Any) -> str:
    return FeatureExtractor(words.pop("name", "x"), network or linear(), **words).digest


def test_a_digest_is_of_weights_and_preprocessing_and_not_of_the_name():
    same = digest()
    assert digest() == same
    assert digest(name="another") == same
    moved = linear()
    with torch.no_grad():
        moved[1].weight[0, 0] += 1e-6  # pyright: ignore[reportIndexIssue]
    others = [
        digest(moved),
        digest(linear(seed=1)),
        digest(linear().half()),
        digest(size=(3, 3)),
        digest(channels=1),
        digest(mean=(0.5,) * 3, std=(0.5,) * 3),
        digest(mean=(0.5,) * 3, std=(0.25,) * 3),
    ]
    assert len({same, *others}) == 8


def test_networks_that_differ_without_differing_in_weights_have_their_own_digests():
    smooth, sharper = linear(), linear()
    smooth[2], sharper[2] = nn.Softplus(beta=3), nn.Softplus(beta=5)
    shuffled = nn.Sequential(nn.Flatten(), linear()[1])
    assert len({digest(), digest(smooth), digest(sharper), digest(shuffled)}) == 4


def test_other_features_of_the_same_network_have_their_own_digest():
    network = load_digits_classifier("judge")
    assert digest(network, channels=1) != digest(network, channels=1, features=network.features)


# --- by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-guide", "digits-judge"])
def test_the_packaged_classifiers_give_penultimate_features_and_logits(name):
    split = load_digits_split()
    extractor = load_extractor(name)
    assert extractor.is_classifier
    hits = (extractor.logits(split.test_images).argmax(1) == split.test_labels).double().mean()
    assert float(hits) > 0.95
    features = extractor(split.test_images[:5])
    assert isinstance(extractor.network, DigitsClassifier)
    torch.testing.assert_close(extractor.network.head(features), extractor.logits(split.test_images[:5]))
    # colour images of another size are what this network can see all the same
    enlarged = interpolate(split.test_images[:200].repeat(1, 3, 1, 1), (32, 32), mode="bicubic")
    hits = (extractor.logits(enlarged).argmax(1) == split.test_labels[:200]).double().mean()
    assert float(hits) > 0.9


def test_an_extractor_without_logits_says_so():
    assert not pixels().is_classifier
    with pytest.raises(RequestError, match=r"^features: 'pixels': .*digits-judge"):
        pixels().logits(images(1, 1, 8, 8))


def saved(folder: Path, kind: str, said: dict[str, Any]) -> nn.Module:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Dinov2Model(Dinov2Config(**small)) if kind == "dinov2" else CLIPVisionModel(
            CLIPVisionConfig(**small, intermediate_size=32)
        )  # fmt: skip
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return model


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES: list[dict[str, Any]] = [
    {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 36}},
    {"size": {"shortest_edge": 28}},
    {"size": {"height": 28, "width": 28}},
    {"size": 28},
]


@pytest.mark.parametrize("size", SIZES, ids=["crop", "edge", "sides", "number"])
@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_a_transformers_model_gives_its_own_pooled_output(tmp_path, kind, size):
    said = {**size, "image_mean": MEAN, "image_std": STD, "image_processor_type": "BitImageProcessor"}
    model: Any = saved(tmp_path, kind, said)
    extractor = load_extractor(str(tmp_path))
    assert (extractor.size, extractor.mean, extractor.std) == ((28, 28), MEAN, STD)
    batch = images(3, 3, 28, 28).float()
    by_hand = ((batch + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(extractor(batch), model(pixel_values=by_hand).pooler_output, rtol=1e-5, atol=1e-5)
    larger = images(1, 1, 50, 40).float().requires_grad_()
    extractor(larger).square().sum().backward()
    assert larger.grad is not None
    assert float(larger.grad.abs().sum()) > 0


def test_a_transformers_model_that_says_no_size_is_refused_by_name(tmp_path):
    saved(tmp_path, "dinov2", {"image_mean": MEAN, "image_std": STD})
    with pytest.raises(RequestError, match=r"^features: .*says no size"):
        load_extractor(str(tmp_path))


def test_a_transformers_directory_without_preprocessing_or_weights_is_refused_by_name(tmp_path):
    saved(tmp_path, "dinov2", {"size": 28})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RequestError, match=r"^features: "):
        load_extractor(str(tmp_path))
    saved(tmp_path, "dinov2", {"size": 28})
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RequestError, match=r"^features: "):
        load_extractor(str(tmp_path))


def test_a_transformers_model_whose_weights_lack_a_part_is_refused_and_not_filled_at_random(tmp_path):
    model = saved(tmp_path, "dinov2", {"size": 28})
    state = {key: value for key, value in model.state_dict().items() if "layer.1." not in key}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"^features: .*weights are missing, first encoder\.layer\.1\."):
        load_extractor(str(tmp_path))


def test_pickled_weights_of_transformers_are_not_read(tmp_path):
    model = saved(tmp_path, "dinov2", {"size": 28})
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"^features: "):
        load_extractor(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["resnet9000", "some-body/some-model-that-is-not-cached", "/no/such/folder", "", "a b c", "x/y/z"]
)
def test_an_unknown_name_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"^features: "):
        load_extractor(name)


FILE = """
import torch
from handful.features import FeatureExtractor

def mine():
    return FeatureExtractor("mine", torch.nn.AvgPool2d(4), channels=1)

made = mine()

def wrong():
    return torch.nn.Identity()

def needs(argument):
    return mine()
"""


def test_a_function_or_an_extractor_of_ones_own_file_is_taken(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    batch = images(2, 1, 4, 4)
    for attribute in ("mine", "made"):
        extractor = load_extractor(f"{tmp_path / 'own.py'}:{attribute}")
        torch.testing.assert_close(extractor(batch)[:, 0], batch.mean((1, 2, 3)))


@pytest.mark.parametrize("attribute", ["wrong", "absent", "torch"])
def test_what_gives_no_extractor_is_refused_by_name(tmp_path, attribute):
    (tmp_path / "own.py").write_text(FILE)
    with pytest.raises(RequestError, match=rf"^features: .*own\.py:{attribute}"):
        load_extractor(f"{tmp_path / 'own.py'}:{attribute}")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(RequestError, match=r"^features: .*no such Python file"):
        load_extractor(f"{tmp_path / 'none.py'}:mine")


def test_a_users_file_counts_into_the_digest_with_its_code(tmp_path):
    code = """
from torch import nn
from handful.features import FeatureExtractor

class Pool(nn.Module):
    def forward(self, x):
        return x.{how}((2, 3))

def load():
    return FeatureExtractor("pool", Pool(), channels=None)
"""
    file, digests = tmp_path / "mine.py", []
    for how in ("mean", "amax"):
        file.write_text(code.format(how=how))
        digests.append(load_extractor(f"{file}:load").digest)
    assert digests[0] != digests[1], "features kept on disk would answer for the old code"


@pytest.mark.parametrize(
    ("name", "said"),
    [("pixel", "Did you mean 'pixels'"), ("mine.py", "Write mine.py:FUNCTION"), ("dino_v2", "Did you mean 'dinov2'")],
)
def test_a_misspelt_extractor_is_refused_at_once_with_the_remedy(name, said):
    with pytest.raises(RequestError, match=said):
        load_extractor(name)


def test_a_users_file_that_fails_is_refused_naming_the_file_and_the_error(tmp_path):
    (tmp_path / "broken.py").write_text("import nothere\n")
    with pytest.raises(RequestError, match=r"broken.py.*No module named 'nothere'"):
        load_extractor(f"{tmp_path / 'broken.py'}:load")
