"""A sweep end to end: rows that are true, whatever the order and however often it was interrupted."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from support.killed import killed
from support.runs import contents
from support.sweeps import CLASSES, digits_data, digits_sweep, timeless

import handful.sweep.work as sweep_run
from handful import cli, console
from handful.data.exemplars import Exemplars
from handful.data.images import read_folder
from handful.data.shared_exemplars import ExemplarFeatures
from handful.errors import RequestError
from handful.features import load_extractor
from handful.generate import generate, read_recipe
from handful.judge.evaluate import Judge
from handful.judge.utility import downstream_accuracy
from handful.metrics.copying import copied_share
from handful.runs.progress import Progress
from handful.sweep import prepare_sweep, read_results, sweep
from handful.sweep.real import look_into, split_places
from handful.sweep.results import rows_of


@pytest.fixture(scope="module")
def swept(digits, tmp_path_factory):
    """Three settings, two seeds."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    request = digits_sweep(digits, seeds=[0, 1], utility={"steps": 10, "seeds": 2, "augment": False})
    return request, out, sweep(request, out)


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    """The same settings, one seed, no downstream accuracy."""
    out = tmp_path_factory.mktemp("small") / "out"
    return out, sweep(digits_sweep(digits), out)


def named(rows, **keys):
    (found,) = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    return found


def test_every_setting_and_seed_has_a_row_for_each_half(swept):
    _, out, result = swept
    keys = [(row["seed"], row["method"], row["scale"], row["k"], row["split"]) for row in result.rows]
    settings = [("none", 0.0, 0), ("chamfer", 0.1, 4), ("chamfer", 0.3, 4)]
    assert keys == [(seed, *one, split) for seed in (0, 1) for one in settings for split in ("validation", "test")]
    assert {row["images"] for row in result.rows} == {16}
    assert (result.failures, result.done, result.resumed) == ([], 6, 0)
    assert read_results(out / "results.parquet") == result.rows
    assert all(row["seconds"] > 0 for row in result.rows)


def test_a_row_holds_what_an_independent_measurement_finds(swept, digits):
    _, out, result = swept
    row = named(result.rows, method="chamfer", scale=0.3, seed=1, split="test")
    made = read_folder(out / "sets/chamfer/scale-0.3-k-4/seed-1", channels=1)
    everything = read_folder(digits / "real", channels=1)
    places = split_places(look_into(str(digits / "real"), None, "real"), 0.5, 3)["test"]
    half = {name: images[places[name]] for name, images in everything.by_class().items()}
    real, labels = torch.cat(list(half.values())), [name for name in CLASSES for _ in places[name]]
    judge = Judge(real, labels, load_extractor("digits-judge"), k=3, audit=False, ceiling=False)
    found = judge(made.images, made.labels).row()
    assert {name: row[name] for name in found if name != "copied"} | {"copied": None} == found

    pool = Exemplars.from_folder(digits / "pool", channels=1, size=(8, 8), k=4, seed=1).images
    flat = [{name: images.flatten(1) for name, images in part.items()} for part in (made.by_class(), pool, half)]
    assert row["copied"] == copied_share(*flat)

    numbers = [torch.tensor([CLASSES.index(name) for name in part]) for part in (made.labels, labels)]
    accuracies = [
        downstream_accuracy(made.images, numbers[0], real, numbers[1], steps=10, augment=False, seed=seed) for seed in (1, 2)
    ]
    assert row["utility"] == pytest.approx(sum(accuracies) / 2)
    assert row["utility_spread"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)


