"""How `handful evaluate` grows: images made up on disk, judged with the audit, the peak of memory, and a second time.

    python benchmarks/evaluate_scale.py --images 10000 --size 512 --workers 2 --out /tmp/scale

The goal: 10,000 + 10,000 images of 512 px below 4 GB, and at least 10 times faster the second time. Each evaluation is a
process of its own, so that its peak is its own (`all_processes_gb` adds the workers', which hold torch's code in common).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
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


def children(process: int) -> list[int]:
    """The processes that one has started."""
    with suppress(OSError):
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def peak(process: int) -> int:
    """The most memory that a process has held, in KiB; 0 where it is gone."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 0


def judged(made: Path, real: Path, judge: str, cache: Path, workers: int) -> dict[str, float]:
    """One evaluation in a process of its own: seconds, and the peak of memory of it and of each of its workers in GB."""
    command = [sys.executable, "-m", "handful.cli", "evaluate", str(made), "--real", str(real), "--judge", judge]
    command += ["--workers", str(workers)]
    began = time.monotonic()
    child = subprocess.Popen(
        [*command, "--json", "-q"], stdout=subprocess.PIPE, env={**os.environ, "HANDFUL_CACHE": str(cache)}
    )
    assert child.stdout is not None
    texts, peaks = [], Counter[int]()
    reader = threading.Thread(target=lambda: texts.append(child.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    while reader.is_alive():
        reader.join(1)
        for process in (child.pid, *children(child.pid)):
            peaks[process] = max(peaks[process], peak(process))
    _, status, usage = os.wait4(child.pid, 0)
    peaks[child.pid] = usage.ru_maxrss
    if status:
        raise SystemExit(f"handful evaluate failed: {status}")
    found = json.loads(texts[0])
    return {
        "seconds": time.monotonic() - began,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "all_processes_gb": sum(peaks.values()) * 1024 / 1e9,
        "frechet": found["frechet"],
        "robust_f1": found["robust_f1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of each of the two sets")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--judge", default="cifar10-judge")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="images and cache go here; the images are kept")
    asked = parser.parse_args()
    cache = asked.out / f"cache-{time.time_ns()}"
    for name, seed in (("made", 0), ("real", 1)):
        make(asked.out / name, asked.images, asked.size, seed)
    runs = [judged(asked.out / "made", asked.out / "real", asked.judge, cache, asked.workers) for _ in range(2)]
    assert all(runs[0][name] == runs[1][name] for name in ("frechet", "robust_f1")), "what was kept gives other numbers"
    ratio = runs[0]["seconds"] / runs[1]["seconds"]
    print(
        json.dumps({"images": asked.images, "size": asked.size, "first": runs[0], "second": runs[1], "ratio": ratio}, indent=1)
    )


if __name__ == "__main__":
    main()
