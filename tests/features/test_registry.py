"""Extractors by name: what is found, what is refused, and what they would cost."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.vision import random_images as images
from support.vision import save_vision_model
from torch.nn.functional import interpolate

from handful.errors import RequestError
from handful.features.registry import extractor_skeleton, load_extractor
from handful.zoo.digits import load_digits_split
from handful.zoo.digits_classifier import DigitsClassifier


@pytest.mark.parametrize("name", ["digits-guide", "digits-judge"])
def test_the_packaged_classifiers_give_penultimate_features_and_logits(name):
    split = load_digits_split()
    extractor = load_extractor(name)
    assert extractor.is_classifier
    hits = (extractor.logits(split.test_images).argmax(1) == split.test_labels).double().mean()
    assert float(hits) > 0.95
    features = extractor(split.test_images[:5])
    assert isinstance(extractor.network, DigitsClassifier)
    logits, runs = extractor.logits(split.test_images[:5]), []
    torch.testing.assert_close(extractor.network.head(features), logits)
    extractor.network.trunk.register_forward_hook(lambda *_: runs.append(1))
    both = extractor.features_and_logits(split.test_images[:5])
    assert len(runs) == 1, "the network runs once for both"
    assert all(torch.equal(found, wanted) for found, wanted in zip(both, (features, logits), strict=True))
    # colour images of another size are what this network can see all the same
    enlarged = interpolate(split.test_images[:200].repeat(1, 3, 1, 1), (32, 32), mode="bicubic")
    hits = (extractor.logits(enlarged).argmax(1) == split.test_labels[:200]).double().mean()
    assert float(hits) > 0.9


@pytest.mark.parametrize(
    "name", ["resnet9000", "some-body/some-model-that-is-not-cached", "/no/such/folder", "", "a b c", "x/y/z"]
)
def test_an_unknown_name_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"^features: "):
        load_extractor(name)


FILE = """
import torch
from handful.features.registry import FeatureExtractor

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
from handful.features.registry import FeatureExtractor

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


# --- the hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_name_that_is_not_cached_names_the_cache_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(RequestError, match=r"^features: 'facebook/dinov2-base': ") as caught:
        load_extractor("dinov2")
    for said in (str(tmp_path / "hub"), "hf download facebook/dinov2-base", "HF_HUB_OFFLINE is set", "pixels (to guide by)"):
        assert said in str(caught.value)


@pytest.mark.slow
def test_a_hub_name_in_the_cache_is_loaded_offline(tmp_path):
    saved = tmp_path / "hub" / "models--some--body" / "snapshots" / ("0" * 40)
    saved.mkdir(parents=True)
    save_vision_model(saved, "Dinov2Model")
    (saved.parents[1] / "refs").mkdir()
    (saved.parents[1] / "refs" / "main").write_text("0" * 40)
    code = (
        "import sys, json; from handful.features.registry import *; print(json.dumps([load_extractor(name).digest"
        " for name in ('some/body', sys.argv[1])] + [str(extractor_skeleton('some/body@56').size)]))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, wanted, size = json.loads(done.stdout)
    assert found == wanted
    assert size == "(56, 56)"


# --- skeletons ---------------------------------------------------------------------------------------------------------

# The parameters of the published checkpoints, as their model cards count them.
PUBLISHED = {
    "dinov2-small": (22_056_576, 384),
    "dinov2": (86_580_480, 768),
    "dinov2-large": (304_368_640, 1024),
    "dinov2-giant": (1_136_480_768, 1536),
    "clip": (303_179_776, 1024),
    "openai/clip-vit-base-patch32": (87_456_000, 768),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_well_known_networks_are_made_without_any_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    extractor = extractor_skeleton(name)
    assert extractor.size == (224, 224)
    assert extractor.digest == ""
    batch = torch.zeros(1, 3, 256, 256, device="meta", requires_grad=True)
    features = extractor(batch)
    assert (sum(one.numel() for one in extractor.parameters()), features.shape[1]) == PUBLISHED[name]
    features.sum().backward()
    assert batch.grad is not None


@pytest.mark.parametrize("name", ["pixels", "digits-guide"])
def test_packaged_extractors_move_to_the_meta_device(name):
    batch = torch.zeros(2, 1, 8, 8, device="meta", requires_grad=True)
    features = extractor_skeleton(name)(batch)
    assert (features.device.type, len(features)) == ("meta", 2)
    features.sum().backward()


STAYS = """
class Stays(torch.nn.Module):
    def _apply(self, *words, **more):
        raise RuntimeError("I stay")

def stays():
    return FeatureExtractor("stays", Stays())
"""


def test_a_users_file_moves_to_the_meta_device_or_is_refused_by_name(tmp_path):
    (tmp_path / "own.py").write_text(FILE + STAYS)
    assert extractor_skeleton(f"{tmp_path / 'own.py'}:mine")(torch.zeros(2, 1, 8, 8, device="meta")).shape == (2, 4)
    with pytest.raises(RequestError, match=r"^features: .*own\.py:stays': it can't be moved to the meta device \(I stay\)"):
        extractor_skeleton(f"{tmp_path / 'own.py'}:stays")


# --- another size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixels@8", "digits-guide@16", "own.py:mine@32", "net.pt@32"])
def test_only_models_of_transformers_take_another_size(name):
    with pytest.raises(
        RequestError,
        match=rf"^features: '{name}': only transformers models and efficientnet-lite0 .* Write {name.split('@')[0]}\.",
    ):
        load_extractor(name)


def test_a_side_that_is_no_number_is_refused_with_the_remedy():
    with pytest.raises(RequestError, match=r"^features: 'dinov2@small': .* Write dinov2@112"):
        load_extractor("dinov2@small")


def test_a_directory_with_an_at_in_its_name_is_a_directory(tmp_path):
    (tmp_path / "mine@56").mkdir()
    save_vision_model(tmp_path / "mine@56", "Dinov2Model")
    assert load_extractor(str(tmp_path / "mine@56")).size == (28, 28)
    assert load_extractor(f"{tmp_path / 'mine@56'}@56").size == (56, 56)
