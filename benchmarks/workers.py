"""How much faster several workers are than one: `--workers 2` and Ray with two actors against one process, one thread each.

    OMP_NUM_THREADS=1 python benchmarks/workers.py --save-json workers.json

The goals: 1.85 with two workers, 1.7 with Ray, median of three, on a machine where nobody else computes. Each run makes the
same images in a new directory. Its rate is that of the second half of its cohorts, when all workers are there: imports and the
loading of the model, which a long run does not feel, are left out; the whole time is printed beside it. All runs must have the
same SHA-256 of every image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from handful.generate.job import prepare
from handful.generate.ray_engine import run_by_ray
from handful.generate.run import run
from handful.generate.workers import run_with_workers
from handful.recipe.schema import recipe_from

WAYS = ("one", "workers", "ray")


def measured(way: str, recipe: Any, out: Path) -> dict[str, Any]:
    """One run: seconds in all, images a second while all work, and what identifies the images."""
    began = time.monotonic()
    job = prepare(recipe, out)
    if way == "one":
        run(job)
    elif way == "workers":
        run_with_workers(job, recipe, 2)
    else:
        run_by_ray(job, recipe, 2)
    seconds = time.monotonic() - began
    markers = sorted(path.stat().st_mtime for path in (out / ".handful" / "cohorts").iterdir())
    half = len(markers) // 2
    rate = (len(markers) - 1 - half) * recipe.cohort / (markers[-1] - markers[half])
    images = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "images").rglob("*.png"))]
    return {"seconds": seconds, "images_per_second": rate, "images": hashlib.sha256(repr(images).encode()).hexdigest()}


def main() -> None:
    """Measures all ways in turn, and again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=12, help="of ten classes")
    parser.add_argument("--cohort", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them; the first is compared with")
    parser.add_argument("--save-json", type=Path)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    wanted = {"model": {"name": "cifar10"}, "per_class": asked.per_class, "cohort": asked.cohort, "sampler": {"steps": 6}}
    ways = asked.ways.split(",")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        os.environ["HANDFUL_CACHE"] = str(Path(name) / "cache")
        recipe = recipe_from(wanted)
        for number in range(asked.repeat):
            for way in ways:
                load = os.getloadavg()[0]
                one = measured(way, recipe, Path(name) / f"{ways.index(way)}-{number}") | {"load_before": load}
                found[way].append(one)
                print(
                    f"{way}: {one['images_per_second']:.2f} images/s, {one['seconds']:.1f} s in all, load {load:.1f}",
                    flush=True,
                )
    assert len({one["images"] for runs in found.values() for one in runs}) == 1, "the images differ"
    rates = {way: median(one["images_per_second"] for one in runs) for way, runs in found.items()}
    times = {way: rate / rates[ways[0]] for way, rate in rates.items()}
    print("times the first: " + ", ".join(f"{way} {each:.2f}" for way, each in times.items()))
    if asked.save_json:
        asked.save_json.write_text(
            json.dumps({"recipe": wanted, "runs": found, "median": rates, "times": times}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
