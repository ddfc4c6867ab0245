"""The same labelled images in a folder, parquet, tar, zip and CSV give the same pixels, labels and classes."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handful.data.exemplars import Exemplars, default_cache
from handful.data.images import image_folder
from handful.data.sources import labelled_files, read_labelled
from handful.data.targets import read_targets, target_files
from handful.errors import RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for place in range(3):
            pixels = np.full((4, 4, 3), 40 * number + 7 * place, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{place}.png")
    return root


def as_pairs(source: Path) -> list[tuple[str, int]]:
    found, classes = read_labelled(source, channels=3)
    assert classes == ["cat", "dog"]
    return sorted(
        (label, int((image[0, 0, 0] + 1) * 127.5 + 0.5)) for label, image in zip(found.labels, found.images, strict=True)
    )


def test_every_container_gives_the_folders_images(folder: Path, tmp_path: Path):
    import datasets
    import webdataset

    wanted = as_pairs(folder)
    assert wanted == [("cat", 0), ("cat", 7), ("cat", 14), ("dog", 40), ("dog", 47), ("dog", 54)]
    files = sorted(folder.rglob("*.png"))

    datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "hf"))["train"].to_parquet(
        str(tmp_path / "hub.parquet")
    )
    assert as_pairs(tmp_path / "hub.parquet") == wanted

    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "shards" / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:04d}", "png": file.read_bytes(), "json": {"label": file.parent.name}})
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert as_pairs(tmp_path / "shards") == wanted

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, tarfile.open(tmp_path / "a.tar", "w") as tape:
        archive.writestr("__MACOSX/photos/cat/._0.png", b"no image")
        for file in files:
            archive.write(file, f"photos/{file.parent.name}/{file.name}")
            tape.add(file, f"{file.parent.name}/{file.name}")
    assert as_pairs(tmp_path / "a.zip") == as_pairs(tmp_path / "a.tar") == wanted

    rows = [f"{os.path.relpath(file, tmp_path)},{file.parent.name}\n" for file in files]
    (tmp_path / "a.csv").write_text("file,label\n" + "".join(rows))
    assert as_pairs(tmp_path / "a.csv") == wanted

    drawn = [Exemplars.from_folder(source, channels=3, size=(4, 4), k=2) for source in (folder, tmp_path / "a.zip")]
    assert drawn[0].digest == drawn[1].digest, "the same draw, whatever holds the images"
    chosen = labelled_files(tmp_path / "a.zip", classes=["dog"])
    assert chosen.counts == {"dog": 3}
    assert chosen.first(2).counts == {"dog": 2}


def test_an_archive_is_never_unpacked_and_a_bad_one_is_refused(folder: Path, tmp_path: Path):
    picture = (folder / "cat/0.png").read_bytes()
    with tarfile.open(tmp_path / "evil.tar", "w") as tape:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "dog/0.png")
        tape.addfile(link)
        for name in ("../../cat/out.png", "/cat/abs.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tape.addfile(info, io.BytesIO(picture))
    before = sorted(tmp_path.parent.rglob("*"))
    listed = labelled_files(tmp_path / "evil.tar")
    assert len(listed.read(channels=3)) == 2, "read where they lie; the link is none"
    assert sorted(tmp_path.parent.rglob("*")) == before
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4cut")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    for name, told in (("cut.zip", "not a complete zip"), ("no.csv", "columns are a, b"), ("none.zip", "no such file")):
        with pytest.raises(RequestError, match=told):
            labelled_files(tmp_path / name)


def test_what_lies_in_a_folder_and_is_no_image_of_a_class_is_counted_aloud(folder: Path, tmp_path: Path):
    picture = (folder / "cat/0.png").read_bytes()
    for place in range(8):
        for name in (f"cat/{place}.png", f"cat/more/{place}.png", f"{place}.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(picture)
    (tmp_path / "cat/a.npy").write_bytes(b"x")
    (tmp_path / "cat/b.raw").write_bytes(b"x")
    listed = labelled_files(tmp_path)
    assert listed.counts == {"cat": 8}
    told = " ".join(listed.notes)
    for part in ("left out: 8 images in", "inside a class", "no class folder", "2 files", "1 with .npy, 1 with .raw"):
        assert part in told
    assert any("inside a class" in text for text in Exemplars.from_folder(tmp_path, channels=3, size=(4, 4)).warnings)
    files = target_files(tmp_path / "cat")
    assert "left out: 8 images in the folder" in read_targets(files, tmp_path, (3, 4, 4))[2][0]


def test_images_alone_are_one_class_where_that_is_allowed(folder: Path):
    assert labelled_files(folder / "cat", flat=True).counts == {"images": 3}
    with pytest.raises(RequestError, match="not in class folders"):
        labelled_files(folder / "cat")


def test_a_class_folder_whose_name_is_not_utf8_is_refused_at_once(folder: Path, tmp_path: Path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    with open(odd + b"/0.png", "wb") as stream:
        stream.write((folder / "cat/0.png").read_bytes())
    with pytest.raises(RequestError, match=r"caf\\xe9.*not UTF-8"):
        image_folder(tmp_path)


def test_a_file_whose_name_is_not_utf8_is_called_by_its_escaped_name(folder: Path, tmp_path: Path):
    (tmp_path / "cat").mkdir()
    for name in (b"\xe9.png", b"a.png"):
        with open(os.fsencode(tmp_path) + b"/cat/" + name, "wb") as stream:
            stream.write((folder / "cat/0.png").read_bytes())
    drawn = Exemplars.from_folder(tmp_path, channels=3, size=(4, 4))
    assert sorted(drawn.called("cat")) == ["\\xe9.png", "a.png"]
    json.dumps(drawn.called("cat")).encode()


def test_without_a_home_the_cache_lies_among_temporary_files(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HANDFUL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache().is_absolute()
