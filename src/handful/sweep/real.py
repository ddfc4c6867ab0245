"""A sweep's real images: one half to choose by, the other to report on, and none of them an exemplar."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from handful.data.images import LabelledImages, image_folder, open_file, read_folder
from handful.data.sources import labelled_files
from handful.errors import RequestError, counted
from handful.judge.image_sets import FileImages
from handful.sweep.columns import TEST, VALIDATION
from handful.sweep.request import SweepRequest

_SAME = 0.1  # share of real images among the exemplars' from which on it is no accident

Files = dict[str, list[Path]]


@dataclass(frozen=True)
class Folder:
    """The files of a folder of classes.

    Attributes:
        contents: SHA-256 of each file.
        digest: Of class names, file names and contents.
    """

    root: str
    files: Files
    contents: dict[Path, str]
    digest: str


def look_into(root: str, classes: Sequence[str] | None, field: str) -> Folder:
    """Lists and hashes a folder's images.

    Raises:
        RequestError: If the folder is unusable, or a class is missing.
    """
    files = image_folder(root, classes=classes, field=field)
    state, contents = hashlib.sha256(), {}
    for name in sorted(files):
        for file in sorted(files[name], key=lambda path: path.name):
            with open_file(file) as stream:
                contents[file] = hashlib.sha256(stream.read()).hexdigest()
            state.update(repr((name, file.name, contents[file])).encode("utf-8", "backslashreplace"))
    return Folder(root, files, contents, state.hexdigest())


def refuse_shared(real: Folder, exemplars: Folder) -> list[str]:
    """Refuses real images that are the exemplars' own: a sweep would reward copying them."""
    pool = set(exemplars.contents.values())
    same = [file for file, content in real.contents.items() if content in pool]
    if len(same) >= _SAME * len(real.contents):
        problem = (
            f"{len(same)} of its {len(real.contents)} images are also among the exemplars ('{exemplars.root}'), and sets "
            f"must not be judged by images that guided them"
        )
        raise RequestError("real", real.root, problem, "Give other real images, or move these out of one of the folders.")
    return [f"{len(same)} of the real images are also in the exemplars' folder"] if same else []


def split_places(real: Folder, share: float, neighbours: int) -> dict[str, dict[str, list[int]]]:
    """Which images of each class belong to which half, by their places in the class.

    The split of a class depends on its name and its number of images alone: not on the other classes, the seeds or the
    machine.

    Raises:
        RequestError: If a class has a single image, or a half has no more images than neighbours.
    """
    single = [name for name, of_class in real.files.items() if len(of_class) < 2]
    if single:
        problem = "this class has one image, but one is needed to choose by and one to report on"
        remedy = "Give 2 or more real images of each class; 50 or more give useful numbers."
        raise RequestError("real", single[0], problem, remedy)
    halves: dict[str, dict[str, list[int]]] = {VALIDATION: {}, TEST: {}}
    for name, of_class in real.files.items():
        # RandomState is what numpy promises never to change
        order = np.random.RandomState(zlib.crc32(name.encode("utf-8", "backslashreplace"))).permutation(len(of_class))
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        halves[VALIDATION][name] = sorted(order[:count].tolist())
        halves[TEST][name] = sorted(order[count:].tolist())
    for split, places in halves.items():
        if (count := sum(map(len, places.values()))) <= neighbours:
            problem = f"its {split} half has {counted(count, 'image')}, too few for {counted(neighbours, 'neighbour')}"
            raise RequestError("real", real.root, problem, "Add real images, or lower neighbours.")
    return halves


@dataclass(frozen=True)
class RealImages:
    """The real images.

    Attributes:
        halves: `validation` and `test`, to judge against: read part by part.
        tests: The same two in memory, to test classifiers on; {} where none are trained.
    """

    halves: dict[str, FileImages]
    tests: dict[str, LabelledImages]


def read_real(
    request: SweepRequest,
    real: Folder,
    test: Folder | None,
    *,
    channels: int,
    size: tuple[int, int],
    test_size: tuple[int, int] | None = None,
) -> RealImages:
    """Lists both halves, and reads what classifiers are tested on: of a folder for that, what no half is chosen by.

    Args:
        channels, size: As for `read_folder`; the size that is judged.
        test_size: The size that classifiers are tested at; None: the same.

    Raises:
        RequestError: If images are unreadable, or nothing is left to test on.
    """
    classes = list(real.files)
    listed, test_size = labelled_files(real.root, classes=classes, field="real"), test_size or size
    split, by_class = split_places(real, request.validation, request.neighbours), listed.by_class()
    taken = {part: [by_class[name][place] for name in classes for place in of[name]] for part, of in split.items()}
    halves = {part: FileImages(listed.only(places), "real").seen_as(channels, size) for part, places in taken.items()}
    if request.utility is None:
        return RealImages(halves, {})
    everything = listed.read(channels=channels, size=test_size, field="real")
    tests = {part: _at(everything, places) for part, places in taken.items()}
    if test is None:
        return RealImages(halves, tests)
    chosen_by = {real.contents[file] for file in tests[VALIDATION].files}
    others = read_folder(test.root, channels=channels, size=test_size, classes=classes, field="utility.test")
    kept = [place for place, file in enumerate(others.files) if test.contents[file] not in chosen_by]
    left = _at(others, kept)
    if missing := [name for name in classes if name not in left.labels]:
        problem = f"all its images of class '{missing[0]}' are already used to choose settings"
        raise RequestError("utility.test", test.root, problem, "Give other images to test on, or leave it out.")
    return RealImages(halves, {VALIDATION: tests[VALIDATION], TEST: left})


def _at(images: LabelledImages, indices: Sequence[int]) -> LabelledImages:
    return LabelledImages(images.images[list(indices)], [images.labels[i] for i in indices], [images.files[i] for i in indices])