def test_a_set_is_the_run_that_generate_makes_of_its_recipe(swept, tmp_path):
    _, out, _ = swept
    folder = out / "sets/chamfer/scale-0.1-k-4/seed-0"
    generate(read_recipe(folder / "recipe.yaml"), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_the_order_of_the_sets_changes_no_row(small, digits, tmp_path):
    again = sweep(digits_sweep(digits), tmp_path / "out", order=[2, 0, 1])
    assert timeless(again.rows) == timeless(small[1].rows)


def test_the_chosen_recipe_can_be_generated(swept, tmp_path):
    _, out, result = swept
    best = result.choice().best
    assert best is not None
    recipe = read_recipe(out / "chosen.yaml")
    assert generate(recipe, tmp_path / "out").images == 16
    assert contents(tmp_path / "out") == contents(out / "sets" / best.setting.folder / "seed-0")


def test_the_pareto_picture_is_a_png_and_one_k_makes_no_picture_over_k(swept):
    _, out, result = swept
    with Image.open(out / "pareto.png") as picture:
        assert picture.format == "PNG"
    assert not (out / "over_k.png").exists()
    assert result.files == ["results.parquet", "chosen.yaml", "pareto.png"]


def test_the_request_is_written_whole_with_digests(swept):
    _, out, _ = swept
    stored = yaml.safe_load((out / "sweep.yaml").read_text())
    assert stored["methods"]["chamfer"]["guidance"][0]["jacobian"] == "gaussian", "what it became in pixels"
    provenance = stored["provenance"]
    assert all(len(provenance[name]) == 64 for name in ("model_sha256", "judge_sha256", "real_sha256", "exemplars_sha256"))
    assert provenance["real_images"] == {"validation": 16, "test": 16}


def test_a_finished_sweep_measures_nothing_again_and_changes_no_file(swept):
    request, out, result = swept
    before = contents(out)
    again = sweep(request, out)
    assert (again.done, again.resumed, again.rows) == (0, 6, result.rows)
    assert contents(out) == before


def test_seeds_scales_and_methods_can_be_added_and_rows_are_kept(small, digits, tmp_path):
    shutil.copytree(small[0], tmp_path / "out")  # a sweep's directory may move, too
    methods = {"none": {"guidance": []}, "cfg": {"guidance": [{"method": "cfg"}], "scales": [1]}}
    again = sweep(digits_sweep(digits, methods=methods, seeds=[0, 1], objective="f1"), tmp_path / "out")
    assert (again.done, again.resumed) == (3, 1)
    assert named(again.rows, method="cfg", seed=1, split="test")["flops_ratio"] == pytest.approx(2.0, abs=0.01)
    back = prepare_sweep(digits_sweep(digits), tmp_path / "out")
    assert back.pending == [], "what is not asked for now is kept for when it is"
    assert rows_of(back.sets, back.records, "none") == small[1].rows


def test_only_one_method_can_be_worked_on(digits, tmp_path):
    result = sweep(digits_sweep(digits), tmp_path / "out", only=["none"])
    assert {row["method"] for row in result.rows} == {"none"}
    with pytest.raises(RequestError, match="there is no such method"):
        sweep(digits_sweep(digits), tmp_path / "out", only=["non"])


class StopAt(Progress):
    """Ctrl-C at a point of the progress; one set is one."""

    def __init__(self, point: float) -> None:
        self.point, self.done = point, 0.0

    def advance(self, amount: float, now: str = "") -> None:
        self.done += amount
        if self.done > self.point:
            raise KeyboardInterrupt


@pytest.mark.parametrize("point", [0.2, 1.2])
def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_rows(small, digits, tmp_path, point):
    request, out = digits_sweep(digits), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sweep(request, out, progress=StopAt(point))
    done = [path for path in out.glob("sets/*/*/seed-0.json") if json.loads(path.read_text())["measured"]]
    assert len(done) < 3
    again = sweep(request, out)
    assert again.resumed == len(done)
    assert timeless(again.rows) == timeless(small[1].rows)


def test_a_set_that_was_generated_but_not_measured_keeps_its_seconds(digits, tmp_path, monkeypatch):
    """Measuring takes long, so that is where a sweep is killed; nothing is generated then that could be timed again."""
    request, out = digits_sweep(digits), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sweep_run._Work, "measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep(request, out)
    seconds = json.loads((out / "sets/none/scale-0.0/seed-0.json").read_text())["seconds"]
    assert seconds > 0
    result = sweep(request, out)
    assert named(result.rows, method="none", split="test")["seconds"] == seconds
    assert named(result.rows, method="chamfer", scale=0.3, split="test")["cost_ratio"] > 0


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_rows(small, digits, tmp_path):
    data = digits_data(digits)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(data))
    command = ["sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out", "-q"]
    killed(command, lambda: list((tmp_path / "out").glob("sets/*/*/seed-0.json")))
    assert (tmp_path / "out/sweep.yaml").is_file()
    assert console.answer(cli.app, [str(each) for each in command]) == 0
    assert timeless(read_results(tmp_path / "out/results.parquet")) == timeless(small[1].rows)


