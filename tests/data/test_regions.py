"""GeoDE and DollarStreet as published: small sets in exactly their layouts, as exemplars, real images, prompts and groups."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handful.data.exemplars import Exemplars
from handful.data.sources import absolute_source, labelled_files, split_source
from handful.errors import RequestError
from handful.judge.evaluate import evaluate

REGIONS = ("Africa", "Americas", "EastAsia", "Europe", "SouthEastAsia", "WestAsia")
COUNTRIES = ("Nigeria", "Mexico", "Japan", "Italy", "Thailand", "Turkey")
IN_WORDS = ("Africa", "the Americas", "East Asia", "Europe", "Southeast Asia", "West Asia")


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, quality=95)


def write_csv(file: Path, rows: list[dict[str, object]], encoding: str = "utf-8") -> None:
    with file.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def geode(tmp_path_factory) -> Path:
    """Five images of `bag` and of `hand_soap` in each of the six regions, two of `dog`, in GeoDE's layout."""
    root, rows, number = tmp_path_factory.mktemp("GeoDE"), [], 0
    for name, count in (("bag", 5), ("hand_soap", 5), ("dog", 2)):
        for region, country in zip(REGIONS, COUNTRIES, strict=True):
            for _ in range(count):
                file = f"{region}_{country}_{country}_{name}_{number}.jpg"
                picture(root / "images" / file, number)
                rows.append({"": number, "file_path": file, "object": name, "region": region, "ip_country": country})
                number += 1
    write_csv(root / "index.csv", rows)
    return root


