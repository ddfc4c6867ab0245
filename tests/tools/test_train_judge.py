"""The training of the self-supervised judge: its loss is NT-Xent, its linear layer a logistic regression, its seed decides."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import train_judge as tool  # noqa: E402

from handful.zoo.cifar_vit import CifarViT  # noqa: E402


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes that colour tells apart, 12 pictures of each."""
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label, name in enumerate(("red", "blue")):
        (folder / name).mkdir()
        for number in range(12):
            pixels = draw.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 * label] += 130
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_nt_xent_is_its_definition():
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    views = [each / each.norm() for each in (*one, *other)]
    losses = []
    for i in range(10):
        likeness = [math.exp(float(views[i] @ views[j]) / tool.TEMPERATURE) for j in range(10)]
        losses.append(-math.log(likeness[(i + 5) % 10] / (sum(likeness) - likeness[i])))
    assert float(tool.nt_xent(one, other)) == pytest.approx(sum(losses) / 10, rel=1e-9)


def test_the_linear_layer_is_a_logistic_regression_of_the_features():
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (300,), generator=draw)
    seen = torch.randn(300, 64, generator=draw) * 3 + torch.nn.functional.one_hot(labels, 64) * 2.0 + 5
    network = CifarViT(64, (1, 1), classes=3)
    tool.fit_linear(network, seen, labels)
    scaled = (seen - seen.mean(0)) / seen.std(0)
    theirs = LogisticRegression(C=1 / (2 * 1e-4 * 300), max_iter=2000, tol=1e-8).fit(scaled.numpy(), labels.numpy())
    ours = network.linear(seen).softmax(1).detach().numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(scaled.numpy()), atol=0.02)


def test_a_training_writes_what_the_zoo_takes_and_its_seed_decides(photographs, tmp_path, capsys):
    told = []
    for name in ("a", "b"):
        data = ["--data", str(photographs), "--test", str(photographs)]
        assert tool.main([*data, "--out", str(tmp_path / name), "--steps", "20", "--batch", "12"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert told[0]["test_accuracy"] == 1.0  # its own training images, told apart by one colour
    held = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "b")]
    assert all(torch.equal(held[0][key], held[1][key]) for key in held[0])
    CifarViT(**json.loads((tmp_path / "a" / "config.json").read_text())["network"]).load_state_dict(held[0])
    assert (tmp_path / "a" / "log.csv").read_text().startswith("step,loss\n20,")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--steps", "3", "--steps: 3"),
        ("--out", "full", "not empty"),
        ("--data", "nowhere", "--data: "),
        ("--test", "nowhere", "--test: "),
        ("--test", "other", "class 'green'"),
        ("--out", "file", "it is a file"),
    ],
)
def test_bad_requests_are_refused_by_name(photographs, tmp_path, capsys, monkeypatch, option, value, told):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").touch()
    Path("other/green").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("other/green/0.png")
    asked = {"--data": str(photographs), "--out": "new", "--steps": "20", "--batch": "12", option: value}
    assert tool.main([part for pair in asked.items() for part in pair]) == 2
    assert told in capsys.readouterr().err
    assert not Path("new").exists()
