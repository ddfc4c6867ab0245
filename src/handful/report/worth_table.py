"""The table of `handful utility`."""

from __future__ import annotations

import textwrap

from handful.errors import counted
from handful.judge.worth import Tested, Worth
from handful.report.tables import WIDTH, Table


def worth_table(found: Worth) -> Table:
    """A line for each way to train: accuracy on the test images, its worst class, and on every further test set."""
    tests = list(found.rows[0].tests)
    table = Table(
        f"trained: {found.network}; {found.seeds} of each, {counted(found.steps, 'step')}",
        ["trained on", "images", "exemplars in a batch", *(head for name in tests for head in (name, "worst class"))],
    )
    for row in found.rows:
        cells = [cell for name in tests for cell in (accuracy_text(row.tests[name]), worst_text(row.tests[name]))]
        table.rows.append(
            [row.name, str(row.images), "-" if row.share is None else f"{row.share:.0%}".replace("%", " %"), *cells]
        )
    notes = [
        "Each number is an accuracy"
        + (f", ± its standard deviation over {found.seeds} trainings" if found.seeds > 1 else "")
        + f". Changes made to the training images: {found.augmentation}. These, and the share of exemplars in a batch, were"
        " chosen by training on one half of the exemplars and testing on the other half.",
        *found.notes,
        found.sentence,
    ]
    table.notes = [line for note in notes for line in textwrap.wrap(note, WIDTH, break_long_words=False)]
    return table


def accuracy_text(tested: Tested) -> str:
    """`0.913 ±0.004`."""
    return f"{tested.mean:.3f}" + ("" if tested.spread is None else f" ±{tested.spread:.3f}")


def worst_text(tested: Tested) -> str:
    """`cat: 0.71`."""
    name, value = tested.worst
    return f"{name if len(name) <= 20 else name[:17] + '...'}: {value:.2f}"
