"""Kills workers at random moments, again and again, and compares what comes out with an undisturbed run, byte for byte.

    python tools/kill_runs.py --kills 50

Each round starts one, two or four processes of one run of a tiny model, `--workers 2`, or two actors of Ray, and sends SIGKILL
at random moments: to all processes but one, to one alone four times, to the process that was started or to one of its workers,
to actors. What was started ends then, or is started again; then every file's SHA-256 must be that of the undisturbed run, and
nothing else may lie there. Prints a line a round, and the number of kills at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from handful.generate.job import prepare
from handful.generate.ray_engine import run_by_ray
from handful.generate.run import run
from handful.generate.workers import run_with_workers
from handful.recipe.schema import Recipe, recipe_from


def sums(out: Path) -> dict[str, str]:
    """SHA-256 of every file, but the lock's and the card's, which names its folder."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("lock", "README.md")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _work(engine: str, recipe: Recipe, out: Path) -> None:
    os.setsid()
    torch.set_num_threads(1)
    job = prepare(recipe, out)
    run_with_workers(job, recipe, 2) if engine == "workers" else run(job)


def children(process: int) -> list[int]:
    """The processes that one has started, and theirs."""
    with suppress(OSError):
        own = [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        return [found for each in own for found in (each, *children(each))]
    return []


def kill_some(engine: str, count: int, recipe: Recipe, out: Path, draw: random.Random, longest: float) -> int:
    """Starts so many processes, and kills all but one (or the only one, or one of its workers); how many were killed."""
    context = multiprocessing.get_context("fork")  # it has imported all; a run begins at once
    processes = [context.Process(target=_work, args=(engine, recipe, out)) for _ in range(count)]
    for process in processes:
        process.start()
    killed, victims = 0, processes[: max(1, count - 1)]
    for victim in victims:
        if engine == "workers":  # its workers import all anew: the moment is drawn from when they are there
            _until(lambda each=victim: not each.is_alive() or (out / ".handful" / "workers").is_dir())
        time.sleep(draw.uniform(0, longest / len(victims)))
        own = [each for each in children(victim.pid or 0) if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
        chosen = draw.choice([victim.pid or 0, *own])
        if victim.is_alive():
            os.kill(chosen, signal.SIGKILL)
            killed += 1
        if chosen == victim.pid:
            _until(lambda own=own: not any(Path(f"/proc/{each}").exists() for each in own))  # they end with it
    for process in processes:
        process.join(300)
        assert not process.is_alive(), "it hangs"
    return killed


def _until(there: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


def _by_ray(recipe: Recipe, root: Path, seed: int, rounds: int, wanted: dict[str, str], longest: float, told: Any) -> None:
    """Rounds by Ray, of one local cluster, in a process of their own; two actors are killed in each."""
    import ray

    os.setsid()
    torch.set_num_threads(1)
    draw = random.Random(seed)
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    for number in range(rounds):
        out, killed = root / f"ray-{number}", 0
        job = prepare(recipe, out)
        work = threading.Thread(target=run_by_ray, args=(job, recipe, 2))
        work.start()
        for _ in range(2):
            _until(lambda work=work, out=out: not work.is_alive() or any((out / ".handful" / "workers").glob("[!.]*")))
            time.sleep(draw.uniform(0, longest))
            files = list((out / ".handful" / "workers").glob("[!.]*")) if work.is_alive() else []
            with suppress(OSError, ValueError, LookupError):  # it ended meanwhile
                os.kill(json.loads(draw.choice(files).read_text())["pid"], signal.SIGKILL)
                killed += 1
        work.join(600)
        assert not work.is_alive(), "it hangs"
        assert sums(out) == wanted, f"Ray, round {number}, differs"
        told.send(killed)
    ray.shutdown()


def main() -> None:
    """Runs until enough were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default="one,two,four,workers", help="of one, two, four, workers")
    parser.add_argument("--ray", type=int, default=0, metavar="ROUNDS", help="so many rounds by Ray before the others")
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
        if asked.ray:
            here, there = multiprocessing.Pipe(duplex=False)
            context = multiprocessing.get_context("fork")
            rest = (recipe, root, asked.seed, asked.ray, wanted, longest, there)
            process = context.Process(target=_by_ray, args=rest)
            process.start()
            for number in range(asked.ray):
                assert here.poll(900), "it hangs"
                kills += (killed := here.recv())
                print(f"Ray, round {number + 1}: {killed} kills, {len(wanted)} files the same", flush=True)
            process.join(120)
        while kills < asked.kills:
            engine = draw.choice(asked.engines.split(","))
            out, count, here = root / f"round-{rounds}", {"two": 2, "four": 4}.get(engine, 1), 0
            for _ in range(4 if count == 1 else 1):
                here += kill_some(engine, count, recipe, out, draw, longest)
                if engine == "workers":
                    break
            run(prepare(recipe, out))  # whatever is left
            assert sums(out) == wanted, f"round {rounds} ({engine}, seed {asked.seed}) differs"
            kills, rounds = kills + here, rounds + 1
            print(f"round {rounds}: {engine}, {here} kills, {len(wanted)} files the same", flush=True)
    print(f"{kills} kills in {rounds} rounds: nothing lost, nothing twice, no hang")


if __name__ == "__main__":
    main()
