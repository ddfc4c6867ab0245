"""How a run's bookkeeping grows with the number of images: everything but the network's forward pass is the real code.

    python benchmarks/scale.py --classes 1000 --per-class 1000

Prints seconds and the largest memory of: preparing a new run, making half of it by a stub in place of the network (each image
the same 8 x 8 pixels), preparing it again (every file of what is done is read and hashed), 64 claimers in threads who share
the other half, and the end (manifest and contact sheet).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from handful.data.images import encode_png
from handful.generate.finish import finish, planned_rows
from handful.generate.job import Job, prepare
from handful.generate.run import Worker
from handful.generate.share import claims_of, work
from handful.recipe.plan import Cohort
from handful.recipe.schema import recipe_from
from handful.runs.manifest import DONE
from handful.runs.progress import Progress

IMAGE = encode_png(torch.zeros(1, 8, 8))


def save_model(folder: Path, labels: int) -> str:
    """An untrained network of so many labels, as diffusers writes it."""
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=labels,
    )
    network.save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    return str(folder)


def make(job: Job, cohort: Cohort) -> None:
    """What a network would have made, written and marked as every cohort is."""
    rows = [{**row, "sha256": sha256(IMAGE).hexdigest()} for row in planned_rows(job, cohort, DONE)]
    job.directory.commit(cohort, [IMAGE] * cohort.count, rows, job.schema)


@contextmanager
def measured(found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds, and the largest memory of this process up to the end, in GB."""
    began = time.perf_counter()
    yield
    found[name] = {
        "seconds": round(time.perf_counter() - began, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }
    print(f"{name}: {found[name]}", flush=True)


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--claimers", type=int, default=64)
    parser.add_argument("--format", default="webdataset")
    asked = parser.parse_args()
    found: dict[str, Any] = {"images": asked.classes * asked.per_class, "format": asked.format}
    with tempfile.TemporaryDirectory() as name:
        model = save_model(Path(name) / "model", asked.classes)
        recipe = recipe_from(
            {
                "model": {"name": model},
                "per_class": asked.per_class,
                "output": {"format": asked.format},
                "sampler": {"steps": 2},
            }
        )
        out = Path(name) / "out"
        with measured(found, "prepare"):
            job = prepare(recipe, out)
        half = job.cohorts[::2]
        with Worker(job), measured(found, "half of it made by a stub"):
            for cohort in half:
                make(job, cohort)
        with measured(found, "prepare again, half of it done"):
            job = prepare(recipe, out)
        assert len(job.done) == len(half)
        left = [cohort for cohort in job.cohorts if cohort.key not in job.done]
        made: list[str] = []

        def claimer(number: int) -> None:
            claims = claims_of(job)

            def mark(cohort: Cohort, claim: int) -> bool:
                made.append(cohort.key)
                (job.directory.own / "cohorts" / f"{cohort.key}.parquet").touch()
                return True

            with claims.working():
                work(job, claims, left, mark, Progress())

        with measured(found, f"{asked.claimers} claimers share the other half"), ThreadPoolExecutor(asked.claimers) as pool:
            list(pool.map(claimer, range(asked.claimers)))
        assert sorted(made) == sorted(cohort.key for cohort in left), "a cohort was made twice, or by nobody"
        found["cohorts claimed, none twice"] = len(made)
        for cohort in left:
            job.directory.forget(cohort)
        with Worker(job), measured(found, "the end: manifest and contact sheet"), job.directory.lock():
            finish(job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
