"""Image files in and out, and folders of images by class.

Everywhere else in handful an image is a float tensor in [-1, 1], (C, H, W) with C = 1 (gray) or 3 (RGB). Files become
such tensors here and nowhere else, so that exemplars, real test images and generated images are all read alike.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from handful.errors import RequestError, RunError, counted, some_of
from handful.files.atomic import printable
from handful.files.atomic import write_atomically as write_atomically

MAX_PIXELS = 64 * 2**20
# fmt: off
# Pillow reads HEIC only with a plugin. It is listed all the same: a refusal beats ten photos silently left out.
EXTENSIONS = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".pbm", ".pgm", ".ppm", ".pnm", ".avif", ".jp2", ".j2k", ".qoi", ".heic", ".heif",
}
# Named one by one, because Pillow also "reads" EPS (by running Ghostscript) and takes any bytes at all for a TGA.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "HEIF")
# fmt: on
_CONVERT = "Save it as PNG or JPEG."
_REPLACE = "Replace the file or remove it."
_dark: set[Path] = set()  # folders of which a nearly black file was pointed out

T = TypeVar("T")


def read_image(
    path_or_bytes: str | Path | bytes,
    *,
    channels: int,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | Path | None = None,
    squeeze: bool = False,
) -> Tensor:
    """Read one image file of any common kind.

    The content decides the format, not the extension. EXIF orientation is applied. Transparency is composited on white.
    16-bit gray keeps its precision, 65535 being white (so do 32-bit integers, within 0 to 65535); floats must lie in
    [0, 1]; 16-bit colour comes as its high bytes. TIFF's 12-bit gray has 4095 as white, its WhiteIsZero gray is inverted,
    and its signed numbers are refused. Colour profiles are ignored, CMYK's too. Of an animation or a multi-page file the
    first frame is taken. Colour becomes gray by luma (ITU-R 601), unrounded; gray is repeated.

    With a `size`, the centre is cropped to its aspect ratio and resized (bicubic, antialiased, clamped). An image that
    has the size already is untouched: the byte v reads exactly v / 127.5 - 1.

    Args:
        path_or_bytes: the file, or its content.
        channels: 1 or 3.
        size: (height, width) in pixels; None keeps the file's own.
        max_pixels: larger images are refused by their header, before anything is decoded or allocated.
        name: what errors call the image, where its bytes are given.
        squeeze: bring the whole image to the size, as bytes and by Pillow's bicubic filter, which rounds to bytes after each
            direction: torchvision's `Resize((height, width))`, which others' metrics are computed with. Nothing is cropped.

    Returns:
        (channels, height, width), float32 in [-1, 1].

    Raises:
        RequestError: the file is missing, empty, not an image, damaged, cut short, too large, or of an unknown mode.
    """
    if channels not in (1, 3):
        raise RequestError("channels", channels, "an image has 1 channel (gray) or 3 (RGB)", "Take 1 or 3.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise RequestError("size", size, "this is not a height and a width", "Give two positive whole numbers.")
    if isinstance(path_or_bytes, (bytes, bytearray)):
        shown: object = name if name is not None else path_or_bytes
        if not path_or_bytes:
            raise RequestError("image", shown, "it is empty (0 bytes)", _REPLACE)
        return _read(io.BytesIO(path_or_bytes), shown, channels, size, max_pixels, squeeze)
    with open_file(Path(path_or_bytes)) as stream:
        return _read(stream, name or Path(path_or_bytes), channels, size, max_pixels, squeeze)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; RequestError where it is missing, empty, no regular file, or may not be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise RequestError("image", path, f"this is {kind}", "Give an image file.")
        if status.st_size == 0:
            raise RequestError("image", path, "it is empty (0 bytes)", _REPLACE)
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise RequestError("image", path, "there is no such file", "Check the path.") from None
    except PermissionError:
        raise RequestError("image", path, "you may not read this file", "Change its permissions.") from None
    except OSError as error:  # links in a circle, a lost disk
        raise RequestError("image", path, f"it can't be opened ({error.strerror})", _REPLACE) from None


def _read(
    stream: BinaryIO, name: object, channels: int, size: tuple[int, int] | None, max_pixels: int, squeeze: bool
) -> Tensor:
    try:
        image, scale = _decode(stream, name, max_pixels)
        if size is not None and not squeeze:
            image = _centre_crop(image, size)  # while it is still bytes: a photo of 48 MPixels is 0.6 GB as floats
        pixels, white = _pixels(image, scale, name)
        if size is not None and squeeze:
            pixels, white = _squeezed(pixels * (255 / white), size), 255.0
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind there is on damaged files
        raise RequestError("image", name, f"it is damaged or cut short ({error})", _REPLACE) from error
    if channels == 1 and len(pixels) == 3:
        # 601's weights as integers that sum to 2^16: exact in float32, so an RGB file of a gray image gives its gray.
        pixels = (19595 * pixels[:1] + 38470 * pixels[1:2] + 7471 * pixels[2:]) / 65536
    pixels = (pixels / (white / 2) - 1).clamp(-1, 1)
    if size is not None and pixels.shape[1:] != torch.Size(size):
        pixels = interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    return pixels.expand(channels, -1, -1).contiguous()


class _Scale(NamedTuple):
    """What a TIFF's tags say of its gray values: the number of the brightest, and whether that is black."""

    white: float | None = None
    inverted: bool = False


