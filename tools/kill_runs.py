"""Kills workers at random moments, again and again, and compares what comes out with an undisturbed run, byte for byte.

    python tools/kill_runs.py --kills 50

Each round starts one, two or four processes of one run of a tiny model (plainly, or by --workers) and sends SIGKILL to all but
one of them at random moments (one alone is killed four times); then every file's SHA-256 must be that of the undisturbed run,
and nothing else may lie there. Prints a line a round, and the number of kills at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from handful.generate.job import prepare
from handful.generate.run import run
from handful.generate.workers import run_with_workers
from handful.recipe.schema import Recipe, recipe_from


def sums(out: Path) -> dict[str, str]:
    """SHA-256 of every file, but the lock's and the card's, which names its folder."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("lock", "README.md")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _quietly(engine: str, recipe: Recipe, out: Path) -> None:
    os.setsid()  # so that a kill of the group takes its workers along
    torch.set_num_threads(1)
    job = prepare(recipe, out)
    run_with_workers(job, recipe, 2) if engine == "workers" else run(job)


def kill_some(engine: str, count: int, recipe: Recipe, out: Path, draw: random.Random, longest: float) -> int:
    """Starts so many processes, and kills all but one (or the only one) at random moments; how many were killed at work."""
    context = multiprocessing.get_context("fork")  # it has imported all; a run begins at once
    processes = [context.Process(target=_quietly, args=(engine, recipe, out)) for _ in range(count)]
    for process in processes:
        process.start()
    killed, victims = 0, processes[: max(1, count - 1)]
    for victim in victims:
        time.sleep(draw.uniform(0, longest / len(victims)))
        if victim.is_alive():
            os.killpg(victim.pid or 0, signal.SIGKILL) if engine == "workers" else victim.kill()
            killed += 1
    for process in processes:
        process.join(300)
        assert not process.is_alive(), "it hangs"
    return killed


def main() -> None:
    """Runs until enough were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default="one,two,four", help="of one, two, four, workers")
    asked = parser.parse_args()
    draw, kills, rounds = random.Random(asked.seed), 0, 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["HANDFUL_CACHE"] = str(root / "cache")
        recipe = recipe_from(
            {"model": {"name": "digits"}, "classes": list("0123"), "per_class": 48, "cohort": 4, "sampler": {"steps": 16}}
        )
        run(prepare(recipe, root / "undisturbed"))  # the first one imports and warms up
        began, again = time.perf_counter(), root / "again"
        run(prepare(recipe, again))
        longest, wanted = 0.8 * (time.perf_counter() - began), sums(again)
        assert wanted == sums(root / "undisturbed")
        while kills < asked.kills:
            engine = draw.choice(asked.engines.split(","))
            out, count, here = root / f"round-{rounds}", {"two": 2, "four": 4}.get(engine, 1), 0
            for _ in range(4 if count == 1 else 1):
                here += kill_some(engine, count, recipe, out, draw, longest)
            run(prepare(recipe, out))  # whatever is left
            assert sums(out) == wanted, f"round {rounds} ({engine}, seed {asked.seed}) differs"
            kills, rounds = kills + here, rounds + 1
            print(f"round {rounds}: {engine}, {here} kills, {len(wanted)} files the same", flush=True)
    print(f"{kills} kills in {rounds} rounds: nothing lost, nothing twice, no hang")


if __name__ == "__main__":
    main()
