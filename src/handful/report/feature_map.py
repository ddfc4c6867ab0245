"""A map of feature sets: t-SNE (van der Maaten & Hinton, 2008) by scikit-learn, drawn with Pillow alone.

Near points of the map are near in feature space; distances between far groups, and the sizes of groups, say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from handful.errors import RequestError
from handful.metrics._features import as_features, require_same_width
from handful.runs.contact_sheet import label_font

# Okabe and Ito's colours, which colour-blind people tell apart; and a shape each, for those who see none.
_KNOWN = {
    "source": ((160, 160, 160), "dot"),
    "held-out targets": ((0, 114, 178), "square"),
    "generated": ((230, 159, 0), "dot"),
    "targets": ((200, 30, 30), "star"),
}
_OTHERS = [((0, 158, 115), "square"), ((204, 121, 167), "dot"), ((86, 180, 233), "square"), ((120, 80, 20), "dot")]
MOST = 500  # images of a set: a map of thousands takes minutes and shows no more
_PAPER, _INK, _EDGE = (255, 255, 255), (30, 30, 30), (200, 200, 200)
_FINE = 4  # drawn so much larger and reduced, for smooth edges
_RADIUS = {"dot": 3.0, "square": 2.6, "star": 9.0}
_LINE = 20  # pixels: a line of the legend


def bounded_perplexity(n: int, perplexity: float = 30.0) -> float:
    """The perplexity for n points: as asked, but at most (n - 1) / 3, so that it stays below the number of neighbours.

    Raises:
        RequestError: For fewer than 4 points, or a perplexity below 1.
    """
    if n < 4:
        raise RequestError("features", n, "too few images for a map", "Give 4 or more in all.")
    if not perplexity >= 1:
        raise RequestError(
            "perplexity", perplexity, "the perplexity (a number of neighbours) is too small", "Give 1 or more; 30 is usual."
        )
    return min(float(perplexity), (n - 1) / 3)


def feature_map(
    features: Mapping[str, Any], *, perplexity: float = 30.0, seed: int = 0, most: int = MOST
) -> dict[str, np.ndarray]:
    """Places of all images on one map, where like lies by like.

    Args:
        features: (n, D) by the name of the set; numpy arrays or torch tensors of one extractor.
        perplexity: About how many neighbours count; bounded by `bounded_perplexity`.
        seed: Of the map, and of the draw where a set is too large.
        most: Images of a set to draw.

    Returns:
        (n, 2) float64 by name. The same for the same features on one machine; other processors may round otherwise.

    Raises:
        RequestError: Bad features, different D, fewer than 4 images in all, or all alike.
    """
    from sklearn.manifold import TSNE  # a second to import

    sets: dict[str, np.ndarray] = {}
    for name, given in features.items():
        values = as_features(given, f"features of {name}")
        if sets:
            first = next(iter(sets))
            require_same_width(sets[first], values, f"features of {first}", f"features of {name}")
        if len(values) > most:
            values = values[np.sort(np.random.default_rng(seed).permutation(len(values))[:most])]
        sets[name] = values.astype(np.float64)
    perplexity = bounded_perplexity(sum(map(len, sets.values())), perplexity)
    together = np.concatenate(list(sets.values()))
    together -= together.mean(0)
    if np.ptp(together, axis=0).max() == 0:
        raise RequestError(
            "features", len(together), "all images have the same features, so no map can be drawn", "Check the extractor."
        )
    start = "pca" if together.shape[1] > 1 else "random"
    places = TSNE(perplexity=perplexity, init=start, random_state=seed, n_jobs=1).fit_transform(together)
    ends = np.cumsum([len(values) for values in sets.values()])[:-1]
    return dict(zip(sets, np.split(places.astype(np.float64), ends), strict=True))


def draw_map(places: Mapping[str, np.ndarray], side: int, title: str = "") -> Image.Image:
    """Draws a map: a square of `side` pixels, its title above and a legend with counts below.

    Args:
        places: (n, 2) by the name of the set; later sets are drawn over earlier ones, `targets` over all.
        side: Pixels.
        title: A line of text.

    Raises:
        RequestError: If there is no point, or a place is no finite pair.
    """
    points = {name: as_features(values, f"places of {name}") for name, values in places.items() if len(values)}
    if not points or any(values.shape[1] != 2 for values in points.values()):
        raise RequestError("places", list(places), "there is nothing to draw", "Give (n, 2) places of at least one set.")
    others = iter(_OTHERS * len(points))
    styles = {name: _KNOWN.get(name) or next(others) for name in points}
    font = label_font()
    entries = [f"{name} ({len(values)})" for name, values in points.items()]
    width = max(side, math.ceil(max(font.getlength(text) for text in (title, *entries))) + 24)
    panel = Image.new("RGB", (width, _LINE + side + 6 + _LINE * len(entries)), _PAPER)
    panel.paste(_scattered(points, styles, side), (0, _LINE))

    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), title, _INK, font)
    top = _LINE + side + 6
    for text, name in zip(entries, points, strict=True):
        colour, shape = styles[name]
        mark = Image.new("RGB", (20 * _FINE, _LINE * _FINE), _PAPER)
        _mark(ImageDraw.Draw(mark), 10 * _FINE, _LINE * _FINE / 2, colour, shape)
        panel.paste(mark.resize((20, _LINE), Image.Resampling.LANCZOS), (0, top))
        draw.text((24, top + 1), text, _INK, font)
        top += _LINE
    return panel


def _scattered(
    points: Mapping[str, np.ndarray], styles: Mapping[str, tuple[tuple[int, int, int], str]], side: int
) -> Image.Image:
    together = np.concatenate(list(points.values()))
    low, span = together.min(0), float(np.ptp(together, axis=0).max()) or 1.0
    inner = side - 28  # room for half a star at the edges
    empty = (inner - np.ptp(together, axis=0) / span * inner) / 2  # one scale for both axes: the map stays centred
    canvas = Image.new("RGB", (side * _FINE, side * _FINE), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, side * _FINE - 1, side * _FINE - 1), outline=_EDGE, width=_FINE)
    for name in sorted(points, key=lambda one: one == "targets"):  # stable: targets last, the others as they come
        for x, y in (14 + empty + (points[name] - low) / span * inner) * _FINE:
            _mark(draw, x, y, *styles[name])
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, colour: tuple[int, int, int], shape: str) -> None:
    radius = _RADIUS[shape] * _FINE
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "dot":
        draw.ellipse(box, colour)
    elif shape == "square":
        draw.rectangle(box, colour)
    else:
        corners = [
            (x + reach * math.sin(turn * math.pi / 5), y - reach * math.cos(turn * math.pi / 5))
            for turn in range(10)
            for reach in [radius if turn % 2 == 0 else radius * 0.42]
        ]
        draw.polygon(corners, colour, _INK, width=_FINE)
