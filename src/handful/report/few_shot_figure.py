"""The picture of a few-shot run, as in CRDI's figures: targets, reconstructions by eta, generated images, and a map of all.

targets        | 1 | 2 | 3 | ...        t-SNE
eta = 1        | 1'| 2'| 3'|            .  . *
eta = 15       | 1"| 2"| 3"|             * . .
generated      |   |   |   |            legend
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from handful.errors import RequestError, counted
from handful.metrics.perceptual import as_image_pair
from handful.report.feature_map import MOST, bounded_perplexity, draw_map, feature_map
from handful.runs.contact_sheet import draw_tiles, label_font, tile_size

_GAP, _MARGIN, _EDGE = 2, 12, 4
_SMALLEST_MAP, _LARGEST_MAP = 340, 560  # pixels
_PAPER, _INK, _BETWEEN = (255, 255, 255), (30, 30, 30), (205, 205, 205)  # white images must not run into each other
_TARGETS, _RECONSTRUCTED, _GENERATED = (214, 118, 20), (0, 114, 178), (120, 120, 120)


def few_shot_figure_png(
    targets: Tensor,
    generated: Tensor,
    *,
    reconstructions: Mapping[int | str, Tensor] | None = None,
    features: Mapping[str, Any] | None = None,
    columns: int = 10,
    rows: int = 3,
    perplexity: float = 30.0,
    seed: int = 0,
    title: str = "t-SNE",
) -> bytes:
    """The picture as the bytes of a PNG (`handful.data.images.write_atomically` writes them).

    Args:
        targets: (k, c, h, w) in [-1, 1].
        generated: (n, c, h, w); the first ones are shown.
        reconstructions: By eta, (k, c, h, w): image i of target i, drawn below it. A whole number is labelled "eta = 8", a
            text as it is.
        features: (n, D) by the name of the set, for the map: "source", "held-out targets", "generated", "targets", or others.
            None: no map.
        columns: Images in a row at most; of more targets the first ones are shown, and the label says so.
        rows: Rows of generated images at most.
        perplexity, seed: Of the map (`feature_map`).
        title: Of the map; the perplexity that was used is added.

    Raises:
        RequestError: If a set is empty, sets differ in size or channels, a row does not fit the targets in number, or the
            features can't be mapped.
    """
    if columns < 1 or rows < 1:
        raise RequestError("columns", (columns, rows), "there is nothing to draw", "Give at least one column and one row.")
    targets, generated = as_image_pair(targets, generated, "targets", "generated")
    shown = f"targets ({columns} of {len(targets)})" if len(targets) > columns else "targets"
    lines = [(shown, targets[:columns], _TARGETS)]
    for eta, images in (reconstructions or {}).items():
        name = f"eta = {eta}" if isinstance(eta, int) else str(eta)
        images = as_image_pair(targets, images, "targets", f"reconstructions, {name}")[1]
        if len(images) != len(targets):
            problem = f"this is the number of images, for {counted(len(targets), 'target')}"
            raise RequestError(f"reconstructions, {name}", len(images), problem, "Give one for each target, in their order.")
        lines.append((name, images[:columns], _RECONSTRUCTED))
    for place, part in enumerate(generated[: columns * rows].split(columns)):
        lines.append(("" if place else "generated", part, _GENERATED))

    images = _images(lines)
    panels = [images]
    if features is not None:
        side = min(_LARGEST_MAP, max(_SMALLEST_MAP, images.height - 20 * (len(features) + 1) - 6))
        used = bounded_perplexity(sum(min(len(values), MOST) for values in features.values()), perplexity)
        places = feature_map(features, perplexity=perplexity, seed=seed)
        panels.append(draw_map(places, side, f"{title}, perplexity {used:.3g}"))
    sheet = Image.new(
        "RGB",
        (sum(one.width for one in panels) + _MARGIN * (2 * len(panels)), max(one.height for one in panels) + 2 * _MARGIN),
        _PAPER,
    )
    left = _MARGIN
    for panel in panels:
        sheet.paste(panel, (left, _MARGIN))
        left += panel.width + 2 * _MARGIN
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    return encoded.getvalue()


def _images(lines: list[tuple[str, Tensor, tuple[int, int, int]]]) -> Image.Image:
    """The rows of images with their labels at the left."""
    font = label_font()
    height, width = tile_size(*lines[0][1].shape[-2:])
    gutter = math.ceil(max(font.getlength(label) for label, _, _ in lines)) + 8
    most = max(len(images) for _, images, _ in lines)
    breaks = sum(before[2] != after[2] for before, after in pairwise(lines))
    size = (gutter + _EDGE + _GAP + most * (width + _GAP), _GAP + len(lines) * (height + _GAP) + breaks * 3 * _GAP)
    panel = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(panel)
    top, kind = _GAP, lines[0][2]
    for label, images, colour in lines:
        top += 3 * _GAP if colour != kind else 0
        kind = colour
        draw.text((0, top + height / 2), label, _INK, font, anchor="lm")
        draw.rectangle((gutter, top, gutter + _EDGE - 1, top + height - 1), colour)
        end = gutter + _EDGE + _GAP + len(images) * (width + _GAP) - 1
        draw.rectangle((gutter + _EDGE, top - _GAP, end, top + height + _GAP - 1), _BETWEEN)
        for place, image in enumerate(draw_tiles(images, (height, width))):
            panel.paste(image, (gutter + _EDGE + _GAP + place * (width + _GAP), top))
        top += height + _GAP
    return panel