@pytest.fixture(scope="module")
def dollarstreet(tmp_path_factory) -> Path:
    """The layout of DollarStreet's release: ids for names, lists of topics, two-letter regions, incomes."""
    root, rows = tmp_path_factory.mktemp("DS") / "dataset_dollarstreet", []
    topics = ("['Stove/hob']", "['Hand soap', 'Kitchen sinks']")
    for number in range(16):
        name = f"{number:024x}"
        picture(root / "assets" / name / f"{name}.jpg", number)
        rows.append(
            {
                "id": name,
                "country.name": "Côte d'Ivoire",
                "country.id": "ci",
                "region.id": ("af", "am", "as", "eu")[number % 4],
                "type": "image",
                "imageRelPath": f"assets/{name}/{name}.jpg",
                "topics": topics[number // 8],
                "place": "x",
                "income": 100.5,
                "imagenet_synonyms": "[]",
                "imagenet_sysnet_id": "[]",
            }
        )
    write_csv(root / "images_v2.csv", rows)
    return root.parent


def test_geodes_classes_are_its_prompts_and_its_groups_the_regions(geode):
    found = labelled_files(f"geode:{geode}")
    assert len(found) == 72
    assert len(found.classes) == 18
    assert found.counts["hand soap in Southeast Asia"] == 5
    assert found.prompts == {name: name for name in found.classes}
    for name, label, region, thing in zip(
        found.names, found.labels, found.columns["region"], found.columns["object"], strict=True
    ):
        assert label == f"{thing} in {region}"
        assert Path(name).name.startswith(REGIONS[IN_WORDS.index(region)])
    assert found.only([3, 70]).columns["region"] == [found.columns["region"][3], found.columns["region"][70]]
    assert (geode / "images" / Path(found.names[7]).name).read_bytes() == found.content(7)


def test_exemplars_are_drawn_of_it_by_k(geode):
    drawn = Exemplars.from_folder(f"geode:{geode}", channels=3, size=(8, 8), k=2)
    assert set(drawn.counts.values()) == {2}
    assert len(drawn.classes) == 18
    again = Exemplars.from_folder(f"geode:{geode}@5", channels=3, size=(8, 8), k=2)
    assert again.hashes == {name: drawn.hashes[name] for name in again.classes}


def test_the_balanced_protocol_takes_objects_that_every_region_has_enough_of(geode):
    found = labelled_files(f"geode:{geode}@4")
    assert set(found.columns["object"]) == {"bag", "hand soap"}
    assert Counter(found.labels) == Counter(dict.fromkeys(found.classes, 4))
    assert len(found.classes) == 12
    assert found.names == labelled_files(f"geode:{geode}@4").names
    assert set(found.names) > set(labelled_files(f"geode:{geode}@3").names)
    with pytest.raises(RequestError, match=r"no object of GeoDE has 6 images in each of 6 regions; the most is 5.*@5"):
        labelled_files(f"geode:{geode}@6")


def test_dollarstreets_topics_and_regions_are_read(dollarstreet):
    for root in (dollarstreet, dollarstreet / "dataset_dollarstreet"):
        found = labelled_files(f"dollarstreet:{root}")
        assert len(found) == 24  # an image of two topics is one of each
        assert set(found.columns["region"]) == {"Africa", "the Americas", "Asia", "Europe"}
        assert found.counts["hand soap in Asia"] == found.counts["kitchen sinks in Asia"] == 2
        assert found.prompts["stove_hob in the Americas"] == "stove/hob in the Americas"


@pytest.mark.filterwarnings("ignore")
def test_as_real_images_k_is_3_and_groups_are_the_regions(geode, tmp_path):
    for number, (name, place) in enumerate([(f"bag in {region}", at) for region in IN_WORDS for at in range(6)]):
        # the worst region: one picture again and again
        picture(
            tmp_path / "made" / name / f"{place}.png", 1000 if name.endswith("East Asia") and "South" not in name else number
        )
    found = evaluate(tmp_path / "made", f"geode:{geode}", "pixels", audit=False, ceiling=False)
    assert found.summary.k == 3
    assert found.groups is not None
    assert set(found.groups.per_group) == set(IN_WORDS)
    assert all(scores.n_real == 5 and scores.n_generated == 6 for scores in found.groups.per_group.values())
    assert found.groups.worst["vendi"] == "East Asia"
    other = evaluate(tmp_path / "made", f"geode:{geode}", "pixels", neighbours=4, groups="(.*) in .*", audit=False)
    assert other.summary.k == 4
    assert other.groups is not None
    assert list(other.groups.per_group) == ["bag"]


def test_a_source_is_split_and_anchored(tmp_path):
    (tmp_path / "odd@7").mkdir()
    assert split_source("geode:/data/GeoDE@180") == ("geode", Path("/data/GeoDE"), 180)
    assert split_source(f"geode:{tmp_path}/odd@7") == ("geode", tmp_path / "odd@7", None)
    assert split_source("photos") == ("", Path("photos"), None)
    assert split_source("C:photos") == ("", Path("C:photos"), None)
    assert absolute_source("geode:GeoDE@180", Path("/data")) == "geode:/data/GeoDE@180"
    assert absolute_source("../photos", Path("/data/runs")) == "/data/photos"
    for wrong in ("geode:/data@x", "geode:/data@0", "dollarstreet:/data@"):
        with pytest.raises(RequestError, match="no number of images"):
            split_source(wrong)


def broken(root: Path, **change: object) -> str:
    rows: list[dict[str, object]] = [{"file_path": f"{at}.jpg", "object": "bag", "region": "Africa"} for at in range(3)]
    for at in range(2):
        picture(root / "images" / f"{at}.jpg", at)
    write_csv(root / "index.csv", [{**row, **change} for row in rows])
    return f"geode:{root}"


def test_what_is_wrong_with_an_index_is_told_before_any_work(tmp_path, dollarstreet):
    dead = broken(tmp_path / "dead")
    with pytest.raises(RequestError, match=r"real: .*index.csv': it names images that are missing: 1 of 3, first '2.jpg'"):
        evaluate(tmp_path / "dead", dead, "pixels")
    with pytest.raises(RequestError, match=r"exemplars: .*that are missing: 1 of 3.*Unpack GeoDE's images beside it"):
        Exemplars.from_folder(dead, channels=3, size=(8, 8))
    picture(tmp_path / "dead" / "images" / "2.jpg", 2)
    assert len(labelled_files(dead)) == 3

    write_csv(tmp_path / "dead" / "index.csv", [{"file_path": "0.jpg", "object": "Süßes", "region": "Europe"}], "cp1252")
    with pytest.raises(RequestError, match=r"it is not UTF-8 \(byte 0xfc\).*iconv -f CP1252"):
        labelled_files(dead)
    write_csv(tmp_path / "dead" / "index.csv", [{"file_path": "0.jpg", "object": "bag", "region": "Europe"}], "utf-16")
    with pytest.raises(RequestError, match="it is not UTF-8"):
        labelled_files(dead)
    write_csv(tmp_path / "dead" / "index.csv", [{"file_path": "0.jpg", "script_name": "bag", "region": "Europe"}])
    with pytest.raises(RequestError, match=r"lacks the column 'object'; it has file_path, script_name, region"):
        labelled_files(dead)
    with pytest.raises(RequestError, match=r"line 2 lacks its path, its object or its region"):
        labelled_files(broken(tmp_path / "blank", object=""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"it holds no images_v2.csv or images.csv"):
        labelled_files(f"dollarstreet:{tmp_path / 'empty'}")
    with pytest.raises(RequestError, match="there is no such folder"):
        labelled_files("geode:/no/such/folder")
    with pytest.raises(RequestError, match=r"it holds no index.csv.*GeoDE's index.csv"):
        labelled_files(f"geode:{dollarstreet}")
