"""The real images' two halves, and what may not be among them."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.sweeps import digits_sweep

from handful.data.images import read_image, write_png
from handful.errors import RequestError
from handful.sweep.real import look_into, read_real, refuse_shared, split_places


def folder(root, counts):
    """Blank images, a class for each name; distinct by their first pixels."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for place in range(count):
            image = torch.full((1, 4, 4), -1.0)
            image[0, 0, 0], image[0, 0, 1] = place / 64, len(name) / 64
            write_png(root / name / f"{place}.png", image)
    return look_into(str(root), None, "real")


def test_every_real_image_is_in_one_half(tmp_path):
    halves = split_places(folder(tmp_path, {"a": 10, "b": 7}), 0.3, 2)
    assert {name: len(places) for name, places in halves["validation"].items()} == {"a": 3, "b": 2}
    for name, count in (("a", 10), ("b", 7)):
        assert sorted(halves["validation"][name] + halves["test"][name]) == list(range(count))


def test_a_class_is_split_alike_whatever_the_others(tmp_path):
    one, two = folder(tmp_path / "one", {"a": 10}), folder(tmp_path / "two", {"a": 10, "b": 5})
    assert split_places(one, 0.5, 1)["test"]["a"] == split_places(two, 0.5, 1)["test"]["a"]


def test_both_halves_have_an_image_of_each_class_even_of_two(tmp_path):
    halves = split_places(folder(tmp_path, {"a": 2, "b": 9}), 0.9, 1)
    assert len(halves["validation"]["a"]) == len(halves["test"]["a"]) == 1


@pytest.mark.parametrize(("counts", "said"), [({"a": 1, "b": 9}, "one image"), ({"a": 4}, "half has 2 images")])
def test_too_few_real_images_are_refused(tmp_path, counts, said):
    with pytest.raises(RequestError, match=said):
        split_places(folder(tmp_path, counts), 0.5, 3)


def test_real_images_that_are_exemplars_are_refused_and_a_few_are_told(tmp_path):
    real = folder(tmp_path / "real", {"a": 30})
    pool = folder(tmp_path / "pool", {"other": 3})
    assert refuse_shared(real, pool) == []
    shutil.copy(tmp_path / "real/a/0.png", tmp_path / "pool/other/copy.png")
    assert refuse_shared(real, look_into(str(tmp_path / "pool"), None, "pool")) == [
        "1 of the real images are also in the exemplars' folder"
    ]
    for place in (1, 2):
        shutil.copy(tmp_path / f"real/a/{place}.png", tmp_path / f"pool/other/copy-{place}.png")
    with pytest.raises(RequestError, match="3 of its 30 images are also among the exemplars"):
        refuse_shared(real, look_into(str(tmp_path / "pool"), None, "pool"))


def test_the_digest_is_of_names_and_contents_and_of_no_path(tmp_path):
    digest = folder(tmp_path / "one", {"a": 3}).digest
    assert folder(tmp_path / "two", {"a": 3}).digest == digest
    write_png(tmp_path / "two/a/0.png", torch.zeros(1, 4, 4))
    assert look_into(str(tmp_path / "two"), None, "real").digest != digest
    (tmp_path / "one/a/0.png").rename(tmp_path / "one/a/9.png")
    assert look_into(str(tmp_path / "one"), None, "real").digest != digest, "exemplars are drawn by name"


def test_classifiers_are_tested_on_no_image_that_settings_are_chosen_by(digits, tmp_path):
    """A folder to test on that holds the real images too, under other names."""
    test = tmp_path / "test"
    for name in ("1", "4"):
        (test / name).mkdir(parents=True)
        for file in (digits / "real" / name).iterdir():
            shutil.copy(file, test / name / f"copy-{file.name}")
        write_png(test / name / "more.png", torch.zeros(1, 8, 8))
    request = digits_sweep(digits, utility={"test": str(test)})
    real = look_into(request.real, None, "real")
    read = read_real(request, real, look_into(str(test), None, "test"), channels=1, size=(8, 8))
    chosen_by, tested = read.tests["validation"].images, read.tests["test"].images
    assert len(chosen_by) == 16
    assert len(tested) == 2 * 17 - 16
    assert not any(bool((image == other).all()) for image in tested for other in chosen_by)
    half = read.halves["validation"]
    assert half.names == [str(file) for file in read.tests["validation"].files]
    assert torch.equal(half.read(slice(0, 16)), chosen_by)


def test_halves_hold_the_files_that_the_places_say(digits):
    request = digits_sweep(digits)
    real = look_into(request.real, None, "real")
    half = read_real(request, real, None, channels=1, size=(8, 8)).halves["test"]
    places = split_places(real, 0.5, 3)["test"]
    files = [real.files[name][place] for name in ("1", "4") for place in places[name]]
    assert half.names == [str(file) for file in files]
    assert torch.equal(half.read(slice(3, 4))[0], read_image(files[3], channels=1))
