"""The demo on CIFAR-10: its judge by features alone, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handful.cli import app
from handful.console import answer
from handful.data.images import write_png
from handful.demo import cifar10
from handful.demo.cifar10 import COLUMNS, FeaturesJudge, demo, entries
from handful.demo.compared import means, table_of
from handful.errors import RequestError, RunError
from handful.features.registry import load_extractor
from handful.judge.audit import TRANSFORMS
from handful.judge.gains import AS_IS
from handful.judge.judge import Judge
from handful.zoo.cifar10 import CLASSES, UNTOUCHED, RealFeatures

ALL = entries()


def pictures(each: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(10 * each, 3, 32, 32, generator=draw) * 2 - 1, [name for name in CLASSES for _ in range(each)]


@pytest.mark.slow
def test_a_judge_by_features_finds_what_a_judge_by_images_finds():
    extractor = load_extractor("cifar10-judge")
    real, labels = pictures(2, seed=0)
    by_images = Judge(real, labels, extractor, ceiling=False, classes=CLASSES)
    seen = by_images.see(real, labels)
    features = {(UNTOUCHED if view == AS_IS else view): torch.as_tensor(held) for view, held in seen.features.items()}
    by_features = FeaturesJudge(RealFeatures(extractor.digest, labels, features, {}, ""), extractor)
    assert set(by_features.viewer.views) == {AS_IS, *TRANSFORMS}
    made = pictures(2, seed=1)
    assert by_features(*made).row() == by_images(*made).row()
    assert by_features(*made).to_dict() == by_images(*made).to_dict()


def test_features_of_another_judge_are_refused():
    real = RealFeatures("f00d", list(CLASSES), {UNTOUCHED: torch.zeros(10, 64)}, {}, "")
    with pytest.raises(RunError, match="not computed by cifar10-judge"):
        FeaturesJudge(real, load_extractor("cifar10-judge"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict]]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "entries", lambda: [ALL[0], ALL[-1]])
        yield out, demo(out, per_class=8, steps=2)


@pytest.mark.slow
def test_every_method_has_one_finite_row(small):
    _, rows = small
    assert [(r["method"], r["scale"], r["k"]) for r in rows] == [(e.method, e.scale, e.k) for e in (ALL[0], ALL[-1])]
    numbers = [[row[column] for column in COLUMNS if column != "utility"] for row in rows]
    assert np.isfinite(np.array(numbers, dtype=float)).all()
    assert all(row["utility"] is None for row in rows), "no real images, no test"


@pytest.mark.slow
def test_the_sheet_and_the_table_show_every_class_and_method(small):
    out, rows = small
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.height > 10 * 64
        assert sheet.width > 8 * 64
    shown = table_of("", means(rows, COLUMNS), COLUMNS, ())
    assert [row[0] for row in shown.rows] == ["none", "energy+cfg k=32"]
    assert [entry.name for entry in ALL] == ["none", "cfg w=2.5", "chamfer k=32", "energy k=32", "energy+cfg k=32"]
    assert "utility" not in shown.headings


@pytest.mark.parametrize(
    ("options", "field"),
    [({"seeds": 0}, "seeds"), ({"per_class": 4}, "per_class"), ({"real": "nowhere"}, "--real"), ({"real": "two"}, "--real")],
)
def test_settings_without_sense_are_refused_before_anything_is_written(tmp_path, monkeypatch, options, field):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "two" / name).mkdir(parents=True)
        write_png(tmp_path / "two" / name / "0.png", torch.zeros(3, 32, 32))
    with pytest.raises(RequestError) as caught:
        demo(tmp_path / "out", **options)
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_no_demo_has(tmp_path, capsys):
    assert answer(app, ["demo", "--model", "cifar100", "--out", str(tmp_path / "out")]) == 2
    assert "Choose mnist, digits or cifar10" in capsys.readouterr().err
    assert answer(app, ["demo", "--real", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
