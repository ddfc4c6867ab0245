"""Seconds and peak memory of the metrics at scale, beside what a user would write with scikit-learn.

    OMP_NUM_THREADS=2 python benchmarks/metrics_scale.py                     # 50,000 x 768, a few minutes
    OMP_NUM_THREADS=2 python benchmarks/metrics_scale.py --n 20000 --metrics prdc

The alternative holds the full distance matrices, so it runs at `--compare-n`, where handful runs too, in turns in this
same process: the ratio of the medians is what carries over to another machine. Memory is the peak of the resident set
above what it was with the features loaded (Linux; elsewhere it is left out).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from handful.metrics import frechet, prdc, vendi


def features(n: int, width: int, seed: int, spread: float) -> np.ndarray:
    """Features with the shape of a real extractor's: 50 clusters, a decaying spectrum, an offset."""
    rng = np.random.default_rng(seed)
    scales = np.arange(1, width + 1) ** -0.5
    centres = np.random.default_rng(0).standard_normal((50, width)) * scales
    found = np.empty((n, width), np.float32)
    for start in range(0, n, 4096):
        rows = found[start : start + 4096]
        noise = rng.standard_normal(rows.shape, np.float32)
        rows[:] = centres[rng.integers(0, 50, len(rows))] + spread * scales * noise + 1
    return found


def prdc_by_matrices(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The usual recipe: three full matrices by scikit-learn, radii by argpartition, open balls."""
    from sklearn.metrics import pairwise_distances

    def radii(points: np.ndarray) -> np.ndarray:
        distances = pairwise_distances(points)
        nearest = np.argpartition(distances, k + 1, axis=1)[:, : k + 1]
        return np.take_along_axis(distances, nearest, axis=1).max(axis=1)

    real_radii, generated_radii = radii(real), radii(generated)
    across = pairwise_distances(real, generated)
    held = across < real_radii[:, None]
    precision, recall = held.any(0).mean(), (across < generated_radii).any(1).mean()
    return float(precision), float(recall), float(held.sum() / (k * len(generated))), float(held.any(1).mean())


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB; nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def measure(work: Callable[[], object]) -> dict[str, object]:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or memory that the last measurement freed would hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 2), "peak_mb": round(resident("VmHWM") - before, 1), "result": str(result)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50_000, help="images in each set (default %(default)s)")
    parser.add_argument("--d", type=int, default=768, help="features per image (default %(default)s)")
    parser.add_argument("--k", type=int, default=5, help="neighbour (default %(default)s)")
    parser.add_argument("--block", type=int, default=2048, help="rows compared at once (default %(default)s)")
    parser.add_argument("--metrics", nargs="+", default=["prdc", "frechet", "vendi"], help="of: prdc frechet vendi")
    parser.add_argument("--compare-n", type=int, default=6000, help="images for the alternative; 0: none (default 6000)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the comparison (default %(default)s)")
    asked = parser.parse_args()

    real, generated = (features(asked.n, asked.d, seed, spread) for seed, spread in ((1, 1.0), (2, 0.9)))
    print(json.dumps({"n": asked.n, "d": asked.d, "features_mb": round((real.nbytes + generated.nbytes) / 1e6, 1)}))
    works = {
        "prdc": lambda: prdc(real, generated, asked.k, block=asked.block),
        "frechet": lambda: frechet(real, generated),
        "vendi": lambda: vendi(generated),
    }
    for name in asked.metrics:
        print(json.dumps({"metric": name, **measure(works[name])}), flush=True)

    if asked.compare_n:
        a, b = real[: asked.compare_n], generated[: asked.compare_n]
        ours, theirs = [], []
        for _ in range(asked.rounds):
            ours.append(measure(lambda: prdc(a, b, asked.k, block=asked.block)))
            theirs.append(measure(lambda: prdc_by_matrices(a, b, asked.k)))
            for who, turn in (("handful", ours[-1]), ("full matrices", theirs[-1])):
                print(json.dumps({"who": who, "n": asked.compare_n, **turn}), flush=True)
        ratio = {
            f"{what}_ratio": round(
                statistics.median(float(turn[what]) for turn in ours) / statistics.median(float(turn[what]) for turn in theirs),
                3,
            )
            for what in ("seconds", "peak_mb")
        }
        print(json.dumps({"handful over full matrices, medians": ratio}))


if __name__ == "__main__":
    main()