def _decode(stream: BinaryIO, name: object, max_pixels: int) -> tuple[Image.Image, _Scale]:
    """The first frame, decoded and upright, and the scale of its values."""
    remedy = "Make it smaller, or raise max_pixels if you trust it."
    Image.init()
    try:
        image = Image.open(stream, formats=[known for known in FORMATS if known in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError("image", name, f"it claims to be too large ({error})", remedy) from None
    except Image.UnidentifiedImageError:
        raise RequestError("image", name, "it is not an image of a known format", _CONVERT) from None
    if image.width * image.height > max_pixels:
        problem = f"it claims {image.width} x {image.height} pixels, more than {max_pixels:,} in all"
        raise RequestError("image", name, problem, remedy)
    scale = _tiff_scale(image, name) if image.format == "TIFF" else _Scale()
    coded = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
    image.load()
    _scale_transparent(image, coded)
    _point_out_dark(image, coded, scale, name)
    try:  # after loading: some formats turn upright by themselves, and then drop the tag
        return ImageOps.exif_transpose(image), scale
    except Exception:  # damaged metadata spoil no pixels
        return image, scale


def _tiff_scale(image: Image.Image, name: object) -> _Scale:
    """Pillow inverts WhiteIsZero up to 8 bits only, and leaves it to others that 12 bits end at 4095."""
    tags: Any = getattr(image, "tag_v2", {})
    bits, kinds, photometric = (tags.get(tag, (1,)) for tag in (258, 339, 262))
    if 2 in kinds and max(bits) < 32:  # Pillow writes its own integers as 32 signed bits
        problem = "its pixel values are signed integers, so the value of white is not known"
        raise RequestError("image", name, problem, "Rescale it and save it as 8- or 16-bit PNG.")
    wide = image.mode == "F" or image.mode.startswith("I")
    return _Scale(4095.0 if tuple(bits) == (12,) else None, wide and photometric == 0)


def _point_out_dark(image: Image.Image, coded: str, scale: _Scale, name: object) -> None:
    """Warns of 16 bits that hold 8: once for each folder, whose other files are likely of the same kind."""
    most = float(np.asarray(image).max()) if image.mode.startswith("I") else -1.0
    folder = Path(str(name)).parent
    if scale.inverted or folder in _dark or not (0 < most <= 255 or (coded == "RGB;16B" and not np.asarray(image).any())):
        return
    _dark.add(folder)
    white = f"{scale.white or 65535:.0f}"
    held = f"values up to {most:.0f}" if most > 0 else "values below 256"
    text = f"'{name}' has more than 8 bits, in which white is {white}, but {held}: it reads nearly black; if its white is"
    warnings.warn(f"{text} 255, save it as 8-bit PNG (others in that folder are not named)", stacklevel=2)


def _scale_transparent(image: Image.Image, coded: str) -> None:
    """A PNG names its transparent colour in the file's own bits; Pillow compares it with pixels that it has scaled to 8."""
    transparent: Any = image.info.get("transparency")
    if coded in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * (85 if coded == "L;2" else 17)
    elif coded == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    crop_height = max(1, min(image.height, round(image.width * height / width)))
    crop_width = max(1, min(image.width, round(image.height * width / height)))
    top, left = (image.height - crop_height) // 2, (image.width - crop_width) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))


def _squeezed(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(1 or 3, h, w), 0 to 255, brought to the size by Pillow, in bytes."""
    planes = [Image.fromarray(plane.round().clamp(0, 255).byte().numpy()) for plane in pixels]
    height, width = size
    resized = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(resized).astype(np.float32))


def _pixels(image: Image.Image, scale: _Scale, name: object) -> tuple[Tensor, float]:
    """The image's numbers, (1 or 3, H, W) float32 from 0 (black), and the number that is white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values, white = np.asarray(image), scale.white or (1.0 if image.mode == "F" else 65535.0)
        if not (values.min() >= 0 and values.max() <= white):  # so written, NaN fails too
            extremes = f"{values.min()} to {values.max()}"
            problem = f"its values run from {extremes}, outside 0 (black) to {white:.0f} (white)"
            raise RequestError("image", name, problem, "Rescale it and save it as 8- or 16-bit PNG.")
        gray = values.astype(np.float32)
        if isinstance(transparent := image.info.get("transparency"), int):
            gray = np.where(values == transparent, np.float32(white), gray)
        return torch.from_numpy(white - gray if scale.inverted else gray)[None], white
    if image.mode == "La":  # gray times its opacity already
        gray, opacity = _planes(image)[:1], _planes(image)[1:]
        return gray + (255 - opacity), 255.0
    if image.has_transparency_data:
        rgba = _planes(image.convert("RGBA"))
        colour, opacity = rgba[:3], rgba[3:]
        return (colour * opacity + 255 * (255 - opacity)) / 255, 255.0
    if image.mode in ("1", "L"):
        return _planes(image.convert("L")), 255.0
    if image.mode == "LAB":  # Pillow has no plain conversion
        raise RequestError("image", name, "its colour mode LAB is not supported", _CONVERT)
    return _planes(image.convert("RGB")), 255.0


def _planes(image: Image.Image) -> Tensor:
    values = np.asarray(image)
    return torch.from_numpy(np.atleast_3d(values).astype(np.float32)).permute(2, 0, 1)


def from_uint8(images: Tensor) -> Tensor:
    """Bytes to images: uint8 of any shape -> float32 in [-1, 1], v / 127.5 - 1."""
    if images.dtype != torch.uint8:
        raise RequestError("images", images.dtype, "these are not bytes", "Give a uint8 tensor.")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images to bytes, rounded to the nearest: float of any shape in [-1, 1] -> uint8. What lies outside is clamped.

    Raises:
        RequestError: not floats (bytes would be taken for values far outside the range).
        RunError: a value is NaN or infinite.
    """
    if not images.dtype.is_floating_point:
        raise RequestError("images", images.dtype, "images are floats in [-1, 1]", "Convert them with from_uint8.")
    if not torch.isfinite(images).all():
        raise RunError("An image holds NaN or infinite values: the sampling diverged. Lower the guidance scale.")
    return (images.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def encode_png(image: Tensor) -> bytes:
    """One image, (C, H, W) in [-1, 1] with C = 1 or 3, as an 8-bit PNG.

    The bytes depend on the pixels alone (and on Pillow's version); `read_image` gives back exactly what was written.

    Raises:
        RequestError: not such a tensor.
        RunError: a value is NaN or infinite.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.numel() == 0:
        raise RequestError(
            "image", tuple(image.shape), "this is not an image tensor", "Give one (1 or 3, height, width) tensor."
        )
    values = to_uint8(image).cpu().permute(1, 2, 0).numpy()
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2] == 1 else values)).save(encoded, "PNG")
    return encoded.getvalue()


def write_png(path: str | Path, image: Tensor) -> None:
    """Write one image as PNG (`encode_png`), atomically.

    Raises:
        RequestError, RunError: see `encode_png`. Nothing is written.
        OSError: the disk is full, the folder is missing or may not be written. No part of a file is left behind.
    """
    write_atomically(Path(path), encode_png(image))


def natural_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which "2" comes before "10"; equal numbers ("01", "1") fall back to the plain text."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], name


def list_images(folder: str | Path) -> list[Path]:
    """The image files that lie directly in a folder, in natural order of their names.

    Known by extension, in either case. Hidden files, `metadata.*` and system files (Thumbs.db, .DS_Store) are no
    images; subfolders are not entered. Broken links are listed, so that reading them complains.
    """

    def is_image(path: Path) -> bool:
        shown = not path.name.startswith(".") and path.stem.lower() != "metadata"
        return shown and path.suffix.lower() in EXTENSIONS and not path.is_dir()

    return sorted(filter(is_image, Path(folder).iterdir()), key=lambda path: natural_order(path.name))


def image_folder(root: str | Path, *, classes: Sequence[str] | None = None, field: str = "folder") -> dict[str, list[Path]]:
    """For each class its image files, from a folder that holds a folder per class (Hugging Face's `imagefolder`).

    A run directory of handful may be given as it is: its `images` are taken. Hidden folders, `__MACOSX` and links back
    to the root or above are no classes; images beside the class folders are left alone.

    Args:
        root: the folder; `~` is understood.
        classes: only these, in this order. None: all, in natural order ("2" before "10").
        field: what errors call the folder.

    Raises:
        RequestError: the folder is missing, no folder, empty, flat, may not be read, or a class is empty or missing.
    """
    root = Path(root).expanduser()
    per_class = "Put 2 or more images of each class into a folder per class."
    try:
        if not root.exists():
            raise RequestError(field, root, "there is no such folder", "Check the path.")
        if not root.is_dir():
            raise RequestError(field, root, "this is a file", f"Give the folder. {per_class}")
        if (root / "images").is_dir() and (root / "recipe.yaml").is_file():
            root = root / "images"
        folders = {path.name: path for path in root.iterdir() if _is_class(path, root)}
        if not folders:
            flat = len(list_images(root))
            problem = f"its images ({flat}) are not in class folders" if flat else "the folder is empty"
            raise RequestError(field, root, problem, per_class)
        foreign = next((name for name in folders if printable(name) != name), None)
        if foreign is not None:
            problem = f"the name of the folder '{printable(foreign)}' is not UTF-8, so no file can hold this class's name"
            raise RequestError(field, root, problem, "Rename the folder (convmv renames many).")
        if classes is None:
            classes = sorted(folders, key=natural_order)
        missing = [name for name in classes if name not in folders]
        if missing:
            remedy = f"The folder holds {some_of(map(repr, sorted(folders, key=natural_order)))}."
            raise RequestError(field, root, f"there is no folder for class {some_of(map(repr, missing))}", remedy)
        files = {name: list_images(folders[name]) for name in classes}
        empty = [name for name in classes if not files[name]]
        if empty:
            inner = [path for path in folders[empty[0]].iterdir() if _is_class(path, root)]
            remedy = f"If its folders are the classes, give '{inner[0].parent}'." if inner else per_class
            raise RequestError(field, root, f"there is no image in class {some_of(map(repr, empty))}", remedy)
    except PermissionError as error:
        raise RequestError(field, error.filename or root, "you may not read this", "Change its permissions.") from None
    return files


def _is_class(path: Path, root: Path) -> bool:
    if path.name.startswith(".") or path.name == "__MACOSX" or not path.is_dir():
        return False
    top = root.resolve()
    return not (path.is_symlink() and path.resolve() in (top, *top.parents))


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their class names: `images` (n, C, H, W) in [-1, 1], and a label and a file for each."""

    images: Tensor
    labels: list[str]
    files: list[Path]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        """The class names, in order."""
        return list(dict.fromkeys(self.labels))

    def by_class(self) -> dict[str, Tensor]:
        """Each class's images (n, C, H, W), in the order of `classes`."""
        return {name: self.images[[label == name for label in self.labels]] for name in self.classes}


def read_folder(
    root: str | Path,
    *,
    channels: int,
    size: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    workers: int | None = None,
    field: str = "folder",
) -> LabelledImages:
    """Read all images of a folder of classes, in the order of `image_folder`, whatever the number of workers.

    Args:
        root, classes, field: as for `image_folder`.
        channels, size: as for `read_image`. Without a size all images must have the same.
        limit: at most so many images of each class, the first ones by name.
        workers: threads; None: as many as there are processors, 8 at most.

    Raises:
        RequestError: as `image_folder` and `read_image` do; all unusable files are reported together.
    """
    if limit is not None and limit < 1:
        raise RequestError("limit", limit, "at least one image of each class is needed", "Give 1 or more, or None.")
    by_class = image_folder(root, classes=classes, field=field)
    labels = [name for name, files in by_class.items() for _ in files[:limit]]
    files = [file for of_class in by_class.values() for file in of_class[:limit]]
    read = partial(read_image, channels=channels, size=size)
    images = read_alike(lambda index: read(files[index]), files, channels, size, field=field, root=root, workers=workers)
    return LabelledImages(images, labels, files)


def read_alike(
    read: Callable[[int], Tensor],
    names: Sequence[str | Path],
    channels: int,
    size: tuple[int, int] | None,
    *,
    field: str,
    root: str | Path,
    workers: int | None = None,
) -> Tensor:
    """All images by `read`, (n, channels, h, w); without a size all must have that of the first that can be read.

    Raises:
        RequestError: as `read_all`.
    """
    for index in range(len(names)) if size is None else ():
        with suppress(RequestError):  # it is reported with all the others
            height, width = read(index).shape[1:]
            size = height, width
            break
    images = torch.empty((len(names), channels, *(size or (0, 0))))  # filled in place: nothing is held twice

    def keep(index: int) -> None:
        image = read(index)
        if image.shape != images.shape[1:]:
            have, want = (f"{shape[-2]} x {shape[-1]}" for shape in (image.shape, images.shape))
            problem = f"it has {have} pixels, but others have {want}"
            raise RequestError("image", names[index], problem, "Give `size`, to which all images are resized.")
        images[index] = image

    read_all(keep, range(len(names)), field=field, root=root, workers=workers)
    return images


def read_all(
    read: Callable[[int], T], indices: Sequence[int], *, field: str, root: str | Path, workers: int | None = None
) -> list[T]:
    """Call `read` for every index, in threads, and report all its request errors as one.

    Raises:
        RequestError: names the first five failures and counts the others.
    """

    def attempt(index: int) -> T | RequestError:
        try:
            return read(index)
        except RequestError as error:
            return error

    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            outcomes = list(pool.map(attempt, indices))
        except BaseException:  # on Ctrl-C, do not read the other 50,000 first
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failures = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    if failures:
        first = failures[:5]
        told = "; ".join(f"'{error.value}': {error.problem}" for error in first)
        more = f"; and {len(failures) - len(first)} more" if len(failures) > len(first) else ""
        problem = f"{len(failures)} of {counted(len(outcomes), 'image')} cannot be used: {told}{more}"
        raise RequestError(field, Path(root), problem, " ".join(dict.fromkeys(error.remedy for error in first)))
    return [outcome for outcome in outcomes if not isinstance(outcome, RequestError)]
