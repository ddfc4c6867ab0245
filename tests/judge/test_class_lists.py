"""ImageNet's V2 (numbers), Sketch, R and A (synsets, 200 of them) as test sets of classes that a run calls by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from handful.data.images import write_png
from handful.errors import RequestError
from handful.judge.class_lists import meanings, read_class_list
from handful.judge.worth import _tested, worth
from handful.zoo.digits import load_digits_split

LIST = """n01440764 tench, Tinca tinca
n01443537 goldfish, Carassius auratus
n02012849 crane
n03126707 crane
n03710637 maillot
n03710721 maillot, tank suit
"""


@pytest.fixture(params=["txt", "json"])
def entries(request, tmp_path):
    file = tmp_path / f"list.{request.param}"
    if request.param == "txt":
        file.write_text(LIST)
    else:
        pairs = [line.split(" ", 1) for line in LIST.splitlines()]
        file.write_text(json.dumps({str(number): pair for number, pair in enumerate(pairs)}))
    return read_class_list(file)


def test_numbers_synsets_and_names_mean_the_same_class(entries):
    for classes in (["tench", "goldfish"], ["tench, Tinca tinca", "goldfish, Carassius auratus"], ["n01440764", "n01443537"]):
        for folders in (["0", "1"], ["n01440764", "n01443537"], ["Tinca_tinca", "goldfish"]):
            assert meanings(folders, classes, entries) == dict(zip(folders, classes, strict=True))
    assert meanings(["4", "5"], ["maillot", "maillot, tank suit"], entries) == {"4": "maillot", "5": "maillot, tank suit"}
    assert meanings(["2", "n03126707", "n01443537", "n9"], ["crane", "goldfish"], entries) == {"n01443537": "goldfish"}
    assert meanings(["n02012849"], ["n02012849"], []) == {"n02012849": "n02012849"}
    assert meanings(["tench"], ["tench, Tinca tinca", "rock crab"], []) == {"tench": "tench, Tinca tinca"}


def test_lists_that_are_none_are_refused(tmp_path):
    for name, content, said in (
        ("a.txt", "tench\n", "line 1 does not hold a synset and a name"),
        ("b.txt", "n01440764 tench\nn014 x\n", "line 2 does not hold a synset"),
        ("c.txt", "", "line 1 does not hold a synset"),
        ("d.json", "{", "can't be read"),
        ("e.json", "[1]", "can't be read"),
        ("f.csv", "a,b\n1,2\n", "it lacks a column; it has a, b"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RequestError, match=rf"^ood_classes: .*{said}"):
            read_class_list(tmp_path / name)
    (tmp_path / "g.csv").write_bytes("folder,class\n1,Süd\n".encode("cp1252"))
    with pytest.raises(RequestError, match="is not UTF-8"):
        read_class_list(tmp_path / "g.csv")
    with pytest.raises(RequestError, match="can't be read"):
        read_class_list(tmp_path / "none.txt")


NAMES = {"3": "tench, Tinca tinca", "5": "goldfish", "8": "shark"}
SYNSETS = {"3": "n01440764", "5": "n01443537", "8": "n01484850", "9": "n01491361"}


def write(root: Path, names: dict[str, str], split: tuple[torch.Tensor, torch.Tensor], count: int) -> Path:
    images, labels = split
    for digit, name in names.items():
        for number, image in enumerate(images[labels == int(digit)][:count]):
            (root / name).mkdir(parents=True, exist_ok=True)
            write_png(root / name / f"{number:03d}.png", image)
    return root


def test_utility_tests_on_imagenets_folders_and_says_what_is_left_out(tmp_path):
    digits = load_digits_split()
    train, test = (digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)
    made = write(tmp_path / "made", NAMES, train, 8)
    held = write(tmp_path / "val", SYNSETS, test, 8)
    sketch = {digit: SYNSETS[digit] for digit in "3589"}
    rendition = {digit: SYNSETS[digit] for digit in "359"}
    sets = {
        "v2": write(tmp_path / "v2", {"3": "0", "5": "1", "8": "2"}, test, 8),
        "sketch": write(tmp_path / "sketch", sketch, test, 8),
        "r": write(tmp_path / "r", rendition, test, 8),
    }
    (tmp_path / "r" / "README.txt").write_text("ImageNet-R")
    (tmp_path / "list.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 shark\nn01491361 tiger\n")
    asked = {"test": held, "ood": sets, "exemplars": write(tmp_path / "few", NAMES, train, 2), "seeds": 1, "steps": 10}
    found = worth(made, ood_classes=tmp_path / "list.txt", **asked)
    one, *_ = found.rows
    assert one.tests["v2"] == one.tests["test"] == one.tests["sketch"], "the same digits under three kinds of names"
    assert set(one.tests["r"].per_class) == {"tench, Tinca tinca", "goldfish"}
    two = (one.tests["v2"].per_class["tench, Tinca tinca"] + one.tests["v2"].per_class["goldfish"]) / 2
    assert one.tests["r"].mean == pytest.approx(two)
    assert one.tests["r"].among_own is not None
    assert one.tests["r"].among_own[0] >= one.tests["r"].mean
    assert one.tests["v2"].among_own is None
    told = "\n".join(found.notes)
    assert "sketch: folders that can't be matched with a generated class are left out (1 of 4): n01491361" in told
    assert "r: it has no image of 1 of the 3 generated classes: shark" in told
    assert "v2: folders with another name than their class: 0 is tench, Tinca tinca" in told
    assert "r: if the classifier may answer only with classes of these images, exemplars alone " in told
    (tmp_path / "pairs.csv").write_text("folder,class\n0,goldfish\n1,shark\n")
    with pytest.raises(
        RequestError, match=r"^ood: .*none of its folders \(0, 1, 2\) has the name of a generated class .*--ood-classes FILE"
    ):
        worth(made, **{**asked, "test": made, "ood": {"v2": sets["v2"]}})
    with pytest.raises(RequestError, match="this is already the name of the images of --test"):
        worth(made, **{**asked, "test": made, "ood": {"test": sets["v2"]}})


def test_pairs_of_ones_own_are_taken(tmp_path):
    (tmp_path / "pairs.csv").write_text("folder,class\n0,goldfish\n1,shark\n7,shark\n")
    pairs = read_class_list(tmp_path / "pairs.csv")
    assert meanings(["0", "1", "7", "9"], ["goldfish", "shark"], pairs) == {"0": "goldfish", "1": "shark", "7": "shark"}


def test_answers_among_a_sets_own_classes_leave_the_others_out():
    logits = torch.tensor([[[3.0, 2.0, 9.0], [1.0, 5.0, 0.0]]])  # one training, two images of classes 0 and 1
    found = _tested(logits, torch.tensor([0, 1]), ["a", "b", "c"])
    assert (found.accuracies, found.among_own, found.per_class) == ([0.5], [1.0], {"a": 0.0, "b": 1.0})
    assert _tested(logits[..., :2], torch.tensor([0, 1]), ["a", "b"]).among_own is None
