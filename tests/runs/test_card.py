"""The data set's card: `datasets` itself loads the run directory by it, whatever the classes are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.reports import digits_run, evaluation, photos

from handful.report.gather import gather
from handful.report.html import report
from handful.runs.card import CARD, MARK, card
from handful.runs.kept import keep

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("card")
    return digits_run(root / "out", photos(root / "photos"))


def test_the_head_says_what_the_hub_reads(run):
    text = (run / CARD).read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["size_categories"] == ["n<1K"]
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "images/**"}]
    assert "synthetic" in head["tags"]
    assert "36 **synthetic** images of 3 classes" in text
    assert "the exemplars' licence: not stated" in text
    assert "The smallest distance to an exemplar here is" in text


def test_datasets_loads_it_with_labels_by_its_card_and_as_an_imagefolder(run, tmp_path):
    for arguments in ((str(run),), ("imagefolder", None, str(run))):
        loaded = datasets.load_dataset(*arguments, split="train", cache_dir=str(tmp_path))
        assert len(loaded) == 36
        labels = loaded.features["label"]
        names = [labels.int2str(label) if hasattr(labels, "int2str") else label for label in loaded["label"]]
        assert {name: names.count(name) for name in names} == {"3": 12, "5": 12, "8": 12}
        assert loaded[0]["image"].size == (8, 8)


def test_classes_called_train_and_test_are_classes(run, tmp_path):
    there = tmp_path / "out"
    shutil.copytree(run, there)
    for old, new in (("3", "train"), ("5", "test")):
        (there / "images" / old).rename(there / "images" / new)
    metadata = there / "images" / "metadata.jsonl"
    text = metadata.read_text().replace('"3', '"train').replace('"5', '"test')
    metadata.write_text(text)
    (there / CARD).write_text(card(there, gather(there).recipe, {"train": 12, "test": 12, "8": 12}, []))
    loaded = datasets.load_dataset(str(there), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    labels = list(loaded["train"]["label"])
    assert {name: labels.count(name) for name in labels} == {"8": 12, "test": 12, "train": 12}


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_datasets_loads_shards_by_their_card(kind, tmp_path):
    there = digits_run(tmp_path / "out", None, guidance=[], output={"format": kind})
    loaded = datasets.load_dataset(str(there), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 36


def test_a_report_puts_what_was_measured_into_the_card_but_leaves_the_users_own_text(run):
    keep(run, "evaluation", "a", evaluation())
    report([run])
    text = (run / CARD).read_text()
    assert "| f1 | 0.788 |" in text
    own = text.replace(MARK, "Mine.")
    (run / CARD).write_text(own)
    report([run])
    assert (run / CARD).read_text() == own
    assert len(pq.read_table(run / "manifest.parquet")) == 36
