"""How `handful evaluate` grows: images made up on disk, judged with the audit, the peak of memory, and a second time.

    python benchmarks/evaluate_scale.py --images 10000 --size 512 --judge cifar10-judge --out /tmp/scale

The goal: 10,000 + 10,000 images of 512 px below 4 GB, and at least 10 times faster the second time. Each evaluation is a
process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 10


def make(folder: Path, images: int, size: int, seed: int) -> None:
    """Smooth random pictures as JPEG, a folder per class; those that are there stay."""
    for place in range(images):
        file = folder / f"class {place % CLASSES}" / f"{place:06}.jpg"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            draw = np.random.default_rng([seed, place])
            small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((size, size), Image.Resampling.BICUBIC).save(file, quality=90)


def judged(made: Path, real: Path, judge: str, cache: Path) -> dict[str, float]:
    """One evaluation in a process of its own: seconds, and the peak of memory in GB."""
    command = [sys.executable, "-m", "handful.cli", "evaluate", str(made), "--real", str(real), "--judge", judge]
    began = time.monotonic()
    child = subprocess.Popen(
        [*command, "--json", "-q"], stdout=subprocess.PIPE, env={**os.environ, "HANDFUL_CACHE": str(cache)}
    )
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"handful evaluate failed: {status}")
    found = json.loads(text)
    return {
        "seconds": time.monotonic() - began,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "frechet": found["frechet"],
        "robust_f1": found["robust_f1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of each of the two sets")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--judge", default="cifar10-judge")
    parser.add_argument("--out", type=Path, required=True, help="images and cache go here; the images are kept")
    asked = parser.parse_args()
    cache = asked.out / f"cache-{time.time_ns()}"
    for name, seed in (("made", 0), ("real", 1)):
        make(asked.out / name, asked.images, asked.size, seed)
    runs = [judged(asked.out / "made", asked.out / "real", asked.judge, cache) for _ in range(2)]
    assert all(runs[0][name] == runs[1][name] for name in ("frechet", "robust_f1")), "what was kept gives other numbers"
    ratio = runs[0]["seconds"] / runs[1]["seconds"]
    print(
        json.dumps({"images": asked.images, "size": asked.size, "first": runs[0], "second": runs[1], "ratio": ratio}, indent=1)
    )


if __name__ == "__main__":
    main()
