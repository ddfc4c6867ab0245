"""`handful demo --model digits`: the main job on 8x8 digits, with a packaged model that has collapsed onto typical ones.

Exemplars are drawn from the real training digits; 64 images of each class are generated without guidance, with
classifier-free guidance and with Chamfer and energy guidance; each set is judged by the packaged judge, which no guide
knows, on the held-out digits; and a small classifier trained on each set alone is tested on them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from handful.data.exemplars import Exemplars
from handful.data.images import LabelledImages, read_folder
from handful.demo.compared import Demo, Entry, Row, Say, begin, check_size, write_real
from handful.features.registry import load_extractor
from handful.generate.run import same_arithmetic
from handful.judge.measure import Referee, Training, train_on
from handful.runs.contact_sheet import contact_sheet
from handful.zoo.digits import CLASSES, load_digits_split

EXEMPLARS = (2, 4, 8, 16, 32)  # k, a class
HEADLINE = Entry("chamfer", 32, says={"guidance": [{"method": "chamfer", "margin": 0.0}]})  # what the picture shows
TITLE = "digits, judged by a classifier that guided nothing"
COLUMNS = {
    "precision": "precision",
    "coverage": "coverage",
    "f1": "F1",
    "recall": "recall",
    "frechet": "Frechet",
    "robust_precision": "rob.prec",
    "robust_coverage": "rob.cov",
    "copied": "copied",
    "utility": "utility",
    "seconds": "seconds",
}
NOTES = (
    "rob.: after mild transforms of real and generated images alike.  copied: share nearer to an exemplar than 99 % of",
    "held-out real digits are (against 32 exemplars where none guided).  utility: accuracy on held-out real digits of a",
    "small classifier trained on the set alone.  seconds: of sampling.",
)
SIZE = (8, 8)
# without augmentation: what the classifier learns of the digits' variety is then in the set, or nowhere
TRAINING = Training(steps=200, augment=False)

ENTRIES = [
    Entry("none"),
    *(Entry("cfg", 0, scale, {"guidance": [{"method": "cfg", "scale": scale}]}) for scale in (0.5, 1.0, 2.0)),
    *(Entry("chamfer", k, says=HEADLINE.says) for k in EXEMPLARS),
    Entry("chamfer-margin", HEADLINE.k, says={"guidance": [{"method": "chamfer", "margin": 0.75}]}),
    *(Entry("energy", k, says={"guidance": [{"method": "energy"}]}) for k in EXEMPLARS),
]


def demo(out: str | Path, *, seeds: int = 3, per_class: int = 64, say: Say = lambda text: None) -> list[Row]:
    """Runs the demo, or goes on with one that was interrupted.

    Args:
        out: A new or empty directory, or one with a demo of the same settings.
        seeds: How often everything is repeated, exemplars drawn anew each time.
        per_class: Images generated of each class, and guided together.
        say: Called with a line on what is done.

    Returns:
        A row for each method, scale, k and seed, as in `results.json`.

    Raises:
        RequestError: If `out` holds something else, or the settings make no sense.
        RunError: If a set can't be generated.
    """
    check_size(seeds, per_class)
    out = Path(out)
    rows = begin(out, {"demo": "digits", "per_class": per_class})
    pool = write_digits(out)
    held_out = read_folder(out / "real-held-out", channels=1, size=SIZE)

    def drawn(k: int, seed: int) -> dict[str, torch.Tensor]:
        return Exemplars.from_folder(pool, channels=1, size=SIZE, k=k, seed=seed).images

    with same_arithmetic(1):  # small images: a second thread costs more in waking up than it brings
        referee = Referee(held_out, load_extractor("digits-judge"), classes=CLASSES)

        def measure(entry: Entry, seed: int, made: LabelledImages) -> Row:
            measured = referee.row(made, drawn(entry.k or HEADLINE.k, seed), train_on(made, CLASSES, TRAINING, seed))
            del measured["utility_spread"]  # of one classifier there is none
            return measured

        shared = {"per_class": per_class, "cohort": per_class}
        made = Demo("digits", ENTRIES, shared, measure, ("coverage", "utility", "seconds"), str(pool), (1, *SIZE))
        rows = made.run(out, rows, seeds, say)
    contact_sheet(drawn(HEADLINE.k, 0), made.made(out, HEADLINE).by_class(), out / "contact_sheet.png")
    return rows


def write_digits(out: Path) -> Path:
    """Writes the real digits to `out`/real-train, which it returns, and `out`/real-held-out."""
    split, pool = load_digits_split(), out / "real-train"
    write_real(pool, split.train_images, split.train_labels, CLASSES)
    write_real(out / "real-held-out", split.test_images, split.test_labels, CLASSES)
    return pool