def test_a_set_that_fails_is_told_skipped_and_tried_again(digits, tmp_path):
    (tmp_path / "fragile.py").write_text(
        "import torch\nfrom pathlib import Path\nfrom handful.features import FeatureExtractor\n"
        "class Fragile(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        f"        if len(x) > 4 and Path({str(tmp_path / 'broken')!r}).exists(): raise ValueError('no such luck')\n"
        "        return x\n"
        "def load():\n    return FeatureExtractor('fragile', Fragile(), channels=None)\n"
    )
    (tmp_path / "broken").touch()
    fragile = {"guidance": [{"method": "chamfer", "features": f"{tmp_path / 'fragile.py'}:load", "every": 1}], "k": [4]}
    methods = {"none": {"guidance": []}, "fragile": fragile, "cfg": {"guidance": [{"method": "cfg"}]}}
    request = digits_sweep(digits, methods=methods)
    result = sweep(request, tmp_path / "out")
    assert [text.partition(":")[0] for text in result.failures] == ["fragile 0.4 k=4, seed 0"]
    assert "ValueError: no such luck" in result.failures[0]
    assert {row["method"] for row in result.rows} == {"none", "cfg"}
    (tmp_path / "broken").unlink()
    again = sweep(request, tmp_path / "out")
    assert (again.failures, again.done, again.resumed) == ([], 1, 2)
    assert {row["method"] for row in again.rows} == {"none", "fragile", "cfg"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"neighbours": 2}, "neighbours: 3 there, 2 now"),
        ({"audit": True}, "audit: False there, True now"),
        ({"validation": 0.25}, "validation: 0.5 there, 0.25 now"),
        ({"methods": {"none": {"guidance": [], "sampler": {"steps": 4}}}}, "sampler.steps: 3 there, 4 now"),
    ],
)
def test_what_would_make_other_rows_is_refused_with_the_difference(swept, digits, change, said):
    _, out, _ = swept
    before = contents(out)
    with pytest.raises(RequestError, match="with other settings") as caught:
        sweep(digits_sweep(digits, seeds=[0, 1], **{"utility": {"steps": 10, "seeds": 2, "augment": False}, **change}), out)
    assert said in str(caught.value)
    assert contents(out) == before


def test_other_real_images_are_refused_and_the_same_elsewhere_are_not(swept, digits, tmp_path):
    request, out, _ = swept
    for name in CLASSES:
        (tmp_path / "real" / name).mkdir(parents=True)
        for file in (digits / "real" / name).iterdir():
            (tmp_path / "real" / name / file.name).write_bytes(file.read_bytes())
    moved = request.model_copy(update={"real": str(tmp_path / "real")})
    assert prepare_sweep(moved, out).pending == []
    first = next((tmp_path / "real" / "1").iterdir())
    first.write_bytes(next((tmp_path / "real" / "4").iterdir()).read_bytes())
    with pytest.raises(RequestError, match="real_sha256"):
        prepare_sweep(moved, out)


