"""Evaluation beside baselines and exemplars, from folders: gains, copies, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.halves import Halves, some, value, write

from handful.errors import RequestError
from handful.judge.evaluate import evaluate


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, halves) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return write(root / "made", halves.others, halves.others_labels), write(root / "real", halves.images, halves.labels)


def test_a_baseline_is_judged_as_if_it_were_alone(tmp_path, folders, halves):
    made, real = folders
    images, labels = some(halves, 0, 25)
    ghosts = write(tmp_path / "ghosts", (images + images.roll(25, 0)) / 2, labels)
    found = evaluate(made, real, "digits-judge", ceiling=False, baselines={"ghosts": ghosts})
    alone = evaluate(ghosts, real, "digits-judge", ceiling=False).row()
    comparison = found.gains["ghosts"]
    assert (comparison.images, comparison.baseline_images, comparison.draws) == (250, 250, 200)
    assert set(comparison.metrics) == {"precision", "recall", "density", "coverage", "f1", "frechet", "vendi", "judge_accuracy"}
    for name, gain in comparison.metrics.items():
        assert (gain.value, gain.baseline) == (found.row()[name], alone[name])
        sign = -1 if name == "frechet" else 1
        assert gain.gain == pytest.approx(sign * (value(found.row()[name]) - value(alone[name])))
        if name not in ("vendi", "density"):
            wanted = sign * (value(found.row()[f"robust_{name}"]) - value(alone[f"robust_{name}"]))
            assert gain.surviving == pytest.approx(wanted)
    assert comparison.metrics["judge_accuracy"].verdict == "survives"
    assert comparison.metrics["frechet"].verdict == "survives"
    assert comparison.metrics["recall"].interval is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["gains"]["ghosts"]["metrics"]["f1"]["gain"] > 0


def test_without_the_audit_gains_are_plain(tmp_path, folders, halves):
    made, real = folders
    images, labels = some(halves, 0, 25)
    ghosts = write(tmp_path / "ghosts", (images + images.roll(25, 0)) / 2, labels)
    found = evaluate(made, real, "digits-judge", audit=False, ceiling=False, baselines={"ghosts": ghosts})
    gain = found.gains["ghosts"].metrics["judge_accuracy"]
    assert value(gain.gain) > 0.3
    assert gain.interval is not None
    assert (gain.after, gain.surviving, gain.robust_gain, gain.verdict) == ({}, None, None, None)


def test_a_baselines_gains_do_not_depend_on_the_other_baselines(tmp_path, folders, halves):
    made, real = folders
    others = {name: write(tmp_path / name, *some(halves, start, start + 10)) for name, start in (("a", 3), ("b", 8))}
    with pytest.warns(UserWarning, match="the baseline [ab] has 100 images and this set 250") as told:
        both = evaluate(made, real, "pixels", audit=False, ceiling=False, baselines=others)
    with pytest.warns(UserWarning, match="the baseline [ab] has 100 images"):
        alone = evaluate(made, real, "pixels", audit=False, ceiling=False, baselines={"b": others["b"]})
    shared = {str(each.message).partition(", so")[0] for each in told if "of the set itself" in str(each.message)}
    assert shared == {f"also among those of the set itself, byte for byte: 100 of the baseline {name}" for name in "ab"}
    assert list(both.gains) == ["a", "b"]
    assert both.gains["b"] == alone.gains["b"]


def test_what_is_no_baseline_is_refused_by_name(tmp_path, folders, halves):
    made, real = folders

    def refused(folder: Path, text: str) -> None:
        with pytest.raises(RequestError, match=text):
            evaluate(made, real, "no-such-judge", baselines={"it": folder})

    refused(tmp_path / "none", "^baseline: .*no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "^baseline: .*this is a file")
    refused(made, "^baseline: .*the generated images themselves")
    refused(real, "^baseline: .*the real images themselves")
    (tmp_path / "link").symlink_to(made)
    refused(tmp_path / "link", "^baseline: .*the generated images themselves")
    refused(write(tmp_path / "fewer", *some(halves, 0, 9, "01234567")), "^baseline: .*it lacks '8', '9'")
    more = write(tmp_path / "more", *some(halves, 0, 9))
    write(more, *(part[:3] for part in (halves.others, ["ten"] * 3)))
    refused(more, "^baseline: .*it also has 'ten'")
    images, labels = some(halves, 0, 9)
    refused(write(tmp_path / "large", images.repeat(1, 1, 2, 2), labels), "^baseline: .*16 x 16 pixels, .* 8 x 8")
    few = write(tmp_path / "few", *some(halves, 0, 1))
    with pytest.raises(RequestError, match=r"^baseline: .*it has 10 images, too few for 12 neighbours"):
        evaluate(made, real, "no-such-judge", neighbours=12, baselines={"it": few})


def test_copied_counts_images_nearer_to_an_exemplar_than_real_ones_are(tmp_path, folders, halves):
    """Of each class ten exemplars; the generated set: four of them with a trace of noise, twelve other real digits."""
    _, real = folders
    exemplars = write(tmp_path / "exemplars", *some(halves, 0, 10))
    images, labels = some(halves, 6, 22)
    draw = torch.Generator().manual_seed(0)
    copies = torch.tensor([i % 16 < 4 for i in range(160)]).view(-1, 1, 1, 1)
    images = images + copies * 0.02 * torch.randn(images.shape, generator=draw)
    made = write(tmp_path / "made", images.clamp(-1, 1), labels)
    options = {"audit": False, "ceiling": False, "exemplars": exemplars}
    found = evaluate(made, real, "pixels", **options)
    assert 0.25 <= value(found.copied) < 0.31  # a few other real ones are as near by chance
    # of other real digits hardly any: the gain of copying less
    others = write(tmp_path / "others", *some(halves, 10, 26))
    gain = evaluate(others, real, "pixels", **options, baselines={"copies": made}).gains["copies"].metrics["copied"]
    assert (gain.baseline, value(gain.gain) > 0.15, gain.surviving, gain.verdict) == (found.copied, True, None, None)
    assert gain.interval is not None
    assert gain.interval[0] > 0.1


def test_exemplars_among_the_real_images_are_told(tmp_path, folders, halves):
    made, real = folders
    exemplars = write(tmp_path / "exemplars", halves.images, halves.labels, per_class=3)  # the real folder's own first files
    with pytest.warns(UserWarning, match="exemplars among the real images, byte for byte: 30 of 250"):
        found = evaluate(made, real, "pixels", audit=False, ceiling=False, exemplars=exemplars)
    assert found.copied == 0  # which says nothing


def test_exemplars_without_a_generated_class_are_refused(tmp_path, folders, halves):
    made, real = folders
    exemplars = write(tmp_path / "exemplars", *some(halves, 0, 4, "012345678"))
    with pytest.raises(RequestError, match=r"^exemplars: .*no folder for class '9'"):
        evaluate(made, real, "no-such-judge", exemplars=exemplars)


def test_a_classifiers_own_class_names_order_its_logits(tmp_path, folders, halves):
    """Its labels in another order than the alphabet's: known by name, it still names digits right."""
    made, real = folders
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    (tmp_path / "mine.py").write_text(
        "from handful.features import FeatureExtractor, load_extractor\n"
        "def load():\n"
        "    digits = load_extractor('digits-judge')\n"
        f"    order = {order}\n"
        "    return FeatureExtractor('mine', digits.network, channels=1, size=(8, 8), features=digits.network.features,\n"
        "                            classify=lambda images: digits.network(images)[:, order],\n"
        "                            classes=[str(label) for label in order])\n"
    )
    mine = evaluate(made, real, f"{tmp_path / 'mine.py'}:load", audit=False, ceiling=False)
    assert mine.judge_accuracy == evaluate(made, real, "digits-judge", audit=False, ceiling=False).judge_accuracy
    assert value(mine.judge_accuracy) > 0.9
