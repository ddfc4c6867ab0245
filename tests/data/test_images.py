"""Real files of every kind, read to exact pixel values, and what is refused. Writing: test_images_folders.py."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from support.pictures import COLOURS, GRAYS, as_image, save

from handful.data.images import list_images, read_image, write_png
from handful.errors import RequestError

# --- reading: exact values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "ppm", "WEBP", "qoi"])
def test_bytes_of_a_lossless_rgb_file_read_exactly(tmp_path, extension):
    if extension == "qoi" and ".qoi" not in Image.registered_extensions():
        pytest.skip("this Pillow has no QOI")
    options = {"lossless": True} if extension == "WEBP" else {}
    path = tmp_path / f"a.{extension}"
    try:
        save(path, COLOURS, **options)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"this Pillow cannot write {extension}")
    for size in (None, (4, 6)):
        image = read_image(path, channels=3, size=size)
        assert image.dtype == torch.float32
        assert torch.equal(image, as_image(COLOURS))


def test_gray_reads_exactly_and_is_repeated_for_rgb(tmp_path):
    path = save(tmp_path / "g.png", GRAYS)
    assert torch.equal(read_image(path, channels=1), as_image(GRAYS))
    assert torch.equal(read_image(path, channels=3), as_image(GRAYS).expand(3, -1, -1))


def test_all_256_grays_stored_as_rgb_come_back_as_themselves_and_colour_follows_luma(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "g.png", np.stack([ramp] * 3, -1))
    assert torch.equal(read_image(path, channels=1), as_image(ramp))
    path = save(tmp_path / "c.png", COLOURS)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    torch.testing.assert_close(read_image(path, channels=1), as_image(luma), atol=1e-5, rtol=0)


def test_palette_reads_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50, 255, 0, 255])
    expected = [[[10, 20, 30], [200, 100, 50]], [[200, 100, 50], [255, 0, 255]]]
    for extension in ("png", "gif"):
        path = save(tmp_path / f"p.{extension}", picture)
        assert torch.equal(read_image(path, channels=3), as_image(expected))


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    path = save(tmp_path / "p.png", picture, transparency=0)
    assert torch.equal(read_image(path, channels=3), as_image([[[255, 255, 255], [200, 100, 50]]]))
    path = save(tmp_path / "p.gif", picture, transparency=0)
    assert torch.equal(read_image(path, channels=3), as_image([[[255, 255, 255], [200, 100, 50]]]))


def test_alpha_is_composited_on_white_and_opaque_pixels_stay_exact(tmp_path):
    rgba = np.array([[[100, 150, 200, 255], [100, 150, 200, 0], [100, 150, 200, 51]]], dtype=np.uint8)
    path = save(tmp_path / "a.png", rgba)
    # 51 / 255 = 1/5 of the colour and 4/5 of white
    expected = as_image([[[100, 150, 200], [255, 255, 255], [224, 234, 244]]])
    torch.testing.assert_close(read_image(path, channels=3), expected, atol=1e-6, rtol=0)
    opaque = np.dstack([COLOURS, np.full((4, 6), 255, np.uint8)])
    assert torch.equal(read_image(save(tmp_path / "o.png", opaque), channels=3), as_image(COLOURS))


def test_gray_with_alpha_and_a_transparent_colour_key_are_composited_on_white(tmp_path):
    path = save(tmp_path / "la.png", Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 51)]))
    torch.testing.assert_close(read_image(path, channels=1), as_image([[224, 224]]), atol=1e-6, rtol=0)
    path = save(tmp_path / "key.png", np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8), transparency=(1, 2, 3))
    assert torch.equal(read_image(path, channels=3), as_image([[[255, 255, 255], [4, 5, 6]]]))


def test_one_bit_reads_black_and_white(tmp_path):
    path = save(tmp_path / "b.png", np.array([[True, False]]))
    assert torch.equal(read_image(path, channels=1), torch.tensor([[[1.0, -1.0]]]))


def test_cmyk_reads_as_its_colour(tmp_path):
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    assert torch.equal(read_image(save(tmp_path / "c.tif", picture), channels=3)[:, 0, 0], torch.tensor([1.0, -1, -1]))
    read = read_image(save(tmp_path / "c.jpg", picture, quality=95), channels=3)
    torch.testing.assert_close(read[:, 4, 4], torch.tensor([1.0, -1, -1]), atol=0.05, rtol=0)


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_sixteen_bit_gray_is_scaled_by_65535_and_not_clipped(tmp_path, extension):
    values = np.array([[0, 1, 32768, 65535]], dtype=np.uint16)
    read = read_image(save(tmp_path / f"d.{extension}", values), channels=1)
    expected = torch.from_numpy(values.astype(np.float64) / 32767.5 - 1).float()[None]
    torch.testing.assert_close(read, expected, atol=1e-7, rtol=0)
    assert read[0, 0, 1] > -1  # finer than a byte
    assert read[0, 0, -1] == 1


def test_big_endian_and_32_bit_integers_are_scaled_alike(tmp_path):
    values = np.array([[0, 32768, 65535]])
    expected = (torch.from_numpy(values).float() / 32767.5 - 1)[None]
    assert torch.equal(read_image(save(tmp_path / "i.tif", values.astype(np.int32)), channels=1), expected)
    big = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    assert torch.equal(read_image(save(tmp_path / "b.tif", big), channels=3), expected.expand(3, -1, -1))
    with pytest.raises(RequestError, match="0 to 65536"):
        read_image(save(tmp_path / "wide.tif", np.array([[0, 65536]], dtype=np.int32)), channels=1)


def test_floats_from_0_to_1_are_read_and_others_refused(tmp_path):
    values = np.array([[0, 0.25, 1]], dtype=np.float32)
    assert torch.equal(read_image(save(tmp_path / "f.tif", values), channels=1)[0, 0], torch.tensor([-1, -0.5, 1]))
    for bad in (255.0, -0.5, float("nan")):
        values[0, 0] = bad
        with pytest.raises(RequestError, match="its values run from"):
            read_image(save(tmp_path / "f.tif", values), channels=1)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG made by hand, whether or not its header is true."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_comes_as_its_high_bytes():
    data = png(1, 1, 16, b"\x00" + struct.pack(">HHH", 65535, 0x80FF, 255))
    assert torch.equal(read_image(data, channels=3), as_image([[[255, 0x80, 0]]]))


UPRIGHT = {  # what each EXIF orientation asks for, on (C, H, W)
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: torch.rot90(x, -1, (1, 2)),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: torch.rot90(x, 1, (1, 2)),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_exif_orientation_equals_the_turned_tensor(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"e.{extension}", COLOURS, exif=exif, lossless=True)
    assert torch.equal(read_image(path, channels=3), UPRIGHT[orientation](as_image(COLOURS)))


def test_exif_orientation_of_16_bit_gray_and_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    read = read_image(save(tmp_path / "e.png", values, exif=exif), channels=1)
    assert torch.equal(read, torch.rot90(torch.from_numpy(values.astype(np.float32))[None], -1, (1, 2)) / 32767.5 - 1)
    tall = read_image(save(tmp_path / "e.jpg", np.zeros((10, 20, 3), np.uint8), exif=exif), channels=3)
    assert tall.shape == (3, 20, 10)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"\x00"])
def test_damaged_exif_spoils_no_pixels(tmp_path, exif):
    path = save(tmp_path / "e.png", COLOURS, exif=exif)
    assert torch.equal(read_image(path, channels=3), as_image(COLOURS))


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_several_is_taken(tmp_path, extension):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"f.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(read_image(path, channels=3)[:, 0, 0], torch.tensor([1.0, -1, -1]))


def test_bytes_read_as_the_file_does(tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    assert torch.equal(read_image(path.read_bytes(), channels=3), read_image(str(path), channels=3))


@pytest.mark.parametrize("name", ["猫 и кот.png", "a b  c.PNG", "é\u0301.png", "a" * 251 + ".png", "%s {x} 'q'.png"])
def test_unicode_spaces_and_the_longest_names_are_read_and_written(tmp_path, name):
    if len(os.fsencode(name)) > 255:
        pytest.skip("longer than this system's names")
    write_png(tmp_path / name, as_image(COLOURS))
    assert torch.equal(read_image(tmp_path / name, channels=3), as_image(COLOURS))
    assert list_images(tmp_path) == [tmp_path / name]


def test_the_content_decides_and_not_the_extension(tmp_path):
    save(tmp_path / "a.gif", COLOURS, format="PNG")
    assert torch.equal(read_image(tmp_path / "a.gif", channels=3), as_image(COLOURS))


# --- resizing ----------------------------------------------------------------------------------------------------------


def test_a_wide_image_is_cropped_at_its_centre_before_it_is_resized(tmp_path):
    values = np.zeros((4, 12), dtype=np.uint8)
    values[:, 4:8] = np.arange(16).reshape(4, 4) * 10
    values[:, :4] = 255
    path = save(tmp_path / "w.png", values)
    assert torch.equal(read_image(path, channels=1, size=(4, 4)), as_image(values[:, 4:8]))  # cropped only: exact
    tall = save(tmp_path / "t.png", values.T)
    assert torch.equal(read_image(tall, channels=1, size=(4, 4)), as_image(values[:, 4:8].T))


def test_the_target_is_height_by_width_and_values_stay_in_range(tmp_path):
    noise = np.random.default_rng(0).choice([0, 255], (40, 50)).astype(np.uint8)
    path = save(tmp_path / "n.png", noise)
    for size in [(16, 24), (80, 60), (1, 1), (1, 33), (33, 1)]:
        image = read_image(path, channels=3, size=size)
        assert image.shape == (3, *size)
        assert image.abs().max() <= 1  # bicubic overshoots black and white


def test_resizing_is_antialiased_and_keeps_a_flat_image_flat(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = read_image(save(tmp_path / "c.png", checkers), channels=1, size=(8, 8))
    assert small.abs().max() < 0.05  # the mean gray; without antialiasing it would be black or white
    flat = read_image(save(tmp_path / "f.png", np.full((30, 20), 77, np.uint8)), channels=1, size=(8, 8))
    torch.testing.assert_close(flat, torch.full((1, 8, 8), 77 / 127.5 - 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("channels", "size"), [(2, None), (4, None), (3, (0, 8)), (3, (8,))])
def test_senseless_channels_and_sizes_are_refused(tmp_path, channels, size):
    with pytest.raises(RequestError, match=r"channels|size"):
        read_image(save(tmp_path / "a.png", COLOURS), channels=channels, size=size)


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [100_000, 11_000, 9_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, side):
    # 10,000, 121 and 81 MPixels: Pillow refuses the first, warns of the second and lets the third pass.
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 8, bytes(100)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(RequestError, match=r"bomb\.png.*too large|bomb\.png.*claims"):
            read_image(path, channels=3, size=(8, 8))


def test_the_limit_of_pixels_is_the_callers(tmp_path):
    path = save(tmp_path / "a.png", COLOURS)
    assert read_image(path, channels=3, max_pixels=24).shape == (3, 4, 6)
    with pytest.raises(RequestError, match=r"a\.png.*6 x 4 pixels, more than 23.*max_pixels"):
        read_image(path, channels=3, max_pixels=23)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused_and_named(tmp_path, extension, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / f"cut.{extension}", noise)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(RequestError, match=rf"cut\.{extension}.*(damaged|known format).*\."):
        read_image(path, channels=3)


def test_flipped_bytes_give_an_image_or_a_request_error_and_nothing_else(tmp_path):
    generator = np.random.default_rng(0)
    for extension in ("jpg", "png", "gif", "webp", "tif", "bmp", "jp2", "ppm"):
        try:
            whole = save(tmp_path / f"a.{extension}", np.tile(COLOURS, (4, 4, 1))).read_bytes()
        except (OSError, ValueError, KeyError):
            continue  # this Pillow lacks the format
        for _ in range(40):
            damaged = bytearray(whole)
            for place in generator.integers(0, min(len(whole), 200), 3):
                damaged[place] = generator.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    image = read_image(bytes(damaged), channels=3, size=(8, 8), max_pixels=10**6)
                except RequestError:
                    continue
            assert image.shape == (3, 8, 8)
            assert torch.isfinite(image).all()


def test_what_is_no_image_is_refused_and_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("I am no picture, whatever my name says.")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    vector = tmp_path / "e.eps"
    vector.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    cases = {
        text: r"text\.png.*not an image of a known format",
        empty: r"empty\.jpg.*empty \(0 bytes\)",
        vector: r"e\.eps.*not an image",
        tmp_path: "this is a folder",
        tmp_path / "none.png": r"none\.png.*no such file",
        text / "inner.png": "no such file",
        tmp_path / "pipe.png": "not a regular file",
    }
    os.mkfifo(tmp_path / "pipe.png")
    for path, said in cases.items():
        with pytest.raises(RequestError, match=said):
            read_image(path, channels=3)
    for data in (b"", b"nothing"):
        with pytest.raises(RequestError, match=r"0 bytes|<7 bytes>"):
            read_image(data, channels=3)


def test_an_unknown_colour_mode_is_refused(tmp_path):
    with pytest.raises(RequestError, match="LAB"):
        read_image(save(tmp_path / "l.tif", Image.new("LAB", (2, 2))), channels=3)


def _tiff(path: Path, side: int, bits: tuple[int, ...], data: bytes, *, photometric: int = 1, kind: int = 1, extra: int = -1):
    """Writes a little-endian TIFF of one strip, as no library of ours can."""
    whole = {256: side, 257: side, 259: 1, 262: photometric, 277: len(bits), 278: side, **({338: extra} if extra >= 0 else {})}
    tags = {tag: ("H", (value,)) for tag, value in whole.items()} | {258: ("H", bits), 339: ("H", (kind,) * len(bits))}
    tags |= {279: ("I", (len(data),)), 273: ("I", (0,))}
    beyond = 8 + 2 + 12 * len(tags) + 4
    tags[273] = ("I", (beyond + 4 * len(bits),))
    entries, packed = [], b""
    for tag, (form, values) in sorted(tags.items()):
        value = struct.pack(f"<{len(values)}{form}", *values)
        if len(value) > 4:
            value, packed = struct.pack("<I", beyond + len(packed)), packed + value
        entries.append(struct.pack("<HHI", tag, 3 if form == "H" else 4, len(values)) + value.ljust(4, b"\0"))
    packed = packed.ljust(4 * len(bits), b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(head + packed + data)
    return path


def test_tiff_of_12_bits_white_is_zero_and_premultiplied_alpha_has_its_true_values(tmp_path):
    # two values of 12 bits in three bytes: 4095 is white
    twelve = _tiff(tmp_path / "12.tif", 2, (12,), bytes([0xFF, 0xF0, 0x00, 0x80, 0x07, 0xFF]))
    torch.testing.assert_close(
        read_image(twelve, channels=1), torch.tensor([[[1.0, -1.0], [2 * 2048 / 4095 - 1, 2 * 2047 / 4095 - 1]]])
    )
    values = np.array([[0, 65535], [16384, 40000]])
    right = torch.from_numpy(1 - values / 65535 * 2)[None].float()
    for name, kind, data in (("16", 1, values.astype("<u2")), ("float", 3, (values / 65535).astype("<f4"))):
        bits = (data.dtype.itemsize * 8,)
        inverted = _tiff(tmp_path / f"{name}.tif", 2, bits, data.tobytes(), photometric=0, kind=kind)
        torch.testing.assert_close(read_image(inverted, channels=1), right)
    for kind, data in ((2, values.astype("<u2")), (2, np.zeros((2, 2), np.int8))):
        with pytest.raises(RequestError, match="signed"):
            read_image(_tiff(tmp_path / "s.tif", 2, (data.dtype.itemsize * 8,), data.tobytes(), kind=kind), channels=1)
    # half-transparent black and white, times their opacity, on white paper: 127.5 and 255
    half = np.array([[[0, 128], [128, 128]]] * 2, np.uint8)
    gray = read_image(_tiff(tmp_path / "la.tif", 2, (8, 8), half.tobytes(), extra=1), channels=1)
    torch.testing.assert_close(gray, torch.tensor([[[127 / 127.5 - 1, 1.0]] * 2]))
    colours = np.concatenate([half[..., :1]] * 3 + [half[..., 1:]], 2)
    read = read_image(_tiff(tmp_path / "rgba.tif", 2, (8,) * 4, colours.tobytes(), photometric=2, extra=1), channels=3)
    torch.testing.assert_close(read, gray.expand(3, -1, -1), atol=1.1 / 127.5, rtol=0)


def test_the_transparent_colour_of_a_png_is_white_at_every_depth(tmp_path):
    def png(bits: int, colour: int, row: bytes, transparent: bytes) -> bytes:
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)), (b"tRNS", transparent)]
        chunks += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        return b"\x89PNG\r\n\x1a\n" + body

    white = torch.tensor(1.0)
    wide = read_image(png(16, 0, struct.pack(">HH", 1000, 2000), struct.pack(">H", 1000)), channels=1)
    torch.testing.assert_close(wide[0, 0], torch.tensor([1.0, 2000 / 32767.5 - 1]))
    narrow = read_image(png(4, 0, bytes([0x35]), struct.pack(">H", 3)), channels=1)
    torch.testing.assert_close(narrow[0, 0], torch.tensor([1.0, 5 * 17 / 127.5 - 1]))
    colours = struct.pack(">6H", 256, 512, 768, 0x1000, 0x2000, 0x3000)
    colour = read_image(png(16, 2, colours, struct.pack(">3H", 256, 512, 768)), channels=3)
    torch.testing.assert_close(colour[:, 0, 0], white.expand(3))
    assert float(colour[0, 0, 1]) == pytest.approx(0x10 / 127.5 - 1)


@pytest.mark.parametrize("dark", ["gray", "colour"])
def test_a_16_bit_file_that_holds_8_bits_is_pointed_out_once_for_its_folder(tmp_path: Path, dark: str):
    values = np.full((4, 4), 200, np.uint16)
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        if dark == "gray":
            Image.fromarray(values).save(file)
        else:
            rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
            file.write_bytes(png(4, 4, 16, rows))
    with pytest.warns(UserWarning, match=r"a\.png' has more than 8 bits, in which white is 65535, but .* save it as 8-bit PNG"):
        read_image(files[0], channels=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(files[1], channels=1)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "right.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "right.png", channels=1)
