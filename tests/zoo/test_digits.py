"""The packaged digits: the split is what it always was, and the weights are what their cards say."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from handful.errors import RequestError
from handful.features.registry import load_extractor
from handful.zoo import ZOO, zoo_path
from handful.zoo.digits import CLASSES, load_digits_classifier, load_digits_split, split_indices, typical
from handful.zoo.digits_classifier import DigitsClassifier
from handful.zoo.mnist import load_uci_split

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_digits.py"
SPLIT_SHA256 = "9831979a813fa68a8991110327fe0ccc73ac44d24bc190055ff9189178af1ba9"


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


def test_zoo_imports_without_torch():
    code = "import sys, handful.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(RequestError, match="digits"):
        zoo_path("letters")
    with pytest.raises(RequestError, match="guide, judge"):
        load_digits_classifier("jury")


def test_every_zoo_model_is_a_folder_with_a_card():
    for name in ZOO:
        assert (zoo_path(name) / "README.md").is_file()


def test_the_split_never_changes():
    from sklearn.datasets import load_digits

    train, held_out = split_indices(load_digits().target)
    assert hashlib.sha256(train.astype("<i8").tobytes() + held_out.astype("<i8").tobytes()).hexdigest() == SPLIT_SHA256


def test_the_split_is_disjoint_and_complete():
    from sklearn.datasets import load_digits

    train, held_out = split_indices(load_digits().target)
    assert len(train) == 1100
    assert len(held_out) == 697
    assert set(train) | set(held_out) == set(range(1797))


def test_digits_are_gray_images_in_the_common_range(split):
    assert split.train_images.shape == (1100, 1, 8, 8)
    assert split.test_images.shape == (697, 1, 8, 8)
    assert split.train_images.dtype == torch.float32
    assert split.train_labels.dtype == torch.int64
    for images in (split.train_images, split.test_images):
        assert images.min() == -1
        assert images.max() == 1
    assert split.train_labels.bincount().tolist() == [110] * 10
    assert split.test_labels.bincount().min() >= 64


def test_typical_images_are_those_nearest_their_class_mean():
    images = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 5.0, 7.0]).view(-1, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])  # class 0 has mean 3.2
    assert typical(images, labels, share=0.4).tolist() == [2, 3, 5]


def test_typical_images_are_the_stated_share_of_each_class(split):
    chosen = typical(split.train_images, split.train_labels)
    assert split.train_labels[chosen].bincount().tolist() == [44] * 10
    with pytest.raises(RequestError, match="share"):
        typical(split.train_images, split.train_labels, share=0.0)


@pytest.mark.parametrize("name", ["guide", "judge", "uci-judge"])
def test_a_classifier_is_as_accurate_as_it_states(name, split):
    extractor = load_extractor(name if name == "uci-judge" else f"digits-{name}")
    held_out = load_uci_split() if name == "uci-judge" else split
    with torch.no_grad():
        predicted = extractor.logits(held_out.test_images).argmax(1)
    accuracy = (predicted == held_out.test_labels).double().mean().item()
    folder = zoo_path("digits") / name
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))["held_out_accuracy"]
    # One image may fall the other way on another processor.
    assert accuracy == pytest.approx(stated, abs=1.5 / len(predicted))
    assert accuracy >= 0.97
    assert f"{stated:.4f}" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["guide", "judge"])
def test_a_classifier_is_frozen_and_differentiable_in_the_image(name, split):
    classifier = load_digits_classifier(name)
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    images = split.test_images[:4].clone().requires_grad_()
    features = classifier.features(images)
    assert features.shape == (4, classifier.feature_size)
    features.square().sum().backward()
    assert images.grad.flatten(1).norm(dim=1).min() > 0


def test_the_head_reads_the_features(split):
    classifier = load_digits_classifier("guide")
    images = split.test_images[:4]
    torch.testing.assert_close(classifier(images), classifier.head(classifier.features(images)))


def test_guide_and_judge_are_of_different_kinds():
    guide, judge = load_digits_classifier("guide"), load_digits_classifier("judge")
    assert guide.architecture != judge.architecture
    assert any(isinstance(module, torch.nn.ReLU) for module in guide.modules())
    assert not any(isinstance(module, torch.nn.ReLU) for module in judge.modules())


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'plain' or 'residual'"):
        DigitsClassifier(architecture="transformer")


def test_the_unet_denoises_the_held_out_digits_and_knows_the_null_class(split):
    folder = zoo_path("digits")
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    told = json.loads((folder / "handful.json").read_text(encoding="utf-8"))
    assert told == {"classes": list(CLASSES), "null_class": 10}
    assert unet.config.num_class_embeds == 11
    assert scheduler.config.prediction_type == "v_prediction"

    t = torch.tensor(400)  # alpha and sigma are about 0.8 and 0.6
    alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    x0, eps = split.test_images, torch.randn(split.test_images.shape, generator=torch.Generator().manual_seed(0))
    x_t = alpha * x0 + sigma * eps

    def error(labels):
        with torch.no_grad():
            v = unet(x_t, t, class_labels=labels).sample
        return (alpha * x_t - sigma * v - x0).square().mean().item()

    right, null = error(split.test_labels), error(torch.full_like(split.test_labels, 10))
    wrong = error((split.test_labels + 5) % 10)
    assert right < null < wrong
    assert right < 0.5 * (x_t / alpha - x0).square().mean().item()


def test_all_weights_together_are_under_four_megabytes():
    weights = list(zoo_path("digits").rglob("*.safetensors"))
    assert len(weights) == 4
    assert sum(path.stat().st_size for path in weights) < 4e6


def test_training_twice_gives_the_same_bytes(tmp_path, monkeypatch):
    def files_of_a_run(name):
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--out", str(out), "--steps", "1"])
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        finally:
            torch.use_deterministic_algorithms(False)
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    first, second = files_of_a_run("first"), files_of_a_run("second")
    assert set(first) == {
        "guide/config.json",
        "guide/model.safetensors",
        "handful.json",
        "judge/config.json",
        "judge/model.safetensors",
        "scheduler/scheduler_config.json",
        "uci-judge/config.json",
        "uci-judge/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert first == second
