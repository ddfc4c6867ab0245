"""Small sweeps of digits, and rows made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handful.data.images import write_png
from handful.sweep import SweepRequest, sweep_from
from handful.sweep.columns import KEYS, SPLITS
from handful.sweep.columns import numbers as numbers_
from handful.zoo.digits import load_digits_split

CLASSES = ("1", "4")
TIMED = ("seconds", "cost_ratio")  # what no two runs have alike


def write_digits(root: Path, per_class: int = 16) -> Path:
    """Real digits of two classes: `root/pool` to draw exemplars from, `root/real` held out."""
    split = load_digits_split()
    parts = {"pool": (split.train_images, split.train_labels), "real": (split.test_images, split.test_labels)}
    for part, (images, labels) in parts.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for place, image in enumerate(images[labels == int(name)][:per_class]):
                write_png(root / part / name / f"{place:02d}.png", image)
    return root


def digits_data(root: Path, **changes: Any) -> dict[str, Any]:
    """Plain data of a sweep that takes seconds."""
    return {
        "recipe": {
            "model": {"name": "digits"},
            "exemplars": {"path": str(root / "pool")},
            "classes": list(CLASSES),
            "per_class": 8,
            "cohort": 8,
            "sampler": {"steps": 3},
        },
        "methods": {
            "none": {"guidance": []},
            "chamfer": {"guidance": [{"method": "chamfer", "features": "pixels"}], "scales": [0.1, 0.3]},
        },
        "k": [4],
        "seeds": [0],
        "real": str(root / "real"),
        "judge": "digits-judge",
        "neighbours": 3,
        "audit": False,
        "utility": None,
        "objective": "coverage",
        **changes,
    }


def digits_sweep(root: Path, **changes: Any) -> SweepRequest:
    return sweep_from(digits_data(root, **changes))


def made_up(
    settings: Mapping[tuple[str, float, int], Mapping[str, Sequence[float]]], test: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Rows of settings from each column's values by seed; on the test half every value is higher by what `test` says."""
    rows = []
    for (method, scale, k), columns in settings.items():
        for seed in range(len(next(iter(columns.values())))):
            for split in SPLITS:
                numbers: dict[str, Any] = dict.fromkeys(numbers_())
                for name, values in columns.items():
                    numbers[name] = values[seed] + ((test or {}).get(name, 0.0) if split == "test" else 0.0)
                rows.append({"method": method, "scale": scale, "k": k, "seed": seed, "split": split, "images": 10, **numbers})
    assert set(rows[0]) == {*KEYS, *numbers_()}
    return rows


def timeless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what only the clock decides."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]