def test_a_directory_with_something_else_is_refused_and_kept(digits, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="not from a sweep of handful: thesis"):
        sweep(digits_sweep(digits), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["thesis.txt"]


def test_a_run_directory_is_no_sweeps(swept, digits):
    request, out, _ = swept
    with pytest.raises(RequestError, match="not from a sweep of handful"):
        sweep(request, out / "sets/none/scale-0.0/seed-0")


def test_two_processes_do_not_sweep_into_one_directory(swept):
    request, out, _ = swept
    with (out / ".handful" / "lock").open("a") as held:  # flock is per open file: this stands for another process
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RequestError, match="another process is sweeping"):
            sweep(request, out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judge": "pixels", "objective": "judge_accuracy"}, "not a classifier"),
        ({"k": [17]}, "fewer exemplars"),
        ({"neighbours": 16}, "too few for 16 neighbours"),
        ({"judge": "digits-jugde"}, "digits-judge"),
        ({"methods": {"none": {"guidance": [{"method": "classifier", "classifier": "pixels"}]}}}, "methods.none"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_written(digits, tmp_path, change, said):
    with pytest.raises(RequestError, match=said):
        sweep(digits_sweep(digits, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exemplars_own_images_judge_nothing(digits, tmp_path):
    with pytest.raises(RequestError, match="32 of its 32 images are also among the exemplars"):
        sweep(digits_sweep(digits, real=str(digits / "pool")), tmp_path / "out")


def test_a_judge_that_guides_is_told(digits, tmp_path):
    guided = {"guidance": [{"method": "chamfer", "features": "digits-judge"}]}
    job = prepare_sweep(digits_sweep(digits, methods={"none": {"guidance": []}, "c": guided}), tmp_path / "out")
    assert any("both guides and judges" in note for note in job.notes)


def test_other_versions_rows_are_not_mixed_unless_it_is_allowed(small, digits, tmp_path):
    request, out = digits_sweep(digits), tmp_path / "out"
    shutil.copytree(small[0], out)
    (out / "sets/none/scale-0.0/seed-0.json").unlink()
    stored = yaml.safe_load((out / "sweep.yaml").read_text())
    stored["provenance"]["numpy"] = "1.0"
    (out / "sweep.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    with pytest.raises(RequestError, match=r"other library versions \(numpy 1.0 then"):
        prepare_sweep(request, out)
    assert any("numpy" in note for note in prepare_sweep(request, out, allow_version_change=True).notes)


def test_classes_and_exemplars_need_not_be_told_of_a_model_that_knows_its_classes(digits, tmp_path):
    data = digits_data(digits, methods={"none": {"guidance": []}}, objective="coverage", baseline="none")
    data["recipe"] = {
        "model": {"name": "digits", "classes": [str(digit) for digit in range(10)]},
        "per_class": 6,
        "classes": ["4", "1"],
        "sampler": {"steps": 2},
    }
    result = sweep(data, tmp_path / "out")  # plain data will do
    assert len(result.rows) == 2
    assert result.rows[0]["copied"] is None, "without exemplars nothing can be a copy"


def test_exemplars_may_be_a_file_of_features_whose_draw_is_its_own(digits, tmp_path):
    images = Exemplars.from_folder(digits / "pool", channels=1, size=(8, 8), k=6, seed=5)
    ExemplarFeatures.of(images, [load_extractor("digits-guide")], seed=5).save(tmp_path / "exemplars.safetensors")
    guided = {"guidance": [{"method": "chamfer", "features": "digits-guide", "every": 1}], "k": [2, 6]}
    data = digits_data(digits, methods={"none": {"guidance": []}, "chamfer": guided}, seeds=[3])
    data["recipe"]["exemplars"]["path"] = str(tmp_path / "exemplars.safetensors")
    result = sweep(data, tmp_path / "out")
    assert (result.failures, len(result.rows)) == ([], 6)
    assert named(result.rows, k=6, split="test")["copied"] is None, "the images are not there to compare with"
    assert read_recipe(tmp_path / "out/sets/chamfer/scale-0.4-k-6/seed-3/recipe.yaml").exemplars.seed == 5
    with Image.open(tmp_path / "out/over_k.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(RequestError, match=r"exemplars\.k: 7"):
        sweep({**data, "methods": {**data["methods"], "chamfer": {**guided, "k": [7]}}}, tmp_path / "other")
