"""The few images that `handful invert` is given: found, read as the model has them, and described."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from handful.data.exemplars import read_hashed
from handful.data.images import image_folder, list_images, open_file, read_all, read_image
from handful.data.sources import overlooked
from handful.errors import RequestError, counted


def target_files(root: str | Path) -> list[Path]:
    """The images of a folder, or of the one folder in it.

    Raises:
        RequestError: There are none, or several folders of them.
    """
    folder = Path(root).expanduser()
    try:
        flat = list_images(folder) if folder.is_dir() else []
    except PermissionError:
        raise RequestError("targets", folder, "you may not read this", "Change its permissions.") from None
    if flat:
        return flat
    by_class = image_folder(folder, field="targets")
    if len(by_class) > 1:
        problem = f"it holds {counted(len(by_class), 'folder')} of images, but one set of targets is needed"
        raise RequestError("targets", folder, problem, f"Give one of them, such as '{folder / next(iter(by_class))}'.")
    return next(iter(by_class.values()))


def read_targets(files: list[Path], root: str | Path, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[str, ...], list[str]]:
    """Reads targets.

    Args:
        shape: (c, h, w) of the model's images.

    Returns:
        Images (N, c, h, w) in [-1, 1], cropped and resized as exemplars are; their content hashes; and in words what is odd
        but usable.

    Raises:
        RequestError: A file can't be read.
    """
    channels, height, width = shape

    def read(index: int) -> tuple[Tensor, str, bool, bool]:
        with open_file(files[index]) as stream:
            data = stream.read()
        image, content = read_hashed(data, files[index], channels, (height, width))
        own = read_image(data, channels=3, name=files[index])
        return image, content, bool((own == own[:1]).all()), own.shape[1:] != image.shape[1:]

    found = read_all(read, range(len(files)), field="targets", root=root)
    images, hashes, gray, resized = zip(*found, strict=True)
    notes = [f"targets: {note}" for note in overlooked(files[0].parent, {})]
    if any(resized):
        notes.append(f"targets: {sum(resized)} of {len(files)} have another size than {height} x {width}: cropped and resized")
    if channels == 3 and any(gray):
        notes.append(f"targets: {sum(gray)} of {len(files)} are gray, but the model makes colour images")
    if channels == 1 and not all(gray):
        notes.append(f"targets: {len(files) - sum(gray)} of {len(files)} have colours, and are converted to gray")
    for content, count in Counter(hashes).items():
        if count > 1:
            same = " = ".join(file.name for file, each in zip(files, hashes, strict=True) if each == content)
            notes.append(f"targets: the same image more than once: {same}")
    return torch.stack(images), hashes, notes
