"""A pretrained extractor's last block: what is kept before it gives the whole network's features, and only it is trained."""

from pathlib import Path

import pytest
import torch
from support.vision import save_vision_model
from torch import nn

from handful.features.extractor import FeatureExtractor
from handful.features.registry import load_extractor
from handful.judge.last_block import LastBlock, LastBlockLearner

SAMPLE = torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
BLOCKS = {"Dinov2Model": "layer", "ResNetModel": "stages", "CLIPModel": "layers", "ViTForImageClassification": "layer"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_from_the_last_block_on_a_network_gives_its_own_features(kind, tmp_path: Path):
    save_vision_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path))
    learner = LastBlockLearner(extractor, SAMPLE)
    assert learner.path is not None
    assert BLOCKS[kind] in learner.path
    others = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tail = LastBlock(extractor, learner.path, learner._in_tuple, SAMPLE.shape[1:])
    features, whole = tail(learner.enter(others).float()), extractor(others)
    torch.testing.assert_close(features.detach(), whole, rtol=0.02, atol=0.02 * float(whole.abs().max()))
    features.sum().backward()
    trained = {name for name, weight in tail.named_parameters() if weight.grad is not None and bool(weight.grad.any())}
    assert trained
    assert all(name.startswith("block.") or learner.path in name for name in trained)


def test_a_head_with_the_last_block_learns_and_leaves_the_extractor_unchanged(tmp_path: Path):
    save_vision_model(tmp_path, "Dinov2Model")
    extractor = load_extractor(str(tmp_path))
    learner, draw = LastBlockLearner(extractor, SAMPLE), torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 28, 28, generator=draw) - 0.5 + (labels - 0.5).view(-1, 1, 1, 1)  # dark and bright
    before, entered = extractor(images), learner.enter(images)[:, None]
    network = learner.train(entered[:20], labels[:20], 2, steps=40, seed=0, batch=16)
    assert float((network(entered[20:, 0].float()).argmax(1) == labels[20:]).double().mean()) >= 0.9
    assert torch.equal(extractor(images), before)
    again = learner.train(entered[:20], labels[:20], 2, steps=40, seed=0, batch=16)
    assert torch.equal(again(entered[20:, 0].float()), network(entered[20:, 0].float()))


def test_a_network_that_cannot_start_at_its_last_block_trains_a_linear_head_alone(tmp_path: Path):
    save_vision_model(tmp_path, "SwinForImageClassification")  # its stages pass on the picture's size beside the tokens
    extractor = load_extractor(str(tmp_path))
    learner = LastBlockLearner(extractor, SAMPLE)
    assert learner.path is None
    torch.testing.assert_close(learner.enter(SAMPLE).float(), extractor(SAMPLE), rtol=1e-3, atol=1e-3)


def test_a_network_without_blocks_trains_a_linear_head_alone():
    extractor = FeatureExtractor("flat", nn.Identity(), size=(4, 4))
    learner = LastBlockLearner(extractor, SAMPLE[..., :4, :4])
    assert learner.path is None
    entered = learner.enter(SAMPLE[..., :4, :4])[:, None]
    network = learner.train(entered, torch.tensor([0, 1, 0, 1]), 2, steps=30, seed=0, batch=8)
    assert network(entered[:, 0].float()).argmax(1).tolist() == [0, 1, 0, 1]
