"""Nested draws, digests that stand for contents, and a cache that is never wrong and never in the way."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from handful.data.exemplars import Exemplars, default_cache, exemplar_features
from handful.data.images import read_image
from handful.errors import RequestError, RunError
from handful.files import sealed


def fill(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    generator = np.random.default_rng(start)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            values = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return fill(tmp_path / "a few", {"cat": 12, "dog": 9, "10": 8, "2": 8})


def draw(root: Path, **options) -> Exemplars:
    return Exemplars.from_folder(root, **{"channels": 3, "size": (4, 4), **options})


class Counting:
    """Mean colour as features, and how many images it has seen."""

    def __init__(self, digest: str = "f00d") -> None:
        self.digest, self.seen, self.batches = digest, 0, []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.seen += len(images)
        self.batches.append(len(images))
        return images.mean((2, 3))


# --- drawing -----------------------------------------------------------------------------------------------------------


def test_a_draw_of_4_is_the_start_of_a_draw_of_8_and_of_all(root):
    eight, everything = draw(root, k=8), draw(root)
    assert everything.counts == {"2": 8, "10": 8, "cat": 12, "dog": 9}
    for k in (2, 4, 8):
        few = draw(root, k=k)
        assert few.classes == ["2", "10", "cat", "dog"]
        assert few.counts == dict.fromkeys(few.classes, k)
        for larger in (eight, everything):
            selected = larger.select(k)
            assert selected.files == few.files
            assert selected.hashes == few.hashes
            assert selected.digest == few.digest
            assert all(torch.equal(selected.images[name], few.images[name]) for name in few.classes)


def test_the_draw_depends_on_the_seed_and_not_on_the_machine(root):
    assert draw(root, k=4, workers=1).digest == draw(root, k=4, workers=4).digest
    names = {seed: tuple(file.name for file in draw(root, k=4, seed=seed).files["cat"]) for seed in range(8)}
    assert len(set(names.values())) > 1
    assert names[0] == ("0.png", "1.png", "7.png", "3.png")  # pinned: a recipe must draw the same for ever


def test_another_class_or_image_leaves_the_draw_of_the_others_alone(root):
    before = draw(root, k=6)
    fill(root, {"zebra": 6}, start=1)
    Image.new("RGB", (4, 4)).save(root / "dog" / "new.png")
    after = draw(root, k=6)
    assert after.files["cat"] == before.files["cat"]
    kept = [file for file in after.files["dog"] if file.name != "new.png"]
    assert kept == list(before.files["dog"][: len(kept)])


def test_images_are_those_of_the_files(root):
    drawn = draw(root, k=3, channels=1, size=(2, 2))
    assert drawn.shape == (1, 2, 2)
    assert drawn.images["cat"].shape == (3, 1, 2, 2)
    for file, image in zip(drawn.files["cat"], drawn.images["cat"], strict=True):
        assert torch.equal(image, read_image(file, channels=1, size=(2, 2)))


def test_too_few_images_are_refused_with_what_to_do(root, tmp_path):
    with pytest.raises(RequestError, match=r"class '2' has 8, '10' has 8, 'dog' has 9; 10 exemplars.*Lower k to 8"):
        draw(root, k=10)
    fill(tmp_path / "one", {"cat": 1, "dog": 3})
    with pytest.raises(RequestError, match=r"^exemplars: .*class 'cat' has 1; 2 .*at least 2 are needed.*--k 1"):
        draw(tmp_path / "one")
    with pytest.raises(RequestError, match="k: 1: at least 2 exemplars"):
        draw(root, k=1)
    assert draw(tmp_path / "one", minimum=1).counts == {"cat": 1, "dog": 3}
    assert draw(tmp_path / "one", minimum=1, k=1).counts == {"cat": 1, "dog": 1}
    with pytest.raises(RequestError, match="Lower k to 1"):
        draw(tmp_path / "one", minimum=1, k=2)


def test_a_class_that_the_model_does_not_know_is_refused_and_fewer_are_fine(root):
    assert draw(root, classes=["dog", "cat", "2", "10", "horse"]).classes == ["2", "10", "cat", "dog"]
    with pytest.raises(RequestError, match=r"does not have class 'dog'.*Did you mean 'dogs'"):
        draw(root, classes=["dogs", "cat", "2", "10"])


def test_unusable_folders_and_files_are_refused_as_exemplars(root, tmp_path):
    with pytest.raises(RequestError, match=r"^exemplars: .*no such folder"):
        draw(tmp_path / "none")
    (root / "dog" / "3.png").write_text("no")
    (root / "cat" / "5.png").write_bytes((root / "cat" / "5.png").read_bytes()[:60])
    with pytest.raises(RequestError, match=r"^exemplars: .*2 of 37 images cannot be used: .*5\.png.*3\.png"):
        draw(root)


def test_the_same_image_twice_in_a_class_is_a_warning(root):
    assert draw(root).warnings == []
    (root / "cat" / "copy.png").write_bytes((root / "cat" / "0.png").read_bytes())
    (root / "dog" / "from cat.png").write_bytes((root / "cat" / "0.png").read_bytes())  # another class: no matter
    drawn = draw(root)
    assert len(drawn.warnings) == 1
    assert all(word in drawn.warnings[0] for word in ("'cat'", "copy.png", "0.png"))
    assert drawn.counts["cat"] == 13


# --- digests and tensors -----------------------------------------------------------------------------------------------


def test_the_digest_stands_for_contents_target_and_classes_but_not_for_the_place(root, tmp_path):
    digest = draw(root).digest
    assert len(digest) == 64
    assert draw(root).digest == digest
    assert draw(root, size=(8, 8)).digest != digest
    assert draw(root, channels=1).digest != digest
    root.rename(tmp_path / "moved")
    assert draw(tmp_path / "moved").digest == digest
    (tmp_path / "moved" / "cat").rename(tmp_path / "moved" / "tiger")
    assert draw(tmp_path / "moved").digest != digest


def test_exemplars_from_tensors(root):
    given = {"cat": torch.rand(3, 1, 4, 4) * 2 - 1, "dog": torch.rand(2, 1, 4, 4).double()}
    made = Exemplars.from_tensors(given)
    assert made.classes == ["cat", "dog"]
    assert made.counts == {"cat": 3, "dog": 2}
    assert made.images["dog"].dtype == torch.float32
    assert made.digest == Exemplars.from_tensors(dict(reversed(given.items()))).digest
    assert made.select(2).counts == {"cat": 2, "dog": 2}
    before = made.images["cat"].clone()
    given["cat"].zero_()
    assert torch.equal(made.images["cat"], before)
    assert Exemplars.from_tensors(given).digest != made.digest
    assert len(Exemplars.from_tensors(given).warnings) == 1  # three black images
    with pytest.raises(RequestError, match="k: 3: the smallest class has 2"):
        made.select(3)
    with pytest.raises(RequestError, match="k: 0"):
        made.select(0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"a": torch.zeros(3, 4, 4)},
        {"a": torch.zeros(0, 3, 4, 4)},
        {"a": torch.zeros(2, 2, 4, 4)},
        {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 3, 8, 8)},
        {"a": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)},
        {"a": torch.full((2, 3, 4, 4), 255.0)},
        {"a": torch.full((2, 3, 4, 4), float("nan"))},
    ],
)
def test_tensors_that_are_no_images_are_refused(given):
    with pytest.raises(RequestError, match="exemplars"):
        Exemplars.from_tensors(given)


# --- features and their cache ------------------------------------------------------------------------------------------


def test_features_are_computed_once_and_then_found(root, tmp_path):
    drawn, extractor = draw(root, k=4), Counting()
    first = exemplar_features(drawn, extractor, tmp_path / "cache")
    assert extractor.seen == 16
    assert list(first) == drawn.classes
    for name, features in first.items():
        assert torch.equal(features, drawn.images[name].mean((2, 3)))
    again = exemplar_features(draw(root, k=4), extractor, tmp_path / "cache")
    assert extractor.seen == 16
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len(list((tmp_path / "cache" / "features" / "f00d").glob("*.safetensors"))) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_contents_sizes_and_extractors_are_computed_anew(root, tmp_path):
    cache, extractor = tmp_path / "cache", Counting()
    exemplar_features(draw(root, k=4), extractor, cache)
    exemplar_features(draw(root, k=4, size=(8, 8)), extractor, cache)
    assert extractor.seen == 32
    exemplar_features(draw(root, k=4, channels=1), extractor, cache)
    assert extractor.seen == 48
    drawn = draw(root, k=4)
    drawn.files["cat"][0].write_bytes(drawn.files["dog"][0].read_bytes())
    exemplar_features(draw(root, k=4), extractor, cache)
    assert extractor.seen == 52  # the changed class alone
    same_prefix = [Counting("0" * 16 + end) for end in "ab"]
    for other in same_prefix:
        exemplar_features(drawn, other, cache)
    assert [other.seen for other in same_prefix] == [16, 16]


def test_the_order_of_images_is_part_of_the_key(tmp_path):
    images = torch.rand(3, 1, 4, 4)
    extractor = Counting()
    exemplar_features(Exemplars.from_tensors({"a": images}), extractor, tmp_path)
    turned = exemplar_features(Exemplars.from_tensors({"a": images.flip(0)}), extractor, tmp_path)
    assert torch.equal(turned["a"], images.flip(0).mean((2, 3)))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "flipped", "foreign", "folder"])
def test_a_damaged_cache_file_is_computed_again_and_rewritten(tmp_path, damage):
    drawn = Exemplars.from_tensors({"a": torch.rand(3, 3, 4, 4)})
    expected = exemplar_features(drawn, Counting(), tmp_path)["a"]
    other = exemplar_features(Exemplars.from_tensors({"a": torch.rand(3, 3, 4, 4)}), Counting("0ther"), tmp_path)
    assert not torch.equal(other["a"], expected)
    (file,) = (tmp_path / "features" / "f00d").iterdir()
    (foreign,) = (tmp_path / "features" / "0ther").iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        contents = {"empty": b"", "cut": whole[:-5], "garbage": b"x" * 100, "flipped": flipped}
        file.write_bytes(contents.get(damage, foreign.read_bytes()))
    extractor = Counting()
    with warnings.catch_warnings():
        if damage == "folder":  # which cannot be replaced by a file: done without
            warnings.simplefilter("ignore")
        assert torch.equal(exemplar_features(drawn, extractor, tmp_path)["a"], expected)
    assert extractor.seen == 3
    if damage != "folder":
        assert torch.equal(exemplar_features(drawn, extractor, tmp_path)["a"], expected)
        assert extractor.seen == 3
        assert len(list(file.parent.iterdir())) == 1


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDFUL_CACHE", str(tmp_path / "cache"))
    drawn, extractor = Exemplars.from_tensors({"a": torch.rand(3, 3, 4, 4)}), Counting()
    for _ in range(2):
        exemplar_features(drawn, extractor, None)
    assert extractor.seen == 6
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without_and_said_once(root, tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"  # below a file no folder can be made, not even by root
    drawn = draw(root, k=2)
    with pytest.warns(RuntimeWarning, match="can't be written") as told:
        features = exemplar_features(drawn, Counting(), cache)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exemplar_features(drawn, Counting(), cache)
    assert torch.equal(features["cat"], drawn.images["cat"].mean((2, 3)))


def test_a_read_only_cache_still_serves_what_it_holds(tmp_path, monkeypatch):
    drawn, extractor = Exemplars.from_tensors({"a": torch.rand(3, 3, 4, 4)}), Counting()
    exemplar_features(drawn, extractor, tmp_path)

    def read_only(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sealed, "write_atomically", read_only)
    exemplar_features(drawn, extractor, tmp_path)
    assert extractor.seen == 3


def test_a_digest_of_any_characters_stays_inside_the_cache(tmp_path):
    drawn = Exemplars.from_tensors({"a": torch.rand(2, 3, 4, 4)})
    for digest in ("../../../etc", "hub/dino v2:1", "."):
        extractor = Counting(digest)
        exemplar_features(drawn, extractor, tmp_path / "cache")
        exemplar_features(drawn, extractor, tmp_path / "cache")
        assert extractor.seen == 2
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert all(path.suffix == ".safetensors" for path in tmp_path.rglob("*") if path.is_file())


def test_features_are_computed_in_batches_and_a_module_keeps_no_graph(tmp_path):
    drawn, extractor = Exemplars.from_tensors({"a": torch.rand(7, 3, 4, 4) * 2 - 1}), Counting()
    exemplar_features(drawn, extractor, None, batch=3)
    assert extractor.batches == [3, 3, 1]

    class Linear(nn.Module):
        digest = "11"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(48, 5)

        def forward(self, images):
            return self.layer(images.flatten(1))

    features = exemplar_features(drawn, Linear(), tmp_path)["a"]
    assert features.shape == (7, 5)
    assert not features.requires_grad


@pytest.mark.parametrize(
    "wrong", [lambda x: x, lambda x: x.mean((1, 2, 3)), lambda x: x[:1].mean((2, 3)), lambda x: x.mean((2, 3)) / 0]
)
def test_features_of_the_wrong_kind_are_refused_and_not_kept(tmp_path, wrong):
    class Wrong(Counting):
        def __call__(self, images):
            return wrong(images)

    with pytest.raises(RunError, match="feature extractor gave"):
        exemplar_features(Exemplars.from_tensors({"a": torch.rand(3, 3, 4, 4)}), Wrong(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("HANDFUL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "handful"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == tmp_path / ".cache" / "handful"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "handful"
    monkeypatch.setenv("HANDFUL_CACHE", "~/own")
    assert default_cache() == tmp_path / "own"
    assert not os.path.exists(default_cache())
