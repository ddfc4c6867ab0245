"""Evaluation: real against real is near the ceiling, collapse and fakery show, and folders that do not fit are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.halves import Halves, value, write
from torch import Tensor

from handful.data.images import write_png
from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, load_extractor, pixels
from handful.judge.audit import TRANSFORMS
from handful.judge.evaluate import Evaluation, Judge, evaluate
from handful.metrics import frechet, prdc
from handful.metrics.summary import Group, Scores, Summary
from handful.zoo.digits import load_digits_split

ROW = {
    "precision",
    "recall",
    "density",
    "coverage",
    "f1",
    "frechet",
    "vendi",
    "judge_accuracy",
    "copied",
    "robust_precision",
    "robust_recall",
    "robust_density",
    "robust_coverage",
    "robust_f1",
    "robust_frechet",
    "robust_judge_accuracy",
}


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


@pytest.fixture(scope="module")
def judge(halves) -> Judge:
    return Judge(halves.images, halves.labels, load_extractor("digits-judge"))


@pytest.fixture(scope="module")
def real(judge, halves):
    return judge(halves.others, halves.others_labels)


def test_real_images_judged_as_generated_are_near_the_ceiling(real):
    row, ceiling = real.row(), real.summary.pooled.ceiling
    assert set(row) == ROW
    for name in ("precision", "recall", "coverage"):
        assert value(row[name]) > 0.88
        assert value(row[name]) == pytest.approx(getattr(ceiling, name), abs=0.08)
    assert value(row["density"]) == pytest.approx(1, abs=0.15)
    assert value(row["judge_accuracy"]) > 0.95
    for name in ("robust_precision", "robust_coverage"):
        assert value(row[name]) > 0.85


def test_the_numbers_are_the_metrics_of_the_judges_features(judge, halves, real):
    extractor = load_extractor("digits-judge")
    mine, theirs = (extractor(images).numpy() for images in (halves.images, halves.others))
    row, direct = real.row(), prdc(mine, theirs, 5)
    for name in ("precision", "recall", "density", "coverage", "f1"):
        assert row[name] == getattr(direct, name)
    assert row["frechet"] == pytest.approx(frechet(mine, theirs))
    assert (real.judge, real.judge_digest) == ("digits-judge", extractor.digest)


def test_a_collapsed_set_keeps_its_precision_and_loses_its_coverage(judge, halves, real):
    """Each class one image, repeated with a trace of noise: all of it real, none of it diverse."""
    first = [halves.others_labels.index(label) for label in halves.others_labels]
    draw = torch.Generator().manual_seed(0)
    collapsed = halves.others[first] + 0.01 * torch.randn(len(first), 1, 8, 8, generator=draw)
    row, full = judge(collapsed, halves.others_labels).row(), real.row()
    assert value(row["precision"]) > 0.8
    assert value(row["coverage"]) < 0.25
    assert value(row["robust_coverage"]) < 0.4
    assert value(row["vendi"]) < 0.95 * value(full["vendi"])  # most of it lies between the classes, which are all there
    assert value(row["frechet"]) > 3 * value(full["frechet"])


def test_noise_has_neither_precision_nor_coverage(judge, halves):
    static = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    row = judge(static, [str(i % 10) for i in range(300)]).row()
    assert value(row["precision"]) < 0.2
    assert value(row["coverage"]) < 0.1
    assert value(row["judge_accuracy"]) < 0.3


def test_swapped_labels_show_in_the_judges_accuracy_and_per_class_and_not_in_the_pooled_numbers(judge, halves, real):
    swapped = [str((int(label) + 1) % 10) for label in halves.others_labels]
    found = judge(halves.others, swapped)
    assert value(found.judge_accuracy) < 0.05
    assert found.row()["coverage"] == real.row()["coverage"]
    assert value(found.summary.mean_over_classes.generated.coverage) < 0.2
    assert value(real.summary.mean_over_classes.generated.coverage) > 0.85


def test_a_difference_in_the_finest_pattern_alone_is_gone_after_resampling():
    """Real images carry a fine pattern of either sign, generated ones of one: all that tells them apart is invisible."""
    draw = torch.Generator().manual_seed(2)
    side = 16
    board = 1 - 2.0 * ((torch.arange(side)[:, None] + torch.arange(side)) % 2)
    board[:3], board[-3:], board[:, :3], board[:, -3:] = 0, 0, 0, 0  # resampling keeps some of it at the edges
    sign = torch.where(torch.rand(120, 1, 1, 1, generator=draw) < 0.5, -1.0, 1.0)
    flat = torch.zeros(120, 1, side, side)
    real = flat + 0.05 * sign * board + 0.05 * torch.randn(120, 1, side, side, generator=draw)
    only_plus = flat + 0.05 * board + 0.05 * torch.randn(120, 1, side, side, generator=draw)
    found = Judge(real, ["a"] * 120, pixels(), ceiling=False)(only_plus, ["a"] * 120)
    plain, resampled = value(found.row()["coverage"]), value(found.transformed["resample"]["coverage"])
    assert plain < 0.6  # half of the real images have the other sign
    assert resampled > plain + 0.2  # which is gone when the pattern is


def test_robust_is_the_mean_over_the_transforms_and_absent_without_them(halves, real):
    assert list(real.transformed) == ["jpeg", "resample", "noise", "lowpass"]
    for name in ("precision", "recall", "coverage", "f1"):
        wanted = np.mean([found[name] for found in real.transformed.values()])
        assert value(real.row()[f"robust_{name}"]) == pytest.approx(wanted)
    for name in ("frechet", "judge_accuracy"):
        wanted = np.mean([found[name] for found in real.transformed.values()])
        assert value(real.row()[f"robust_{name}"]) == pytest.approx(wanted)
    assert value(real.row()["robust_judge_accuracy"]) > 0.9
    assert real.robust("vendi") is None
    plain = Judge(halves.images, halves.labels, load_extractor("digits-judge"), audit=False, ceiling=False)
    found = plain(halves.others, halves.others_labels)
    assert {name for name, number in found.row().items() if number is None} == {name for name in ROW if "robust" in name} | {
        "copied"
    }
    assert found.summary.pooled.ceiling is None
    assert found.row()["coverage"] == real.row()["coverage"]


def test_after_a_transform_the_numbers_are_the_metrics_of_both_transformed_sets(halves, real):
    extractor = load_extractor("digits-judge")
    for name, found in real.transformed.items():
        mine, theirs = (extractor(TRANSFORMS[name](images)).numpy() for images in (halves.images, halves.others))
        near = prdc(mine, theirs, 5)
        assert all(found[name] == near[name] for name in ("precision", "recall", "density", "coverage", "f1"))
        assert found["frechet"] == pytest.approx(frechet(mine, theirs))
        named = extractor.logits(TRANSFORMS[name](halves.others)).argmax(1)
        wanted = np.mean([str(int(one)) == label for one, label in zip(named, halves.others_labels, strict=True)])
        assert found["judge_accuracy"] == wanted


def test_the_mean_of_f1_is_not_the_f1_of_the_means():
    transformed = {"a": {"precision": 1.0, "coverage": 0.2, "f1": 1 / 3}, "b": {"precision": 0.2, "coverage": 1.0, "f1": 1 / 3}}
    pooled = Scores(9, 9, {"precision": 0.5, "f1": 0.5, "judge_accuracy": None})
    found = Evaluation("judge", "", Summary(5, 1, 0, Group(pooled, None), {}, Group(pooled, None)), transformed)
    assert value(found.row()["robust_f1"]) == pytest.approx(1 / 3)  # 2 * .2 / 1.2, twice; of the means .6 and .6 it is .6
    assert value(found.row()["robust_precision"]) == pytest.approx(0.6)
    assert found.row()["robust_judge_accuracy"] is None


def test_accuracy_is_by_name_or_number_or_what_is_said_and_none_with_a_reason_else(halves):
    """Of three classes of a judge of ten, by number; of folders with names of their own only as the user says."""
    some = [i for i, label in enumerate(halves.labels) if label in "012"]
    images, labels = halves.images[some], [halves.labels[i] for i in some]
    extractor, plain = load_extractor("digits-judge"), {"audit": False, "ceiling": False}
    assert Judge(images, labels, pixels(), **plain)(images, labels).judge_accuracy is None  # no classifier
    assert value(Judge(images, labels, extractor, **plain)(images, labels).judge_accuracy) > 0.9
    named = [{"0": "zero", "1": "one", "2": "a two"}[label] for label in labels]
    judge = Judge(images, named, extractor, **plain)
    with pytest.warns(UserWarning, match=r"no accuracy: .*named zero, one, a two"):
        found = judge(images, named)
    assert found.judge_accuracy is None
    assert "--judge-class zero=NUMBER" in found.notes[0]
    said = Judge(images, named, extractor, judge_class={"zero": 0, "one": "1", "a two": 2}, **plain)
    assert value(said(images, named).judge_accuracy) > 0.9
    by_name = Judge(images, named, extractor, classes=["zero", "one", "a two", *"3456789"], **plain)
    assert by_name(images, named).judge_accuracy == said(images, named).judge_accuracy
    with pytest.raises(RequestError, match=r"^judge_class: "):
        Judge(images, named, extractor, judge_class={"zero": 10}, **plain)(images, named)


def test_twelve_numbered_classes_are_not_taken_in_the_alphabets_order():
    """A perfect judge without class names, folders 0 to 11: by the alphabet 10 would be its class 2."""
    network = torch.nn.Flatten()  # an image of 12 pixels is its own logits
    perfect = FeatureExtractor("perfect", network, channels=1, classify=network)
    images = (2 * torch.eye(12).repeat(3, 1) - 1).view(36, 1, 3, 4)
    labels = [str(index % 12) for index in range(36)]
    assert Judge(images, labels, perfect, audit=False, ceiling=False)(images, labels).judge_accuracy == 1


def test_the_whole_result_is_json_without_nan(real):
    text = json.dumps(real.to_dict(), allow_nan=False)
    held = json.loads(text)
    assert held["k"] == 5
    assert held["coverage"] == real.row()["coverage"]
    assert set(held["transformed"]) == set(TRANSFORMS)
    for found in held["transformed"].values():
        assert {"precision", "f1", "frechet", "judge_accuracy", "k", "n_real"} <= set(found)
    assert (held["copied"], held["gains"]) == (None, {})
    assert set(held["per_class"]) == set("0123456789")


def test_an_image_of_an_unknown_class_is_refused(judge, halves):
    with pytest.raises(RequestError):
        judge(halves.others[:20], ["ten"] * 20)


# --- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory, halves) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return write(root / "made", halves.others, halves.others_labels), write(root / "real", halves.images, halves.labels)


def test_folders_give_what_their_images_give(folders, halves):
    made, real = folders
    found = evaluate(made, real, "digits-judge", audit=False, ceiling=False)
    scores = found.summary.pooled.generated
    assert (scores.n_real, scores.n_generated) == (250, 250)

    def first_25(images: Tensor, labels: list[str]) -> tuple[Tensor, list[str]]:
        rows = [i for c in "0123456789" for i in [j for j, label in enumerate(labels) if label == c][:25]]
        return images[rows], [labels[i] for i in rows]

    direct = Judge(*first_25(halves.images, halves.labels), load_extractor("digits-judge"), audit=False, ceiling=False)(
        *first_25(halves.others, halves.others_labels)
    )
    # files hold 8 bits, which moves a feature by a little: at most one image of 250 may change sides
    for name in ("precision", "coverage", "judge_accuracy"):
        assert value(found.row()[name]) == pytest.approx(value(direct.row()[name]), abs=1.5 / 250)
    assert math.isclose(value(found.row()["frechet"]), value(direct.row()["frechet"]), rel_tol=0.02)


def test_fewer_generated_classes_are_measured_against_these_alone_and_said(tmp_path, folders, halves):
    _, real = folders
    some = [i for i, label in enumerate(halves.others_labels) if label in "03"]
    made = write(tmp_path / "made", halves.others[some], [halves.others_labels[i] for i in some])
    with pytest.warns(UserWarning, match="without generated images are left out: 1, 2, 4"):
        found = evaluate(made, real, "digits-judge", audit=False, ceiling=False)
    assert set(found.summary.per_class) == {"0", "3"}
    assert found.summary.pooled.generated.n_real == 50
    assert value(found.row()["judge_accuracy"]) > 0.9  # the logits' order is that of all real classes


def test_a_generated_class_without_real_images_is_refused_by_name(tmp_path, folders, halves):
    made, _ = folders
    some = [i for i, label in enumerate(halves.labels) if label != "7"]
    real = write(tmp_path / "real", halves.images[some], [halves.labels[i] for i in some])
    with pytest.raises(RequestError, match=r"^real: .*no folder for 7"):
        evaluate(made, real, "digits-judge")


@pytest.mark.parametrize(("k", "field"), [(300, "OUT"), (20, "OUT")])
def test_too_few_images_for_k_are_refused_by_name(tmp_path, folders, halves, k, field):
    made, real = folders
    if k == 20:
        made = write(tmp_path / "made", halves.others, halves.others_labels, per_class=2)
    with pytest.raises(RequestError, match=rf"^{field}: .*too few for {k} neighbours"):
        evaluate(made, real, "digits-judge", neighbours=k)


def test_folders_and_judges_that_are_not_there_are_refused_by_name(tmp_path, folders):
    made, real = folders
    with pytest.raises(RequestError, match=r"^OUT: "):
        evaluate(tmp_path / "none", real, "digits-judge")
    with pytest.raises(RequestError, match=r"^real: "):
        evaluate(made, tmp_path / "none", "digits-judge")
    with pytest.raises(RequestError, match=r"^judge: "):
        evaluate(made, real, str(tmp_path / "no-such-judge"))


def test_a_judge_that_guided_the_images_is_pointed_out(tmp_path):
    from handful.generate import generate
    from handful.recipe.schema import recipe_from

    split = load_digits_split()
    for digit in (0, 1):
        for index, image in enumerate(split.test_images[split.test_labels == digit][:8]):
            file = tmp_path / "real" / str(digit) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_png(file, image)
    asked = {
        "model": {"name": "digits"},
        "exemplars": {"path": str(tmp_path / "real")},
        "per_class": 8,
        "sampler": {"steps": 2},
    }
    generate(recipe_from(asked), tmp_path / "out")
    assert (tmp_path / "out" / "images/0/000000.png").is_file()
    with pytest.warns(UserWarning, match="pixels guided these images"):
        evaluate(tmp_path / "out", tmp_path / "real", "pixels", audit=False)
