"""`handful exemplars` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from handful.cli import app
from handful.console import answer
from handful.data.images import write_png
from handful.data.shared_exemplars import ExemplarFeatures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    for name in ("1", "4"):
        for place in range(4):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            write_png(tmp_path / "photos" / name / f"{place}.png", torch.rand(1, 8, 8, generator=draw) * 2 - 1)
    return tmp_path / "photos"


def handful(*words: object) -> int:
    return answer(app, [str(word) for word in words])


def test_a_folder_becomes_a_file_that_generate_takes_and_says_what_it_holds(photos, tmp_path, capsys):
    out = tmp_path / "shared.safetensors"
    words = ["exemplars", photos, "--model", "digits", "--features", "digits-guide", "--features", "digits-judge", "--out", out]
    assert handful(*words, "--k", 3, "--reduce", 1, "--reduce", 2, "--source", "noise", "--licence", "none", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["classes"] == {"1": 3, "4": 3}
    assert made["images"] == [1, 8, 8]
    assert [(view["features"], view["reduce"], view["dimensions"]) for view in made["views"]] == [
        ("digits-guide", 1, 64),
        ("digits-guide", 2, 64),
        ("digits-judge", 1, 96),
        ("digits-judge", 2, 96),
    ]
    assert handful("exemplars", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == made
    assert handful("exemplars", out) == 0
    told = capsys.readouterr().out
    assert "2 classes of 3 exemplars (1, 4)" in told
    assert "source: noise" in told
    asked = ["--model", "digits", "--exemplars", out, "--features", "digits-guide", "--k", 2, "--per-class", 2, "--steps", 4]
    assert handful("generate", *asked, "--out", tmp_path / "run", "--quiet") == 0
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 4


def test_size_and_channels_do_for_a_model(photos, tmp_path, capsys):
    out = tmp_path / "shared.safetensors"
    assert handful("exemplars", photos, "--size", "16x12", "--channels", 1, "--features", "digits-guide", "--out", out) == 0
    assert ExemplarFeatures.load(out).shape == (1, 16, 12)
    assert "recoverable" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"--features": None}, "--features"),
        ({"--features": "pixels"}, "features"),
        ({"--features": "dinov3x"}, "features"),
        ({"--out": None}, "--out"),
        ({"--out": "shared.pt"}, "--out"),
        ({"--out": "nowhere/shared.safetensors"}, "--out"),
        ({"--model": None}, "--model"),
        ({"--size": 8}, "--model"),
        ({"--model": None, "--size": "8x8x8"}, "--size"),
        ({"--model": None, "--size": "0"}, "--size"),
        ({"--k": 9}, "exemplars"),
        ({"--reduce": 3}, "reduce"),
    ],
)
def test_what_can_not_be_done_is_refused_and_nothing_is_written(photos, tmp_path, monkeypatch, capsys, changed, field):
    monkeypatch.chdir(tmp_path)
    options = {"--model": "digits", "--features": "digits-guide", "--out": "shared.safetensors"} | changed
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    before = sorted(tmp_path.rglob("*"))
    assert handful("exemplars", photos, *words, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == field
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_there_is_kept(photos, tmp_path, capsys):
    (tmp_path / "shared.safetensors").write_text("years of work")
    words = ["exemplars", photos, "--model", "digits", "--features", "digits-guide", "--out", tmp_path / "shared.safetensors"]
    assert handful(*words) == 2
    assert "this file exists already" in capsys.readouterr().err
    assert (tmp_path / "shared.safetensors").read_text() == "years of work"
    assert handful("exemplars", tmp_path / "shared.safetensors") == 2
    assert "it holds no exemplar features" in capsys.readouterr().err


def test_features_are_kept_as_a_smooth_network_sees_them_too(photos, tmp_path, capsys):
    out, plain = tmp_path / "smooth.safetensors", tmp_path / "plain.safetensors"
    words = ["exemplars", photos, "--model", "digits", "--features", "digits-guide"]
    assert handful(*words, "--softplus", 3, "--out", out, "--json") == 0
    views = json.loads(capsys.readouterr().out)["views"]
    assert [view["features"] for view in views] == ["digits-guide", "digits-guide softplus 3"]
    assert handful(*words, "--out", plain) == 0
    asked = ["generate", "--model", "digits", "--features", "digits-guide", "--guidance", "energy", "--per-class", 2]
    asked += ["--steps", 4, "--set", "guidance.energy.softplus=3"]
    assert handful(*asked, "--exemplars", plain, "--out", tmp_path / "none") == 2
    assert "--softplus" in capsys.readouterr().err
    assert handful(*asked, "--exemplars", out, "--out", tmp_path / "run", "--quiet") == 0
    words[-1] = "digits-judge"
    assert handful(*words, "--softplus", 3, "--out", tmp_path / "other.safetensors") == 2
    assert "calls no ReLU" in capsys.readouterr().err
