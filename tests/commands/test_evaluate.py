"""`handful evaluate` and the tables, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from handful import console
from handful.cli import app
from handful.commands.evaluate import named_folders
from handful.data.images import encode_png
from handful.errors import Note
from handful.metrics.catalogue import METRICS
from handful.report.tables import Table, print_table
from handful.zoo.digits import load_digits_split

HEADINGS = [metric.heading for metric in METRICS if metric.compared and metric.usual and metric.name != "copied"]


def handful(*arguments: Any) -> int:
    return console.answer(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve held-out digits of three classes each: two disjoint folders."""
    split, root = load_digits_split(), tmp_path_factory.mktemp("digits")
    for digit in range(3):
        images = split.test_images[split.test_labels == digit][:24]
        for index, image in enumerate(images):
            file = root / ("made" if index % 2 else "real") / str(digit) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(image))
    return root / "made", root / "real"


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Eight held-out digits of all ten classes, eight others, and the first with one another at half strength over them."""
    split, root = load_digits_split(), tmp_path_factory.mktemp("ten")
    for digit in range(10):
        images = split.test_images[split.test_labels == digit][:16]
        others = split.test_images[split.test_labels == (digit + 1) % 10][:8]
        for name, of_class in (("made", images[:8]), ("real", images[8:]), ("ghosts", (images[:8] + others) / 2)):
            for index, image in enumerate(of_class):
                file = root / name / str(digit) / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encode_png(image))
    return root / "made", root / "real", root / "ghosts"


def test_json_stands_alone_on_stdout_with_judge_ceiling_and_transforms(folders, capsys, tmp_path):
    made, real = folders
    report = tmp_path / "report.json"
    assert (
        handful("evaluate", made, "--real", real, "--judge", "pixels", "--neighbours", 3, "--json", "--save-json", report) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["judge"], found["k"], found["judge_accuracy"]) == ("pixels", 3, None)
    assert set(found["transformed"]) == {"jpeg", "resample", "noise", "lowpass"}
    assert found["pooled"]["ceiling"]["n_real"] == 18, "the ceiling is one half of the real images against the other"
    assert set(found["per_class"]) == {"0", "1", "2"}
    assert json.loads(report.read_text()) == found


def test_the_table_names_the_judge_and_every_class(folders, capsys):
    made, real = folders
    assert handful("evaluate", made, "--real", real, "--judge", "digits-judge", "--neighbours", 3, "--no-audit") == 0
    said = capsys.readouterr().out
    assert "judge digits-judge, 3 neighbours" in said
    assert [line.split()[0] for line in said.splitlines()[6:9]] == ["0", "1", "2"]
    assert "after jpeg" not in said


def test_the_audited_table_has_a_row_a_transform_with_frechet_distance_and_accuracy(ten, capsys):
    made, real, _ = ten
    assert handful("evaluate", made, "--real", real, "--judge", "digits-judge", "--neighbours", 3, "--no-ceiling") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["real", "generated", *HEADINGS]
    assert [line.split()[1] for line in lines[3:7]] == ["jpeg", "resample", "noise", "lowpass"]
    numbers = [[float(cell) if cell != "-" else None for cell in line.split()[-8:]] for line in lines[3:7]]
    assert all(row[6] is None and row[5] is not None and 0 <= row[7] <= 1 for row in numbers)
    mean = [float(cell) for cell in lines[7].split()[-3:] if cell != "-"]
    assert mean[1] == pytest.approx(sum(row[7] for row in numbers) / 4, abs=0.001)
    assert max(map(len, lines)) <= 120


def test_gains_over_baselines_are_a_table_each_within_120_columns(ten, capsys):
    made, real, ghosts = ten
    baselines = ("--baseline", ghosts, "--baseline", f"again={ghosts}")
    assert handful("evaluate", made, "--real", real, "--judge", "digits-judge", "--neighbours", 3, *baselines) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    titles = [number for number, line in enumerate(lines) if line.startswith("gain over")]
    assert [lines[number] for number in titles] == [
        f"gain over {name}, judge digits-judge: 80 images beside 80" for name in ("ghosts", "again")
    ]
    heads = " ".join(lines[titles[0] + 1].split())
    assert heads == "value baseline gain 90 % interval surviving 90 % interval share verdict"
    first = {line.split()[0]: line.split()[1:] for line in lines[titles[0] + 2 : titles[0] + 10]}
    assert list(first) == HEADINGS
    assert first["recall"][-1] == "-"
    assert first["accuracy"][-1] == "survives"
    assert sum("between these two" in line for line in lines) == 1, "the rule stands below the last table, once"


def test_gains_are_in_json_and_in_the_report(ten, capsys, tmp_path):
    made, real, ghosts = ten
    asked = ("--judge", "digits-judge", "--neighbours", 3, "--no-ceiling", "--baseline", f"ghosts={ghosts}", "--json")
    assert handful("evaluate", made, "--real", real, *asked, "--save-json", tmp_path / "report.json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "report.json").read_text())
    gains = found["gains"]["ghosts"]
    assert (gains["images"], gains["baseline_images"], gains["draws"], gains["level"]) == (80, 80, 200, 0.9)
    accuracy = gains["metrics"]["judge_accuracy"]
    assert accuracy["gain"] == pytest.approx(found["judge_accuracy"] - accuracy["baseline"])
    assert set(accuracy["after"]) == {"jpeg", "resample", "noise", "lowpass"}
    assert accuracy["surviving"] == pytest.approx(sum(accuracy["after"].values()) / 4)
    assert accuracy["robust_gain"] == pytest.approx(accuracy["surviving"] / accuracy["gain"])
    assert accuracy["interval"][0] < accuracy["gain"] < accuracy["interval"][1]


def test_without_the_audit_the_table_of_gains_has_no_verdict(ten, capsys):
    made, real, ghosts = ten
    asked = ("--judge", "digits-judge", "--neighbours", 3, "--no-audit", "--baseline", ghosts)
    assert handful("evaluate", made, "--real", real, *asked) == 0
    said = capsys.readouterr().out
    assert "gain over ghosts" in said
    assert "verdict" not in said.split("gain over")[1].splitlines()[1]
    assert "adversarial" not in said


def test_copies_of_exemplars_are_said(folders, capsys, tmp_path):
    made, real = folders
    (tmp_path / "exemplars").symlink_to(made)
    asked = ("--judge", "pixels", "--neighbours", 3, "--no-audit", "--exemplars", tmp_path / "exemplars")
    assert handful("evaluate", made, "--real", real, *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[1].split()[-1], lines[2].split()[-1]) == ("copied", "1.000")
    assert handful("evaluate", made, "--real", real, *asked, "--json") == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 1


@pytest.mark.parametrize(
    ("baselines", "said"),
    [
        (["{made}"], "these are the generated images themselves"),
        (["none={real}"], "these are the real images themselves"),
        (["{ghosts}", "{ghosts}"], "has the name 'ghosts' too. Write ghosts-2="),
        (["a={ghosts}", "a={made}"], "has the name 'a' too"),
        (["a="], "the name or the folder is empty"),
        (["={ghosts}"], "the name or the folder is empty"),
        (["a={ghosts}/nowhere"], "there is no such folder"),
    ],
)
def test_wrong_baselines_exit_with_2_and_say_why(ten, capsys, baselines, said):
    made, real, ghosts = ten
    told = [part for text in baselines for part in ("--baseline", text.format(made=made, real=real, ghosts=ghosts))]
    assert handful("evaluate", made, "--real", real, "--judge", "no-such-judge", *told) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: baseline: ")
    assert said in error


def test_a_baseline_may_have_an_equals_sign_in_its_path(tmp_path):
    (tmp_path / "scale=0.4").mkdir()
    assert named_folders([str(tmp_path / "scale=0.4")]) == {"scale=0.4": tmp_path / "scale=0.4"}
    assert named_folders([f"a={tmp_path}/scale=0.4", "b=x/y"]) == {"a": tmp_path / "scale=0.4", "b": Path("x/y")}


def test_classes_that_the_real_folder_lacks_are_refused_before_any_feature_is_taken(folders, tmp_path, capsys):
    made, real = folders
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0").symlink_to(real / "0")
    assert handful("evaluate", made, "--real", tmp_path / "real", "--judge", "pixels") == 2
    assert "no folder for 1, 2" in capsys.readouterr().err


def test_too_few_images_for_k_are_refused_naming_the_remedy(folders, capsys):
    made, real = folders
    assert handful("evaluate", made, "--real", real, "--judge", "pixels", "--neighbours", 36) == 2
    assert "lower --neighbours" in capsys.readouterr().err


def test_classes_too_small_for_k_are_named_once_and_why_their_mean_is_missing(folders, capsys):
    made, real = folders
    options = ("--judge", "pixels", "--neighbours", 13, "--no-audit", "--no-ceiling")
    assert handful("evaluate", made, "--real", real, *options) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("12 real and 12 generated images: precision, recall, density and coverage at k = 13 need 14 of each") == 1
    assert "each class: 12 real" in said
    assert "k = 11 would work (--neighbours), so the mean over classes is -" in said


@pytest.mark.parametrize("arguments", [("--seeds", 0), ("--per-class", 2)])
def test_a_demo_without_sense_exits_with_2(arguments, tmp_path, capsys):
    assert handful("demo", "--out", tmp_path / "out", *arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_a_table_is_aligned_and_never_cut(capsys):
    print_table(Table("title", ["", "metric"], [["a long name", "1.000"], ["b", "12.000"]], ["a note"]))
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "             metric",
        "a long name   1.000",
        "b            12.000",
        "a note",
    ]


def test_a_file_that_could_not_be_written_is_refused_before_anything_is_judged(folders, tmp_path, capsys):
    made, real = folders
    asked = ("evaluate", made, "--real", real, "--judge", "no-such-judge", "--save-json")
    assert handful(*asked, tmp_path / "no" / "x.json") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert handful(*asked, tmp_path) == 2
    assert "this is a folder" in capsys.readouterr().err


def test_former_option_names_go_on_working_with_a_note(folders, capsys):
    made, real = folders
    assert handful("evaluate", made, "--real", real, "--features", "pixels", "--k", 3, "--no-audit", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["k"] == 3
    assert "--features is now called --judge" in said.err
    assert handful("evaluate", made, "--real", real, "--features", "pixels", "--judge", "pixels") == 2


def test_two_flat_folders_are_compared_as_one_set_each_and_no_accuracy_is_claimed(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, folder in zip(("made", "real"), folders, strict=True):
        (tmp_path / name).mkdir()
        for file in folder.rglob("*.png"):
            (tmp_path / name / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    with pytest.warns(Note, match="no accuracy: the images are not in class folders"):
        assert handful("evaluate", tmp_path / "made", "--real", tmp_path / "real", "--judge", "digits-judge") == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert "pooled" in rows
    assert not {"mean over classes", "images"} & set(rows), "the same numbers once more"
