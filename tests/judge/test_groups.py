"""Metrics by group: a bad group is named, equal groups differ by chance alone, and what can't be grouped is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.halves import Halves

from handful.data.images import write_png
from handful.data.sources import labelled_files
from handful.errors import RequestError
from handful.judge.evaluate import evaluate
from handful.judge.groups import read_groups

PACS = Path(__file__).parents[3] / "shared/data/pacs/pacs96.parquet"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two digits, three regions: of the north, one image again and again."""
    halves, root = Halves(), tmp_path_factory.mktemp("groups")
    for name, images, labels in (("made", halves.others, halves.others_labels), ("real", halves.images, halves.labels)):
        for digit in "01":
            of_class = images[[place for place, label in enumerate(labels) if label == digit]][:24]
            rows = []
            for place, image in enumerate(of_class):
                region = ("north", "south", "west")[place % 3]
                file = root / name / f"{digit} in {region}" / f"{place}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                copied = name == "made" and region == "north"
                write_png(file, of_class[0] + 0.02 * torch.randn(1, 8, 8) if copied else image)
                rows.append(json.dumps({"file_name": f"{digit} in {region}/{place}.png", "region": region}) + "\n")
            with (root / name / "metadata.jsonl").open("a") as stream:
                stream.writelines(rows)
    return root


def test_the_bad_group_is_named_by_pattern_column_and_csv(sets, tmp_path):
    asked = {"neighbours": 3, "audit": False, "ceiling": False}
    by_pattern = evaluate(sets / "made", sets / "real", "digits-judge", groups=".* in (.*)", **asked).groups
    by_column = evaluate(sets / "made", sets / "real", "digits-judge", groups="region", **asked).groups
    lines = [f"{f.parent.name}/{f.name},{f.parent.name.split()[-1]}\n" for f in sets.rglob("*.png")]
    (tmp_path / "regions.csv").write_text("file,group\n" + "".join(dict.fromkeys(lines)))
    by_csv = evaluate(sets / "made", sets / "real", "digits-judge", groups=str(tmp_path / "regions.csv"), **asked).groups
    assert by_pattern is not None
    assert by_pattern == by_column == by_csv
    assert list(by_pattern.per_group) == ["north", "south", "west"]
    assert by_pattern.worst["coverage"] == by_pattern.worst["frechet"] == "north"
    coverage = {name: scores.coverage for name, scores in by_pattern.per_group.items()}
    assert by_pattern.gap["coverage"] == max(coverage.values()) - coverage["north"]
    assert by_pattern.mean.coverage == pytest.approx(sum(coverage.values()) / 3)
    # the two equal groups differ by no more than chance, the bad one by more
    low, high = (by_pattern.intervals[name]["frechet"] for name in ("south", "west"))
    assert max(low[0], high[0]) < min(low[1], high[1])
    assert coverage["north"] < min(by_pattern.intervals[name]["coverage"][0] for name in ("south", "west"))
    assert json.dumps(by_pattern.to_dict(), allow_nan=False)


def test_an_image_of_the_same_name_in_another_class_is_another_image(sets, tmp_path):
    files, told = labelled_files(sets / "real"), []
    (tmp_path / "some.csv").write_text("file,group\n0 in north/0.png,a\nold/place/1 in west/2.png,b\n")
    found = read_groups(files, str(tmp_path / "some.csv"), told.append, "real")
    assert {name.split("/real/")[1]: group for name, group in zip(files.names, found, strict=True) if group} == {
        "0 in north/0.png": "a"
    }
    assert told == ["left out of the results by group, as they have no group: 47 of 48 real images"]
    # of one class alone the name is the only one of its kind, and a table of a class's own speaks of its class
    one = files.only(files.by_class()["1 in west"])
    assert Counter(read_groups(one, str(tmp_path / "some.csv"), told.append, "real"))["b"] == 1
    for label, group in (("0 in north", "cold"), ("1 in north", "warm")):
        folder = tmp_path / "own" / label
        write_png(folder.mkdir(parents=True) or folder / "0.png", torch.zeros(1, 8, 8))
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "climate": group}))
    assert read_groups(labelled_files(tmp_path / "own"), "climate", told.append, "real") == ["cold", "warm"]


def test_groups_that_are_missing_small_or_not_there_are_told(sets, tmp_path):
    asked = {"neighbours": 9, "audit": False, "ceiling": False}
    (tmp_path / "some.csv").write_text("file,group\n" + "".join(f"{n}.png,a\n" for n in range(6)))
    with pytest.warns(UserWarning, match="left out .* no group: 36 of 48 real images"):
        found = evaluate(sets / "made", sets / "real", "pixels", groups=str(tmp_path / "some.csv"), **asked).groups
    assert found is not None
    assert found.per_group["a"].n_generated == 12
    few = evaluate(sets / "made", sets / "real", "pixels", groups="region", **{**asked, "neighbours": 17}).groups
    assert few is not None
    assert few.per_group["west"].coverage is None
    assert "need 18 of each" in few.per_group["west"].note
    assert "coverage" not in few.worst, "of no group that has a value there is no worst one"
    assert few.gap["frechet"] > 0
    (tmp_path / "latin.csv").write_bytes("file,group\n1.png,Süd\n".encode("latin-1"))
    for groups, said in (
        ("regoin", "no column 'regoin'. Did you mean 'region'"),
        ("(", "not a regular expression"),
        ("[0-9]+(x)", "none of the 48 real images has a group"),
        (str(tmp_path / "latin.csv"), "not UTF-8"),
        (str(tmp_path / "none.csv"), "can't be read"),
    ):
        with pytest.raises(RequestError, match=said):
            evaluate(sets / "made", sets / "real", "pixels", groups=groups, **asked)


@pytest.mark.skipif(not PACS.is_file(), reason="PACS is not there")
def test_a_column_of_a_parquet_file_groups_real_photographs():
    files = labelled_files(PACS)
    domains = Counter(read_groups(files, "domain", print, "real"))
    assert set(domains) == {"photo", "art_painting", "cartoon", "sketch"}
    assert domains.total() == len(files) == 3320
