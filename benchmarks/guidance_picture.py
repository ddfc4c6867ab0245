"""The same noise under several guidances, a line each: docs/classifier.png and docs/exemplars.png.

python benchmarks/guidance_picture.py classifier /tmp/methods-cifar10 docs/classifier.png    (guidance_methods.py cifar10)
python benchmarks/guidance_picture.py exemplars demo-cifar10 docs/exemplars.png              (handful demo --model cifar10)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Nothing that compares pixels with exemplars: that draws near images of the data set, which are not ours to show.
LINES = {
    "classifier": {
        "none": "sweep/sets/none/scale-0.0/seed-0",
        "CFG, w = 2.5": "sweep/sets/cfg/scale-2.5/seed-0",
        "classifier": "sweep/sets/classifier/scale-0.3/seed-0",
        "classifier, Softplus 3": "sweep/sets/softplus3/scale-0.3/seed-0",
        "CFG and classifier": "sweep/sets/cfg+classifier/scale-5.0/seed-0",
    },
    "exemplars": {
        "none": "seed-0/none",
        "CFG, w = 2.5": "seed-0/cfg-w2.5",
        "energy, k = 32": "seed-0/energy-k32",
        "energy and sparse CFG": "seed-0/energy+cfg-k32",
    },
}
CLASSES = {"classifier": ("automobile", "horse"), "exemplars": ("automobile", "horse", "ship")}
COLUMNS = {"classifier": 14, "exemplars": 18}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=LINES)
    parser.add_argument("sets", type=Path, help="the --out of what made the sets")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    lines, classes, columns = LINES[args.kind], CLASSES[args.kind], COLUMNS[args.kind]
    each = columns // len(classes)
    side = 9.3 / columns  # inches
    figure = Figure(figsize=(11, 1.1 * side * len(lines)), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, gridspec_kw={"wspace": 0.03, "hspace": 0.06})
    for row, (title, folder) in enumerate(lines.items()):
        for column in range(columns):
            axis = axes[row][column]
            file = args.sets / folder / "images" / classes[column // each] / f"{column % each:06d}.png"
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
