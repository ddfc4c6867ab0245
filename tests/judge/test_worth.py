"""Is it worth it? Real digits in the place of synthetic ones help; wrongly labelled ones harm; test images have no say."""

from pathlib import Path

import pytest
import torch

import handful
from handful.data.images import write_png
from handful.errors import RequestError
from handful.judge import worth as module
from handful.judge.worth import BOTH, EXEMPLARS, SYNTHETIC, TEST, Difference, Trained, Worth, _Sets, worth
from handful.recipe.schema import recipe_from
from handful.runs.kept import FOLDER
from handful.zoo.digits import load_digits_split

CLASSES = ("3", "5", "8")


def write(root: Path, images: torch.Tensor, labels: torch.Tensor, per_class: int, shift: int = 0) -> Path:
    """`per_class` digits of each class; with a shift each in the next class's folder."""
    for place, name in enumerate(CLASSES):
        folder = root / CLASSES[(place + shift) % len(CLASSES)]
        folder.mkdir(parents=True)
        for number, image in enumerate(images[labels == int(name)][:per_class]):
            write_png(folder / f"{number:03d}.png", image)
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    split, root = load_digits_split(), tmp_path_factory.mktemp("worth")
    train, labels = split.train_images, split.train_labels
    return {
        "few": write(root / "few", train, labels, 1),
        "more": write(root / "more", train.flip(0), labels.flip(0), 60),
        "wrong": write(root / "wrong", train.flip(0), labels.flip(0), 60, shift=1),
        "test": write(root / "test", split.test_images, split.test_labels, 40),
        "photos": write(root / "photos", train, labels, 12),
    }


@pytest.fixture(scope="module")
def found(folders) -> Worth:
    return worth(
        folders["more"],
        exemplars=folders["few"],
        test=folders["test"],
        ood={"again": folders["test"]},
        baselines={"wrong": folders["wrong"]},
        seeds=2,
        steps=40,
    )


def test_good_images_help_beyond_the_spread_and_wrong_labels_harm(found):
    means = {row.name: row.tests[TEST].mean for row in found.rows}
    assert list(means) == [EXEMPLARS, SYNTHETIC, BOTH, "wrong alone", "exemplars + wrong"]
    assert means[BOTH] > means[EXEMPLARS] + 0.05
    assert means["wrong alone"] < 0.2
    over = {each.over: each for each in found.differences}
    assert over[EXEMPLARS].gain == pytest.approx(means[BOTH] - means[EXEMPLARS])
    assert over[EXEMPLARS].gain > over[EXEMPLARS].margin > 0
    assert found.sentence.startswith("The synthetic images help: ")
    assert "better than wrong" in found.sentence


def test_every_test_set_is_measured_per_class_with_its_worst(found):
    for row in found.rows:
        assert row.tests["again"] == row.tests[TEST]
        tested = row.tests[TEST]
        assert tested.mean == pytest.approx(sum(tested.per_class.values()) / 3)  # 40 images of each class
        assert tested.worst[1] == min(tested.per_class.values())


def test_it_survives_json(found):
    assert Worth.from_dict(found.to_dict()) == found


def verdict(gain: float, margin: float) -> str:
    rows = [Trained(name, 1, None, {TEST: module.Tested([0.5], {"a": 0.5})}) for name in (EXEMPLARS, SYNTHETIC, BOTH)]
    return Worth("n", "a", rows, [Difference(EXEMPLARS, gain, margin)], 10, 1).sentence.partition(":")[0]


def test_the_sentence_says_help_harm_or_neither():
    assert verdict(0.05, 0.02) == "The synthetic images help"
    assert verdict(-0.05, 0.02) == "The synthetic images harm"
    assert verdict(0.01, 0.02) == verdict(-0.01, 0.02) == "The synthetic images do not help beyond the spread"


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = {
        "model": {"name": "digits"},
        "exemplars": {"path": str(folders["photos"]), "k": 4},
        "per_class": 4,
        "sampler": {"steps": 4},
    }
    handful.generate(recipe_from(recipe), out)
    return out


def test_a_run_is_tested_on_what_guided_nothing_of_its_exemplars_folder(run, folders):
    sets = _Sets(run, None, {}, {}, None)
    guided, tested = sets.training[EXEMPLARS], sets.tests[TEST]
    assert (guided.counts, tested.counts) == (dict.fromkeys(CLASSES, 4), dict.fromkeys(CLASSES, 8))
    assert {Path(name) for name in [*guided.names, *tested.names]} == set(folders["photos"].glob("*/*.png"))


def test_a_result_is_kept_in_the_run_by_content_and_read_from_there(run, folders, monkeypatch):
    first = worth(run, seeds=1, steps=10)
    assert len(list((run / FOLDER).glob("utility-*.json"))) == 1
    with monkeypatch.context() as patch:
        patch.delattr(module, "_compared")
        assert worth(run, seeds=1, steps=10) == first
    before = _Sets(run, None, {}, {}, None).digests()
    image = run / "images" / "3" / "000000.png"
    image.write_bytes((run / "images" / "5" / "000000.png").read_bytes())
    assert _Sets(run, None, {}, {}, None).digests()["training"][SYNTHETIC] != before["training"][SYNTHETIC]


def test_too_few_images_left_are_refused_with_the_number_needed(tmp_path, run, folders):
    split = load_digits_split()
    few = write(tmp_path / "few", split.test_images, split.test_labels, 3)
    with pytest.raises(RequestError, match=r"class '3' has 3 images to test on, at least 5 are needed\. Add images\.$"):
        worth(run, test=few)
    (few / "3" / "002.png").unlink()
    with pytest.raises(RequestError, match=r"^exemplars: .*it was made without exemplars"):
        worth(folders["more"], test=folders["test"])


def test_test_images_that_are_exemplars_are_pointed_out(folders):
    with pytest.warns(UserWarning, match="3 of the test images are exemplars"):
        _Sets(folders["more"], folders["photos"], {}, {}, folders["few"])
