"""Sets as a judge takes them: one size for all, files looked at first, and the same numbers part by part as at once."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.halves import Halves, value, write
from torch import Tensor, nn

from handful.data.images import from_uint8, read_image, write_png
from handful.data.sources import labelled_files
from handful.errors import RequestError
from handful.features.extractor import FeatureExtractor
from handful.features.registry import load_extractor
from handful.judge import image_sets as module
from handful.judge.audit import TRANSFORMS, Views
from handful.judge.evaluate import evaluate
from handful.judge.gains import AS_IS
from handful.judge.image_sets import FileImages, Images, common_size
from handful.judge.judge import Judge
from handful.judge.viewer import Viewer
from handful.runs.progress import Progress


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    halves, root = Halves(), tmp_path_factory.mktemp("folders")
    return (
        write(root / "made", halves.others, halves.others_labels, per_class=9),
        write(root / "real", halves.images, halves.labels, per_class=9),
    )


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.total, self.done, self.advanced = 0, 0, 0.0

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, amount: float, now: str = "") -> None:
        self.advanced += amount


def copied(folder: Path, to: Path) -> Path:
    for file in folder.rglob("*.png"):
        copy = to / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return to


def solid(height: int, width: int, colour: int = 90) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 0, 200)).save(held, "PNG")
    return held.getvalue()


def files(root: Path, sizes: list[tuple[int, int]]) -> FileImages:
    for index, (height, width) in enumerate(sizes):
        file = root / "a" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(solid(height, width, index))
    return FileImages(labelled_files(root), "synthetic")


def test_transforms_part_by_part_are_those_of_the_whole_set():
    whole = torch.rand(70, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, transform in TRANSFORMS.items():
        apply = Views()
        parts = [apply(name, whole[start : start + 16], start) for start in range(0, 70, 16)]
        torch.testing.assert_close(torch.cat(parts), transform(whole), rtol=0, atol=1e-6)
        later = Views()(name, whole[48:64], 48)  # where what came before is known already
        torch.testing.assert_close(later, parts[3], rtol=0, atol=0)


def test_streamed_kept_and_in_memory_are_the_same_numbers(folders, monkeypatch):
    made, real = folders
    monkeypatch.setattr(module, "_VALUES", 32 * 64)  # parts of 32 images
    first = evaluate(made, real, "digits-judge", neighbours=3)
    again = Told()
    assert evaluate(made, real, "digits-judge", neighbours=3, progress=again).to_dict() == first.to_dict()
    assert (again.total, again.done, again.advanced) == (180, 180, 0)
    read = [labelled_files(folder).read(channels=1) for folder in (real, made)]
    judge = Judge(read[0].images, read[0].labels, load_extractor("digits-judge"), k=3)
    assert judge(read[1].images, read[1].labels).row() == first.row()
    # one part at once, as before there were parts: the same to rounding
    monkeypatch.setattr(module, "_VALUES", 1 << 24)
    whole = Judge(read[0].images, read[0].labels, load_extractor("digits-judge"), k=3)(read[1].images, read[1].labels)
    assert {k: v for k, v in whole.row().items() if v} == pytest.approx({k: v for k, v in first.row().items() if v}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*exemplars among the real images, byte for byte")
def test_other_processes_see_the_same_and_distances_of_copies_are_kept(folders, tmp_path, monkeypatch):
    made, real = folders
    options = {"neighbours": 3, "exemplars": real}
    alone = evaluate(made, real, "digits-judge", cache=tmp_path / "one", **options)
    both = evaluate(made, real, "digits-judge", cache=tmp_path / "two", workers=2, **options)
    assert both.to_dict() == alone.to_dict()
    monkeypatch.setattr(module.Images, "read", None)  # nothing is read again
    assert evaluate(made, real, "digits-judge", cache=tmp_path / "one", **options).to_dict() == alone.to_dict()


def test_an_interrupted_evaluation_goes_on_from_what_was_seen(folders, monkeypatch):
    made, real = folders
    monkeypatch.setattr(module, "_VALUES", 32 * 64)

    class Interrupted(Told):
        def advance(self, amount: float, now: str = "") -> None:
            super().advance(amount, now)
            if self.advanced > 40:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(made, real, "digits-judge", neighbours=3, progress=Interrupted())
    rest = Told()
    evaluate(made, real, "digits-judge", neighbours=3, progress=rest)
    assert rest.done > 38
    assert rest.done + rest.advanced == pytest.approx(180, abs=1)


def test_a_thumbnail_that_sorts_first_changes_no_other_image(tmp_path, folders):
    """One of 90 images is 4 x 4; when the first file decided, all were judged at 4 x 4."""
    made, real = folders
    alone = evaluate(made, real, "digits-judge", neighbours=3, audit=False)
    other = copied(made, tmp_path / "other")
    write_png(other / "0" / "!.png", torch.zeros(1, 4, 4))
    with pytest.warns(UserWarning, match=r"several sizes \(180 of 8 x 8, 1 of 4 x 4\): all are resized to 8 x 8"):
        found = evaluate(other, real, "digits-judge", neighbours=3, audit=False)
    assert abs(value(found.row()["precision"]) - value(alone.row()["precision"])) < 0.03
    with pytest.warns(UserWarning, match="8 x 8, the most common size of the generated set"):
        evaluate(other, real, "pixels", neighbours=3, audit=False)


def test_the_judges_own_size_decides_where_sizes_differ_and_cropping_is_told(tmp_path):
    made, real = files(tmp_path / "made", [(8, 8)] * 3), files(tmp_path / "real", [(20, 20), (20, 10), (16, 16)])
    size, note = common_size((12, 12), made, [real])
    assert size == (12, 12)
    assert "3 of 8 x 8" in note
    assert "the judge's size; 1 of them are cropped" in note
    assert common_size(None, made, [real])[0] == (8, 8)
    assert common_size((12, 12), made, [made]) == ((8, 8), "")  # all have one size: the judge resizes them itself
    assert real.seen_as(3, size).read(slice(0, 3)).shape == (3, 3, 12, 12)


def test_a_judge_of_gray_images_is_no_judge_of_colours(folders, tmp_path):
    made, real = folders
    coloured = FileImages(labelled_files(made, field="synthetic"), "synthetic")
    assert not coloured.has_colours
    for file in made.rglob("*.png"):
        target = tmp_path / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_png(target, read_image(file, channels=3) * torch.tensor([1.0, 0.9, 0.8]).view(3, 1, 1))
    with pytest.warns(UserWarning, match="the judge digits-judge sees gray images and these have colours"):
        evaluate(tmp_path, real, "digits-judge", audit=False, ceiling=False)


def test_what_the_judge_resizes_is_clipped_as_pillow_clips_it():
    noise = Image.effect_noise((8, 8), 200)  # sharp: unclipped cubics overshoot it by a third
    image = from_uint8(torch.tensor(np.array(noise)))[None, None]
    taken = FeatureExtractor("as seen", nn.Identity(), channels=1, size=(24, 30))
    found, _, _ = Viewer(taken, audit=False).look(Images(image, ["a"]), answers=False)[AS_IS]
    wanted = from_uint8(torch.tensor(np.array(noise.resize((30, 24), Image.Resampling.BICUBIC))))
    np.testing.assert_allclose(found.reshape(24, 30), wanted, atol=0.02)  # Pillow rounds twice to bytes


def test_a_judge_that_runs_out_of_memory_sees_fewer_at_once():
    sizes = []

    def features(images: Tensor) -> Tensor:
        sizes.append(len(images))
        if len(images) > 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return images

    images = Images(torch.rand(16, 1, 2, 2) * 2 - 1, ["a"] * 16)
    judge = FeatureExtractor("large", nn.Identity(), channels=1, features=features, classify=lambda x: x.flatten(1))
    found, answers, count = Viewer(judge, audit=False).look(images, answers=True)[AS_IS]
    assert sizes == [16, 8, 4, 4, 4, 4]
    np.testing.assert_array_equal(found, images.read(slice(0, 16)).flatten(1))
    np.testing.assert_array_equal(answers, found.argmax(1))
    assert count == 4


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
def test_a_lying_photo_has_the_size_that_it_is_seen_with(tmp_path, suffix):
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"1.{suffix}", exif=exif)
    assert FileImages(labelled_files(tmp_path), "real").usual_size == (6, 4)


def test_damaged_images_of_any_set_are_found_before_one_is_judged(tmp_path, folders):
    made, real = folders
    late = tmp_path / "late" / "9" / "8.png"
    copied(made, tmp_path / "late")
    Image.effect_noise((64, 64), 50).save(late)  # its header is whole
    late.write_bytes(late.read_bytes()[:900])
    told = Told()
    with pytest.raises(RequestError, match=r"^baseline: .*8\.png.*damaged or cut short"):
        evaluate(made, real, "digits-judge", neighbours=3, baselines={"late": tmp_path / "late"}, progress=told)
    assert told.total == 0


def test_a_set_judged_by_itself_is_warned_of(folders, tmp_path):
    made, real = folders
    for file in copied(made, tmp_path / "again").rglob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    with pytest.warns(
        UserWarning, match="also among the real images, with the same features of the judge: 90 of the baseline again"
    ):
        evaluate(real, made, "pixels", neighbours=3, audit=False, ceiling=False, baselines={"again": tmp_path / "again"})
    with pytest.raises(RequestError, match="judge_class: '0': the judge pixels is not a classifier"):
        evaluate(made, real, "pixels", neighbours=3, judge_class={"0": 1})
    with pytest.warns(UserWarning, match="also among the real images, byte for byte: 90 of the generated images"):
        found = evaluate(made, made, "pixels", neighbours=3, audit=False, ceiling=False)
    assert "byte for byte" in " ".join(found.notes)
    assert not evaluate(made, real, "pixels", neighbours=3, audit=False, ceiling=False).notes


def test_one_image_without_features_costs_one_metric_and_is_named(tmp_path, folders):
    """An all-zero feature row has no direction, so there is no Vendi score; all else is there."""
    made, real = folders
    other = copied(made, tmp_path / "other")
    Image.new("L", (8, 8), 0).save(other / "3" / "black.png")
    (tmp_path / "judge.py").write_text(
        "from torch import nn\nfrom handful.features import FeatureExtractor\n"
        "def load():\n    return FeatureExtractor('ink', nn.Identity(), channels=1, features=lambda x: (x + 1).flatten(1))\n"
    )
    found = evaluate(other, real, f"{tmp_path / 'judge.py'}:load", neighbours=3, audit=False)
    scores = found.summary.pooled.generated
    assert scores.vendi is None
    assert "black.png: an image of all-zero features" in scores.note
    assert None not in (scores.precision, scores.coverage, scores.frechet, found.summary.per_class["1"].generated.vendi)


def test_images_that_are_not_in_the_range_are_refused():
    extractor, labels = load_extractor("digits-judge"), ["1"] * 9
    good: Tensor = torch.rand(9, 1, 8, 8) * 2 - 1
    for wrong in ((good + 1) / 2, (good + 1) * 127.5, ((good + 1) * 127).to(torch.uint8)):
        with pytest.raises(RequestError, match=r"^images: "):
            Judge(wrong, labels, extractor)
        with pytest.raises(RequestError, match=r"^images: "):
            Judge(good, labels, extractor, audit=False)(wrong, labels)
