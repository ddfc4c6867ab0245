"""What real images choose: every way is tried within the bound, the best is taken, and nothing is tried twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from handful.calibrate import CalibrateRequest, CalibrateSummary, calibrate, prepare
from handful.calibrate.trials import TrialsRequest, most_sets
from handful.data.images import write_png
from handful.errors import RequestError
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.schema import recipe_from
from handful.zoo.digits import load_digits_split

CLASSES = ["1", "4"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten held-out digits of each of two classes."""
    root, split = tmp_path_factory.mktemp("real"), load_digits_split()
    for name in CLASSES:
        (root / name).mkdir()
        for place, image in enumerate(split.test_images[split.test_labels == int(name)][:10]):
            write_png(root / name / f"{place}.png", image)
    return root


def asked(real: Path, **changes: Any) -> CalibrateRequest:
    """No Softplus, one pair of temperatures, one scale: some fifteen sets of twelve digits."""
    recipe = {"model": {"name": "digits"}, "classes": CLASSES, "per_class": 4, "sampler": {"steps": 4}}
    settings: dict[str, Any] = {"max_cost": 5.0, "scales": (0.1,), "jacobians": ("gaussian",), "per_class": 6} | changes
    trials = TrialsRequest(str(real), "digits-judge", **settings)
    return CalibrateRequest(recipe_from(recipe), ClassifierRequest(classifier="digits-guide"), (None,), ((1.0, 1.0),), trials)


@pytest.fixture(scope="module")
def done(real: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrateSummary:
    return calibrate(prepare(asked(real), tmp_path_factory.mktemp("trials") / "out"))


def rows(summary: CalibrateSummary, part: str = "rows", split: str = "validation") -> list[dict[str, Any]]:
    return [row for row in summary.result["trials"][part] if row["split"] == split]


@pytest.mark.slow
def test_the_best_on_the_validation_half_is_chosen(done: CalibrateSummary):
    trials = done.result["trials"]
    guided = [row for row in rows(done) if row["method"] != "none"]
    best = min(guided, key=lambda row: row["robust_frechet"])
    assert (trials["chosen"], trials["scale"]) == (best["method"], best["scale"])
    way = trials["methods"][best["method"]]
    block = yaml.safe_load((done.out / "guidance.yaml").read_text())
    assert (block[0]["scale"], block[0]["jacobian"], block[0]["every"]) == (best["scale"], way["jacobian"], way["every"])
    assert done.result["chosen"]["by"] == "robust_frechet"
    assert done.result["chosen"]["candidate"] == way["candidate"]


@pytest.mark.slow
def test_the_plain_classifier_every_input_and_the_fitted_temperature_were_tried(done: CalibrateSummary):
    tried = {(way["candidate"], way["jacobian"]) for way in done.result["trials"]["methods"].values()}
    assert ("relu, x0_hat, tau 1:1", "gaussian") in tried
    assert ("relu, x0_hat, fitted T", "gaussian") in tried
    assert ("relu, x_t, tau 1:1", "identity") in tried
    assert ("relu, x_t, fitted T", "identity") in tried
    request = TrialsRequest("real", "judge", scales=(0.1,), jacobians=("gaussian",))
    assert len(rows(done)) + len(rows(done, "confirmed")) <= most_sets(request)


@pytest.mark.slow
def test_a_scale_at_the_edge_makes_the_list_longer(done: CalibrateSummary):
    """One scale alone is both edges, so another one is tried at least for the way that was the best."""
    scales = {row["scale"] for row in rows(done) if row["method"] != "none"}
    assert len(scales) > 1
    assert (done.out / "trials" / "pareto.png").is_file(), "drawn once, when no more are added"


@pytest.mark.slow
def test_the_winner_is_made_again_with_other_noise(done: CalibrateSummary):
    again = rows(done, "confirmed", "test")
    assert {row["seed"] for row in again} == {1, 2}
    assert {"none", "chosen"} <= {row["method"] for row in again} <= {"none", "chosen", "plain"}
    assert any("not used to choose" in note for note in done.result["notes"])
    assert not any("calibration alone" in note for note in done.result["notes"])


@pytest.mark.slow
def test_going_on_tries_nothing_twice_and_ends_the_same(done: CalibrateSummary, real: Path):
    records = {file: file.stat().st_mtime_ns for file in done.out.rglob("seed-*.json")}
    before = (done.out / "calibration.json").read_bytes()
    (done.out / "calibration.json").unlink()
    again = calibrate(prepare(asked(real), done.out))
    assert not again.kept
    assert {file: file.stat().st_mtime_ns for file in done.out.rglob("seed-*.json")} == records
    assert (done.out / "calibration.json").read_bytes() == before


@pytest.mark.slow
def test_a_bound_that_allows_no_step_is_told_before_anything_is_sampled(real: Path, tmp_path: Path):
    job = prepare(asked(real, max_cost=1.0001), tmp_path / "out")
    with pytest.raises(RequestError, match="--max-cost"):
        calibrate(job)
    assert not (tmp_path / "out/.handful/seen").exists()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"objective": "beauty"}, "--objective"),
        ({"max_cost": 1.0}, "--max-cost"),
        ({"scales": ()}, "--scales"),
        ({"scales": (0.1, 0.1)}, "--scales"),
        ({"scales": (-1.0,)}, "--scales"),
        ({"jacobians": ("sloppy",)}, "--jacobians"),
        ({"jacobians": ()}, "--jacobians"),
        ({"per_class": 0}, "--trial-per-class"),
    ],
)
def test_trials_that_make_no_sense_are_refused(settings: dict[str, Any], field: str):
    with pytest.raises(RequestError, match=field):
        TrialsRequest("real", "judge", **settings)


def test_a_folder_without_the_classes_or_a_judge_that_is_none_is_refused_before_the_work(real: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="no such folder"):
        prepare(asked(tmp_path / "missing"), tmp_path / "out")
    (tmp_path / "real/1").mkdir(parents=True)
    write_png(tmp_path / "real/1/0.png", load_digits_split().test_images[0])
    with pytest.raises(RequestError, match="no folder for class '4'"):
        prepare(asked(tmp_path / "real"), tmp_path / "out")
    pixels = replace(asked(real), trials=TrialsRequest(str(real), "pixels", objective="judge_accuracy"))
    with pytest.raises(RequestError, match="not a classifier"):
        prepare(pixels, tmp_path / "out")


def test_a_judge_that_guides_is_pointed_out(real: Path, tmp_path: Path):
    job = prepare(replace(asked(real), trials=TrialsRequest(str(real), "digits-guide")), tmp_path / "out")
    assert any("both guides and judges" in note for note in job.notes)
