"""report.html: one page with everything inside, whatever the run, its names and its size."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.reports import CLASSES, digits_run, evaluation, reported_run
from typer.testing import CliRunner

from handful.cli import app
from handful.data.images import write_png
from handful.errors import Note, RequestError
from handful.report.gather import gather
from handful.report.html import page, report
from handful.runs.kept import keep


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return reported_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(run) -> str:
    return report([run]).read_text()


class Parsed(HTMLParser):
    """Tags that are open at the end, addresses that a browser would ask for, and elements that scripts could come from."""

    VOID = ("meta", "link", "br", "img", "input", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def test_the_page_is_whole_and_names_no_address_outside_itself(html):
    parsed = Parsed(html)
    assert parsed.open == []
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert not re.search(
        r"https?://|url\(|@import", re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    )
    assert len(html) < 12_000_000


def test_it_says_what_was_asked_what_was_found_and_what_it_cost(html):
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    for said in (
        "36 images of 3 classes from the model digits, guided by chamfer at scale 0.2, with 4 exemplars per class",
        "F1 is 0.788, that of plain 0.688: a real gain",
        "Fair: they lack some of the variety (coverage 0.700; real images 0.920), and 12.5 % of them may be copies",
        "coverage share of the real images that have a generated one beside them",
        "12.5 % of all images count as copies",
        "a classifier is right on",
        "operations per image",
        "real against real",
        "/recipe.yaml --out again",
    ):
        assert said in text, said


def test_the_recipe_on_the_page_is_the_runs(run, html):
    shown = re.search(r'<pre id="recipe" tabindex="0">(.*?)</pre>', html, re.S).group(1)
    stored = yaml.safe_load((run / "recipe.yaml").read_text())
    del stored["provenance"]
    import html as escaping

    assert yaml.safe_load(escaping.unescape(shown)) == stored


def test_images_stand_beside_the_baselines_of_the_same_noise_and_their_nearest_exemplar(run, html):
    data = data_of(html)
    assert data["classes"] == list(CLASSES)
    assert data["runs"] == [["out", True], ["plain", True]]
    manifest = {row["file"]: row for row in gather(run).rows}
    for cls, number, index, picture, file, nearest, distance, exemplar, is_copy in data["images"]:
        assert file == f"images/{CLASSES[cls]}/{index:06d}.png"
        assert data["pictures"][picture].startswith("data:image/png;base64,")
        assert not is_copy
        if number == 0:
            assert (nearest, distance) == (manifest[file]["nearest_exemplar"], manifest[file]["nearest_exemplar_distance"])
            assert exemplar >= 0
        else:
            assert (nearest, distance, exemplar) == (None, None, -1)
    assert [[len(of) for of in runs] for runs in data["strips"]] == [[12, 12]] * 3
    for cls, (own, plain) in enumerate(data["strips"]):  # above each other: the same class and number
        pairs = [(data["images"][one], data["images"][two]) for one, two in zip(own, plain, strict=True)]
        assert all(one[0] == two[0] == cls and one[2] == two[2] for one, two in pairs)
    distances = [data["images"][place][6] for place in data["copies"]]
    assert distances == sorted(row["nearest_exemplar_distance"] for row in manifest.values())[:48]
    assert [len(of) for of in data["exemplars"]] == [4, 4, 4]


def test_without_a_baseline_the_verdict_gives_quality_and_coverage_beside_real_images(run, tmp_path):
    there = copied(run, tmp_path / "run")
    found = evaluation()
    found["result"] |= {"gains": {}, "copied": None}
    keep(there, "evaluation", "z", found)
    html = report([there]).read_text()
    assert "precision 0.900; real images 0.950" in html
    assert "coverage 0.700; real images 0.920" in html
    assert "/recipe.yaml --guidance none --out plain" in html
    assert '<th scope="row">copied' not in html  # what was not measured has no row


def test_what_counts_as_a_copy_is_marked_and_comes_first(run, tmp_path):
    there = copied(run, tmp_path / "run")
    far = sorted(gather(there).rows, key=lambda row: row["nearest_exemplar_distance"])[-1]["file"]
    found = evaluation()
    found["result"]["copies"] = [far]
    keep(there, "evaluation", "z", found)
    data = data_of(report([there]).read_text())
    marked = [image[4] for image in data["images"] if image[8]]
    assert marked == [far]
    assert data["images"][data["copies"][0]][4] == far
    distances = [data["images"][place][6] for place in data["copies"][1:]]
    assert distances == sorted(distances)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def rewritten(run: Path, **changed) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changed}))


def test_other_noise_is_said(run, tmp_path):
    other = digits_run(tmp_path / "other", None, guidance=[], seed=1)
    assert data_of(page([gather(run), gather(other)]))["runs"][1] == ["other", False]


def test_names_full_of_html_are_text(run, tmp_path):
    evil = '<img src=x onerror=alert(1)></script><script>alert("2")'
    there = copied(run, tmp_path / "<b>&")
    rows = pq.read_table(there / "manifest.parquet").to_pylist()
    for row in rows:
        row["class"] = evil if row["class"] == "3" else row["class"]
        row["nearest_exemplar"] = evil
    pq.write_table(pa.Table.from_pylist(rows), there / "manifest.parquet")
    found = evaluation(baseline=evil)
    found["result"]["per_class"][evil] = found["result"]["per_class"].pop("3")
    keep(there, "evaluation", "z", found)
    html = report([there]).read_text()
    parsed = Parsed(html)
    assert parsed.tags.count("script") == 2
    assert "x" not in parsed.addresses
    assert evil in data_of(html)["classes"]


def test_an_unfinished_run_is_shown_as_far_as_it_is(run, tmp_path):
    there = copied(run, tmp_path / "run")
    (there / "manifest.parquet").unlink()
    next((there / ".handful" / "cohorts").glob("*.parquet")).unlink()
    with pytest.warns(Note, match="This run is unfinished: it has 24 of 36 images"):
        html = report([there]).read_text()
    assert "This run is unfinished: it has 24 of 36 images. It has no image of 3." in html
    again = f"The run has 24 images now, and was judged with 36: repeat handful evaluate {there} --judge digits-judge."
    assert again in html
    assert len(data_of(html)["classes"]) == 2


def test_gone_exemplars_and_damaged_images_are_said_and_the_rest_is_shown(run, tmp_path):
    there = copied(run, tmp_path / "run")
    rewritten(there, exemplars={"path": str(tmp_path / "gone"), "per_class": 4, "seed": 0})
    (there / "images" / "3" / "000000.png").write_bytes(b"no picture")
    html = report([there]).read_text()
    assert f"The exemplars are missing: there is no folder {tmp_path / 'gone'}." in html
    assert "Missing or damaged: 1 image file;" in html
    assert data_of(html)["exemplars"] == [[], [], []]


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "foreign", "recipe of another", "nothing made", "damaged"])
def test_what_is_no_run_is_refused_by_name(run, tmp_path, kind):
    there = tmp_path / "x"
    problem = {"missing": "there is no such directory", "file": "this is a file", "empty": "the directory is empty"}.get(
        kind, ""
    )
    if kind == "file":
        there.write_text("")
    elif kind != "missing":
        there.mkdir()
    if kind == "foreign":
        (there / "notes.txt").write_text("")
        problem = "it holds no run of handful"
    elif kind == "recipe of another":
        (there / "recipe.yaml").write_text("model: {name: digits}\n")
        problem = "it was not written by a run of handful"
    elif kind in ("nothing made", "damaged"):
        shutil.copy(run / "recipe.yaml", there)
        problem = "nothing has been generated"
        if kind == "damaged":
            (there / "manifest.parquet").write_text("?")
            problem = "it is damaged"
    with pytest.raises(RequestError, match=problem):
        report([there])


def test_a_read_only_place_is_refused_before_the_work_and_another_file_is_taken(run, tmp_path, monkeypatch):
    monkeypatch.setattr("handful.report.html.os.access", lambda path, mode: Path(path) == tmp_path)
    with pytest.raises(RequestError, match=r"can't be written there\. Choose another file with --out"):
        report([run])
    assert report([run], tmp_path / "page.html").stat().st_size > 10_000


def made_up(root: Path, run: Path, classes: int, per_class: int, side: int) -> Path:
    """A run directory of noisy pictures, all links to a few files: as large as asked."""
    root.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(4):
        write_png(root / f"{number}.png", torch.rand(3, side, side, generator=draw) * 2 - 1)
    rows = []
    for place in range(classes):
        name = f"class {place:04d}"
        (root / "images" / name).mkdir(parents=True)
        for index in range(per_class):
            file = f"images/{name}/{index:06d}.png"
            if index < 4:
                (root / file).symlink_to(root / f"{(place + index) % 4}.png")
            rows.append({"file": file, "class": name, "index": index, "seed": index, "status": "done"})
    for row in rows:
        row |= {"nearest_exemplar": None, "nearest_exemplar_distance": None}
    pq.write_table(pa.Table.from_pylist(rows), root / "manifest.parquet")
    shutil.copy(run / "recipe.yaml", root)
    rewritten(root, classes=[f"class {place:04d}" for place in range(classes)], per_class=per_class, exemplars={"path": None})
    return root


@pytest.mark.slow
def test_a_thousand_classes_and_a_hundred_thousand_images_stay_below_12_mb_and_what_is_left_out_is_said(run, tmp_path):
    there = made_up(tmp_path / "large", run, 1000, 100, 64)
    found = evaluation()
    one = found["result"]["per_class"]["3"]
    found["result"]["per_class"] = {f"class {place:04d}": one for place in range(1000)}
    keep(there, "evaluation", "a", found)
    file = report([there])
    assert file.stat().st_size < 12_000_000
    data = data_of(file.read_text())
    assert {image[0] for image in data["images"]} == set(range(1000))  # each class shows something
    text = file.read_text()
    assert re.search(r"[\d,]+ of 100,000 images are shown", text)
    assert "Not shown: 800 better classes." in text


def test_the_command_says_where_the_page_is(run, tmp_path):
    there = tmp_path / "x.html"
    found = CliRunner().invoke(app, ["report", str(run), "--out", str(there), "--json"])
    assert json.loads(found.stdout) == {"report": str(there), "bytes": there.stat().st_size}
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert isinstance(refused.exception, RequestError)
