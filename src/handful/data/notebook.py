"""How results show themselves in a notebook: a table, a row of pictures. Everything from users is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from handful.data.images import encode_png
from handful.errors import counted

_CLASSES, _IMAGES = 20, 8  # of a contact sheet at most
_PICTURE = "height:48px;image-rendering:pixelated;margin:1px"


def html_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] = ()) -> str:
    """A table; numbers are shortened, None is a dash."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(cell))}</td>' for cell in row)}</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def html_images(title: str, images: Mapping[str, Tensor]) -> str:
    """By class a row of images (n, c, h, w) in [-1, 1]: the first ones of the first classes."""
    rows = []
    for name, of_class in list(images.items())[:_CLASSES]:
        pictures = "".join(
            f'<img src="{png_uri(encode_png(image))}" alt="" style="{_PICTURE}">' for image in of_class[:_IMAGES]
        )
        rows.append(f"<tr><th>{escape(name)}</th><td>{pictures}</td><td>{len(of_class)}</td></tr>")
    more = f"<p>and {counted(len(images) - _CLASSES, 'more class')}</p>" if len(images) > _CLASSES else ""
    return f"<table><caption>{escape(title)}</caption><tbody>{''.join(rows)}</tbody></table>{more}"


def png_uri(content: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
