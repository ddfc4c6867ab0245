"""What is written reads back exactly and atomically; how folders of classes are listed, read and refused."""

import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import COLOURS, GRAYS, as_image, save

from handful.data import images as images_module
from handful.data.images import (
    from_uint8,
    image_folder,
    list_images,
    open_file,
    read_folder,
    read_image,
    to_uint8,
    write_atomically,
    write_png,
)
from handful.errors import RequestError, RunError


@pytest.fixture
def unprivileged():
    """A folder in which this process is an ordinary user; permissions do not bind root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o777)


# --- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_survives_writing_and_reading(tmp_path, dtype):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    for image in (every, torch.cat([every, every.flip(1), every.flip(2)])):
        path = tmp_path / "a.png"
        write_png(path, from_uint8(image).to(dtype))
        assert torch.equal(read_image(path, channels=len(image)), from_uint8(image))
    assert torch.equal(to_uint8(from_uint8(every)), every)


def test_bytes_are_rounded_to_the_nearest_and_clamped():
    values = torch.tensor([-3.0, -1.0, 1.0, 3.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
    assert to_uint8(values).tolist() == [0, 0, 255, 255, 100, 101]
    assert to_uint8(torch.tensor([1.0], dtype=torch.bfloat16)).item() == 255
    assert to_uint8(torch.zeros(2, 3, 4, 5, requires_grad=True)).shape == (2, 3, 4, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_and_nothing_is_written(tmp_path, bad):
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = bad
    with pytest.raises(RunError, match="NaN or infinite"):
        write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (1, 3, 4, 4), (3, 0, 4)])
def test_what_is_no_image_tensor_is_not_written(tmp_path, shape):
    with pytest.raises(RequestError, match="not an image"):
        write_png(tmp_path / "a.png", torch.zeros(shape))


def test_bytes_where_floats_belong_are_refused_and_the_reverse():
    with pytest.raises(RequestError, match="from_uint8"):
        to_uint8(torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(RequestError, match="uint8"):
        from_uint8(torch.zeros(3, 2, 2))


def test_the_same_image_gives_the_same_bytes_whatever_its_memory_layout(tmp_path):
    image = as_image(COLOURS)
    write_png(tmp_path / "a.png", image)
    write_png(tmp_path / "b.png", image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"tIME" not in (tmp_path / "a.png").read_bytes()


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_png(path, as_image(COLOURS))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_png(path, -as_image(COLOURS))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_at_the_rename_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(images_module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_read_only_or_missing_folder_passes_the_systems_error_on(unprivileged):
    unprivileged.joinpath("inner").mkdir()
    unprivileged.joinpath("inner").chmod(0o555)
    with pytest.raises(PermissionError):
        write_png(unprivileged / "inner" / "a.png", as_image(COLOURS))
    with pytest.raises(FileNotFoundError):
        write_png(unprivileged / "none" / "a.png", as_image(COLOURS))
    assert not list((unprivileged / "inner").iterdir())


def test_a_written_file_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_png(tmp_path / "a.png", as_image(COLOURS))
    finally:
        os.umask(old)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


# --- folders -----------------------------------------------------------------------------------------------------------


def test_listing_takes_images_in_natural_order_and_leaves_the_rest(tmp_path):
    kept = ["1.png", "2.JPG", "10.jpeg", "b.TIFF", "c.heic"]
    others = ["metadata.jsonl", "metadata.png", "Thumbs.db", ".DS_Store", ".hidden.png", "._1.png", "notes.txt", "png"]
    for name in kept + others:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "3.png").touch()
    (tmp_path / "d broken link.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in list_images(tmp_path)] == [*kept, "d broken link.png"]


@pytest.fixture
def animals(tmp_path) -> Path:
    root = tmp_path / "real images"
    for shade, name in enumerate(["10", "2", "cat", "Übung 1"]):
        for index in (1, 2, 10):
            save(root / name / f"{index}.png", np.full((4, 6), 50 * shade + index, np.uint8))
    return root


def test_classes_and_files_come_in_natural_order(animals):
    by_class = image_folder(animals)
    assert list(by_class) == ["2", "10", "cat", "Übung 1"]
    assert [path.name for path in by_class["cat"]] == ["1.png", "2.png", "10.png"]
    assert image_folder(str(animals)) == by_class
    assert list(image_folder(animals, classes=["cat", "2"])) == ["cat", "2"]


def test_hidden_folders_junk_and_links_to_above_are_no_classes(animals):
    for name in (".git", "__MACOSX"):
        save(animals / name / "a.png", GRAYS)
    (animals / "loop").symlink_to(animals)
    (animals / "up").symlink_to(animals.parent)
    (animals / "self").symlink_to(animals / "self")
    (animals / "cat" / "loop").symlink_to(animals)
    (animals / "linked").symlink_to(animals / "cat")  # an ordinary link is an ordinary class
    (animals / "contact_sheet.png").touch()
    by_class = image_folder(animals)
    assert list(by_class) == ["2", "10", "cat", "linked", "Übung 1"]
    assert len(by_class["linked"]) == 3


def test_a_run_directory_gives_its_images(animals):
    run = animals.parent / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    animals.rename(run / "images")
    assert image_folder(run)["cat"][0] == run / "images" / "cat" / "1.png"


def test_home_is_understood(animals, monkeypatch):
    monkeypatch.setenv("HOME", str(animals.parent))
    assert image_folder("~/real images") == image_folder(animals)


def test_unusable_folders_are_refused_with_their_remedy(tmp_path, animals):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "flat" / "a.png", GRAYS)
    save(tmp_path / "nested" / "train" / "cat" / "a.png", GRAYS)
    (tmp_path / "texts" / "cat").mkdir(parents=True)
    (tmp_path / "texts" / "cat" / "a.txt").touch()
    cases = {
        "none": "no such folder",
        "flat/a.png": "this is a file",
        "empty": "the folder is empty. Put 2 or more images of each class into a folder per class",
        "flat": r"its images \(1\) are not in class folders. Put .* into a folder per class",
        "nested": f"no image in class 'train'. If its folders are the classes, give '{tmp_path}/nested/train'",
        "texts": "no image in class 'cat'",
    }
    for name, said in cases.items():
        with pytest.raises(RequestError, match=f"^real: '{re.escape(str(tmp_path))}/{name}': .*{said}"):
            image_folder(tmp_path / name, field="real")
    (animals / "nothing").mkdir()
    with pytest.raises(RequestError, match="no image in class 'nothing'"):
        image_folder(animals)
    assert list(image_folder(animals, classes=["cat"])) == ["cat"]  # not asked for, not in the way
    with pytest.raises(RequestError, match=r"no folder for class 'dog'.*holds '2', '10', 'cat'"):
        image_folder(animals, classes=["cat", "dog"])


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_a_folder_reads_in_order_whatever_the_workers(animals, workers):
    read = read_folder(animals, channels=1, workers=workers)
    assert read.labels == ["2"] * 3 + ["10"] * 3 + ["cat"] * 3 + ["Übung 1"] * 3
    assert read.classes == ["2", "10", "cat", "Übung 1"]
    assert len(read) == len(read.files) == 12
    values = [51, 52, 60, 1, 2, 10, 101, 102, 110, 151, 152, 160]
    assert torch.equal(read.images, torch.stack([as_image(np.full((4, 6), value)) for value in values]))
    for file, image in zip(read.files, read.images, strict=True):
        assert torch.equal(read_image(file, channels=1), image)


def test_a_folder_reads_only_so_many_of_the_classes_asked_for(animals):
    read = read_folder(animals, channels=3, size=(2, 2), classes=["cat", "10"], limit=2)
    assert read.images.shape == (4, 3, 2, 2)
    assert [f"{file.parent.name}/{file.name}" for file in read.files] == ["cat/1.png", "cat/2.png", "10/1.png", "10/2.png"]
    with pytest.raises(RequestError, match="limit: 0"):
        read_folder(animals, channels=1, limit=0)


@pytest.mark.parametrize("size", [None, (8, 8)])
def test_all_unreadable_files_are_reported_at_once(animals, size):
    for index in range(7):
        (animals / "2" / f"0bad{index}.png").write_text("no")
    (animals / "cat" / "zero.png").touch()
    with pytest.raises(RequestError) as caught:
        read_folder(animals, channels=1, size=size, field="real")
    said = str(caught.value)
    assert said.startswith(f"real: '{animals}': 8 of 20 images cannot be used: ")
    assert [index for index in range(7) if f"0bad{index}.png" in said] == [0, 1, 2, 3, 4]
    assert "and 3 more" in said
    assert said.count("Save it as PNG or JPEG.") == 1


def test_unequal_sizes_are_reported_and_a_size_makes_them_equal(animals):
    save(animals / "cat" / "wide.png", np.zeros((4, 9), np.uint8))
    with pytest.raises(RequestError, match=r"wide\.png.*4 x 9 pixels, but others have 4 x 6.*Give `size`"):
        read_folder(animals, channels=1)
    assert read_folder(animals, channels=1, size=(4, 4)).images.shape == (13, 1, 4, 4)


def test_an_unreadable_file_and_folder_are_refused(unprivileged):
    path = save(unprivileged / "c" / "a.png", COLOURS)
    path.chmod(0)
    with pytest.raises(RequestError, match=r"a\.png.*may not read"):
        read_image(path, channels=3)
    path.parent.chmod(0)
    with pytest.raises(RequestError, match="may not read this"):
        image_folder(unprivileged)


def test_a_folders_images_by_class_are_its_own_in_order(tmp_path):
    for name, count in (("b", 2), ("a", 3)):
        for index in range(count):
            save(tmp_path / name / f"{index}.png", COLOURS + np.uint8(index))
    found = read_folder(tmp_path, channels=3)
    parts = found.by_class()
    assert list(parts) == found.classes == ["a", "b"]
    torch.testing.assert_close(torch.cat(list(parts.values())), found.images, rtol=0, atol=0)


def test_a_pipe_or_device_is_never_replaced_by_a_file_and_a_circle_of_links_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="this is not a regular file"):
        write_atomically(tmp_path / "pipe", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(RequestError, match="it can't be opened"):
        open_file(tmp_path / "a.png")
