"""Exemplars as features alone: what is kept, what is refused, and that no image is in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from handful.data.exemplars import Exemplars
from handful.data.shared_exemplars import KIND, VERSION, ExemplarFeatures, View, features_file
from handful.errors import RequestError
from handful.features.registry import FeatureExtractor, pixels
from handful.files.sealed import seal, unseal


def blurred(side: int = 2, name: str = "blurred") -> FeatureExtractor:
    return FeatureExtractor(name, nn.AdaptiveAvgPool2d(side), channels=3)


def drawn(k: int = 4) -> Exemplars:
    draw = torch.Generator().manual_seed(0)
    return Exemplars.from_tensors({name: torch.rand(k, 3, 8, 8, generator=draw) * 2 - 1 for name in ("dog", "cat")})


def made(k: int = 4, reduces: tuple[int, ...] = (1, 2), seed: int = 3) -> ExemplarFeatures:
    return ExemplarFeatures.of(drawn(k), [blurred()], reduces, seed=seed, source="a camera", licence="CC BY 4.0")


def same(a: ExemplarFeatures, b: ExemplarFeatures) -> bool:
    flat = [
        {(view, name): values for view, found in each.features.items() for name, values in found.items()} for each in (a, b)
    ]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(values, flat[1][key]) for key, values in flat[0].items())


def test_what_is_saved_comes_back_with_its_provenance(tmp_path: Path):
    kept, file = made(), tmp_path / "kept.safetensors"
    kept.save(file)
    read = ExemplarFeatures.load(file)
    assert same(kept, read)
    assert (read.classes, read.counts, read.shape, read.seed) == (["dog", "cat"], {"dog": 4, "cat": 4}, (3, 8, 8), 3)
    assert (read.source, read.licence) == ("a camera", "CC BY 4.0")
    assert set(read.made_by) == {"handful", "torch"}
    assert read.hashes == drawn().hashes
    assert read.digest == kept.digest
    kept.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_the_features_are_those_that_the_images_give():
    exemplars, extractor = drawn(), blurred()
    for reduce in (1, 2):
        expected = exemplars.seen_by(extractor, reduce, None)
        found = made().seen_by(extractor, reduce)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_image_is_in_the_file(tmp_path: Path):
    made().save(tmp_path / "kept.safetensors")
    held = load_file(tmp_path / "kept.safetensors")
    assert {tuple(value.shape) for value in held.values()} == {(4, 3 * 2 * 2)}
    assert made().images == {}


def test_the_images_themselves_are_no_features_to_share():
    with pytest.raises(RequestError, match=r"^features: 'pixels': these are the images themselves"):
        ExemplarFeatures.of(drawn(), [pixels()])


def test_features_as_many_as_the_pixels_are_pointed_out():
    assert not made(reduces=(1,)).notes()
    (note,) = made(reduces=(4,)).notes()  # 12 features of 3 x 2 x 2 values
    assert "recovered" in note


def test_k_takes_the_first_k_as_a_draw_of_k_would():
    few, many = made().select(2), drawn().select(2)
    assert few.hashes == many.hashes
    assert all(
        torch.equal(few.seen_by(blurred(), 1)[name], values) for name, values in many.seen_by(blurred(), 1, None).items()
    )
    for k in (0, 5):
        with pytest.raises(RequestError, match="the smallest class has 4"):
            made().select(k)


def test_the_digest_stands_for_classes_images_and_views_whatever_their_order():
    digest = made().digest
    other = ExemplarFeatures.of(drawn(), [blurred()], (2, 1), seed=9, source="elsewhere").only(["cat", "dog"])
    assert other.digest == digest
    assert made(k=3).digest != digest
    assert made().only(["cat"]).digest != digest
    assert made().seen_only([View(blurred().digest, 1)]).digest != digest
    changed = made()
    changed.features[View(blurred().digest, 1)]["cat"][0, 0] += 1e-6
    assert changed.digest != digest


def test_what_the_file_does_not_hold_is_refused_with_what_it_holds():
    with pytest.raises(RequestError, match=r"^features: 'blurred': .*reduce 4.*\(blurred at reduce 1, blurred at reduce 2\)"):
        made().seen_by(blurred(), 4)
    with pytest.raises(RequestError, match="of other weights or preprocessing"):
        made().seen_by(FeatureExtractor("blurred", nn.AdaptiveAvgPool2d(2), channels=1), 1)
    with pytest.raises(RequestError, match="has no features of this extractor at reduce 1\\."):
        made().seen_by(blurred(4, "sharper"), 1)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[dict, dict[str, Tensor]]:
    made().save(tmp_path / "kept.safetensors")
    return unseal(tmp_path / "kept.safetensors", KIND, VERSION, field="", remedy="")


def test_every_flipped_byte_in_the_head_and_every_cut_is_refused(tmp_path: Path):
    file = tmp_path / "kept.safetensors"
    made().save(file)
    held = file.read_bytes()
    broken = [held[:cut] for cut in range(0, len(held), 97)]
    broken += [held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :] for at in range(0, len(held), 53)]
    refused: list[RequestError] = []
    for each in broken:
        file.write_bytes(each)
        try:
            read = ExemplarFeatures.load(file)
        except RequestError as error:
            refused.append(error)
            continue
        assert read.digest == made().digest, "padding of the header means nothing"
    assert len(refused) > 0.9 * len(broken)
    assert all(error.field == "exemplars" and "handful exemplars DIR" in error.remedy for error in refused)


@pytest.mark.parametrize("held", [b"", save({"a": torch.zeros(2)}), seal("books", 1, {}, {}), b"\x80\x04\x95pickle"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, held: bytes):
    (tmp_path / "other.safetensors").write_bytes(held)
    with pytest.raises(RequestError, match=r"other.safetensors': it holds no exemplar features"):
        ExemplarFeatures.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda settings, tensors: settings.update(classes=["dog", "dog"]),
        lambda settings, tensors: settings.update(classes=["dog"]),
        lambda settings, tensors: settings.pop("hashes"),
        lambda settings, tensors: settings["hashes"][0].append("ff"),
        lambda settings, tensors: settings.update(views=settings["views"][:1]),
        lambda settings, tensors: settings.update(views=[settings["views"][0]] * 2),
        lambda settings, tensors: settings.update(shape=[3, 8]),
        lambda settings, tensors: settings.update(seed="x"),
        lambda settings, tensors: tensors.pop("0/1"),
        lambda settings, tensors: tensors.update({"0/1": tensors["0/1"][:2]}),
        lambda settings, tensors: tensors.update({"0/1": tensors["0/1"][:, :2]}),
        lambda settings, tensors: tensors.update({"0/1": tensors["0/1"].double()}),
        lambda settings, tensors: tensors.update({"0/1": tensors["0/1"] / 0}),
        lambda settings, tensors: tensors.update({"0/1": torch.zeros(())}),
    ],
)
def test_a_sealed_file_whose_parts_contradict_each_other_is_refused(tmp_path: Path, whole, change):
    settings, tensors = whole
    change(settings, tensors)
    (tmp_path / "wrong.safetensors").write_bytes(seal(KIND, VERSION, settings, tensors))
    with pytest.raises(RequestError, match=r"wrong.safetensors': its parts contradict each other"):
        ExemplarFeatures.load(tmp_path / "wrong.safetensors")


def test_folders_of_whoever_made_the_file_are_not_in_it(tmp_path: Path):
    (tmp_path / "secret" / "network").mkdir(parents=True)
    extractor = blurred(name=str(tmp_path / "secret" / "network"))
    ExemplarFeatures.of(drawn(), [extractor]).save(tmp_path / "kept.safetensors")
    assert b"secret" not in (tmp_path / "kept.safetensors").read_bytes()


def test_what_a_recipes_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    assert features_file("kept.safetensors") == Path("kept.safetensors")
    assert features_file(tmp_path / "folder.safetensors") is None
    assert features_file("photos") is None
    packaged = features_file("cifar10-exemplars")
    assert packaged is not None
    assert packaged.name == "exemplars.safetensors"
    (tmp_path / "cifar10-exemplars").mkdir()
    assert features_file("cifar10-exemplars") is None
