"""The picture of docs/classifier.png: the same noise under several guidances, from a benchmark's directory.

python benchmarks/guidance_picture.py /tmp/methods-cifar10 docs/classifier.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# no method with exemplars: those draw near images of the data set, which are not ours to show
ROWS = {
    "none": "none/scale-0.0/seed-0",
    "CFG, w = 2.5": "cfg/scale-2.5/seed-0",
    "classifier": "classifier/scale-0.3/seed-0",
    "classifier, Softplus 3": "softplus3/scale-0.3/seed-0",
    "CFG and classifier": "cfg+classifier/scale-5.0/seed-0",
}
CLASSES = ("automobile", "horse")
IMAGES = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="the --out of guidance_methods.py cifar10")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    figure = Figure(figsize=(11, 3.9), dpi=110)
    FigureCanvasAgg(figure)
    columns = len(CLASSES) * IMAGES
    axes = figure.subplots(len(ROWS), columns, gridspec_kw={"wspace": 0.03, "hspace": 0.06})
    for row, (title, folder) in enumerate(ROWS.items()):
        for column in range(columns):
            axis = axes[row][column]
            file = args.benchmark / "sweep/sets" / folder / "images" / CLASSES[column // IMAGES] / f"{column % IMAGES:06d}.png"
            axis.imshow(Image.open(file), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[row][0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(left=0.15, right=0.995, top=0.99, bottom=0.01)
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
