"""Draws the README's picture from a finished demo: exemplars and three methods, a line each, for a few classes.

python tools/readme_picture.py demo-digits docs/digits.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from handful.data.exemplars import Exemplars
from handful.data.images import read_folder, to_uint8

ROWS = {"exemplars": None, "no guidance": "none", "CFG w = 1": "cfg-w1", "Chamfer, k = 32": "chamfer-k32"}
CLASSES, COLUMNS, FACTOR, TEXT, GAP = ("1", "4", "7"), 20, 4, 110, 8


def strip(images: torch.Tensor) -> Image.Image:
    """(n, 1, 8, 8) in [-1, 1] -> the first of them side by side, enlarged without smoothing."""
    joined = torch.nn.functional.pad(to_uint8(images[:COLUMNS]), (0, 1), value=255).permute(1, 2, 0, 3).flatten(2)[0]
    picture = Image.fromarray(joined.numpy())
    return picture.resize((picture.width * FACTOR, picture.height * FACTOR), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="directory of a finished handful demo --model digits")
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args()
    drawn = Exemplars.from_folder(args.demo / "real-train", channels=1, size=(8, 8), k=32, seed=0).images
    sets = {row: folder and read_folder(args.demo / "seed-0" / folder, channels=1, size=(8, 8)) for row, folder in ROWS.items()}
    lines = []
    for name in CLASSES:
        for row, made in sets.items():
            images = made.by_class()[name] if made else drawn[name]
            lines.append((row, strip(images)))
    height = lines[0][1].height + 4
    sheet = Image.new("L", (TEXT + lines[0][1].width, len(lines) * height + GAP * (len(CLASSES) - 1)), 255)
    draw = ImageDraw.Draw(sheet)
    for index, (row, picture) in enumerate(lines):
        top = index * height + GAP * (index // len(ROWS))
        draw.text((2, top + height // 2 - 8), row, 40, ImageFont.load_default(13))
        sheet.paste(picture, (TEXT, top))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
