"""One picture of a data set: class by class the exemplars, and below them what was generated.

Small images are enlarged by whole factors without smoothing, so that every pixel is seen as it is; only images larger
than a tile are made smaller.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from handful.data.images import to_uint8
from handful.errors import RequestError, counted
from handful.files.atomic import write_atomically

_TILE = 64  # pixels: what small images are enlarged towards
_LARGEST = 128  # pixels: what large ones are reduced to
_GAP, _MARGIN, _TEXT = 2, 12, 15
MOST_CLASSES = 40  # what more would show, nobody looks at; a sheet of 1,000 classes would have a billion pixels
_PAPER, _INK, _EXEMPLARS, _GENERATED = (255, 255, 255), (30, 30, 30), (214, 118, 20), (120, 120, 120)


def contact_sheet(
    exemplars: Mapping[str, Tensor], generated: Mapping[str, Tensor], path: str | Path, *, columns: int = 16, rows: int = 2
) -> None:
    """Draws the sheet and writes it as PNG.

    Args:
        exemplars: By class, (k, c, h, w) in [-1, 1]; one row of each class is shown, on an orange edge. May be empty.
        generated: By class, (n, c, h, w) in [-1, 1]; its order is the sheet's.
        path: The PNG file; written whole or not at all.
        columns, rows: How many generated images of each class are shown at most, the first ones.

    Raises:
        RequestError: There is nothing to draw.
    """
    write_atomically(Path(path), contact_sheet_png(exemplars, generated, columns=columns, rows=rows))


def contact_sheet_png(
    exemplars: Mapping[str, Tensor], generated: Mapping[str, Tensor], *, columns: int = 16, rows: int = 2
) -> bytes:
    """The sheet as the bytes of a PNG, the same for the same images; see `contact_sheet`."""
    classes = list(generated)
    if not classes or columns < 1 or rows < 1:
        problem = "there is nothing to draw"
        raise RequestError("contact_sheet", (len(classes), columns, rows), problem, "Give at least one class, column and row.")
    shown = classes[:MOST_CLASSES]
    height, width = generated[shown[0]].shape[-2:]
    tile = tile_size(height, width)
    columns = min(columns, max(max(len(generated[name]), len(exemplars.get(name, ()))) for name in shown))

    blocks = [_block(name, exemplars.get(name), generated[name], tile, columns, rows) for name in shown]
    note = f"and {counted(len(classes) - len(shown), 'more class')}" if len(classes) > len(shown) else ""
    full_width = max(block.width for block in blocks) + 2 * _MARGIN
    full_height = sum(block.height + _MARGIN for block in blocks) + _MARGIN + (_TEXT + _MARGIN if note else 0)
    sheet = Image.new("RGB", (full_width, full_height), _PAPER)
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, top))
        top += block.height + _MARGIN
    if note:
        ImageDraw.Draw(sheet).text((_MARGIN, top), note, _INK, label_font())
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def tile_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) at which images of this size are drawn."""
    factor = max(1, round(_TILE / max(height, width)))
    shrink = min(1.0, _LARGEST / max(height, width))
    return max(1, round(height * factor * shrink)), max(1, round(width * factor * shrink))


def _block(
    name: str, exemplars: Tensor | None, generated: Tensor, tile: tuple[int, int], columns: int, rows: int
) -> Image.Image:
    """A class: its name, a row of exemplars, rows of generated images."""
    given = exemplars if exemplars is not None and len(exemplars) else None
    lines = [] if given is None else [(given[:columns], _EXEMPLARS)]
    lines += [(part, _GENERATED) for part in generated[: columns * rows].split(columns)]
    label = name if len(name) <= 60 else name[:57] + "..."
    legend = "generated" if given is None else "exemplars above, generated below"
    font = label_font()
    height, width = tile
    edge = 4  # the coloured mark at the left of a line
    line_width = edge + _GAP + columns * (width + _GAP)
    text = f"{label}    {legend}"
    text_width = int(font.getlength(text)) + 1
    block = Image.new("RGB", (max(line_width, text_width), _TEXT + 9 + len(lines) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), label, _INK, font)
    draw.text((font.getlength(f"{label}    "), 0), legend, _GENERATED, font)
    top = _TEXT + 5
    for images, colour in lines:
        draw.rectangle((0, top, edge - 1, top + height - 1), colour)
        for place, image in enumerate(draw_tiles(images, tile)):
            block.paste(image, (edge + _GAP + place * (width + _GAP), top))
        top += height + (_GAP if colour == _GENERATED else 3 * _GAP)
    return block


def draw_tiles(images: Tensor, tile: tuple[int, int]) -> list[Image.Image]:
    """Images (n, c, h, w) in [-1, 1] at the (height, width) of a tile, in colour."""
    larger = tile[0] >= images.shape[-2] and tile[1] >= images.shape[-1]
    batch = images.float().clamp(-1, 1)
    sized = interpolate(batch, tile) if larger else interpolate(batch, tile, mode="bicubic", antialias=True)
    pixels = to_uint8(sized.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


@cache
def label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all labels."""
    return ImageFont.load_default(_TEXT)  # Pillow's own; the bitmap one, of fixed size, where it was built without FreeType
