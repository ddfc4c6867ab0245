"""Kills workers at random moments, again and again, and compares what comes out with an undisturbed run, byte for byte.

    python tools/kill_runs.py --kills 50

A run of a tiny model is made by one, two or four processes, by `--workers 2`, and by two actors of Ray on two nodes. Each
makes it undisturbed first: all must make the same bytes, and the time of one cohort is taken. Then it makes it again and again,
until it has had its share of the kills. The moments are spread over what is left of the run, from the first sign of a worker to
the last file. SIGKILL goes to all processes but one, to one alone five times, to the process that was started or to one of its
workers, to actors. The others make what was killed, or a new start does. Then every file's SHA-256 must be that of the
undisturbed run, and nothing else may lie there. Prints a line a round, and the number of kills by engine at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
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

PROCESSES = {"one": 1, "two": 2, "four": 4, "workers": 1, "ray": 1}  # that are started
FORK = multiprocessing.get_context("fork")  # all is imported: a run begins at once
HANGS = 300  # seconds


def sums(out: Path) -> dict[str, str]:
    """SHA-256 of every file, but the lock's and the card's, which names its folder."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in ("lock", "README.md")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(found: dict[str, str], wanted: dict[str, str]) -> str:
    """The names of the files that are missing, too many, or of other bytes."""
    kinds = {
        "missing": wanted.keys() - found.keys(),
        "extra": found.keys() - wanted.keys(),
        "other bytes": {name for name in wanted.keys() & found.keys() if wanted[name] != found[name]},
    }
    return "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in kinds.items() if names)


def until(there: Callable[[], Any], seconds: float = HANGS) -> None:
    """Waits until something is the case.

    Raises:
        AssertionError: It takes too long.
    """
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.005)


def children(process: int) -> list[int]:
    """The processes that one has started, and theirs."""
    with suppress(OSError):
        own = [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
        return [found for each in own for found in (each, *children(each))]
    return []


class Kills:
    """Kills those who work on a run, at moments spread over what is left of it.

    Args:
        each: Seconds that this engine takes for one cohort.
        cohorts: Of the run.
    """

    def __init__(self, out: Path, each: float, cohorts: int, draw: random.Random) -> None:
        self.out, self.each, self.cohorts, self.draw = out, each, cohorts, draw
        self.at: list[int] = []  # cohorts that were done at each kill

    def done(self) -> int:
        """How many cohorts are done."""
        with suppress(OSError):
            return len(os.listdir(self.out / ".handful" / "cohorts"))
        return 0

    def workers(self) -> set[int]:
        """The processes that are listed as workers, and alive."""
        names = [path.name for path in (self.out / ".handful" / "workers").glob("[!.]*")]
        pids = {int(name.split("-")[-2]) for name in names if name.count("-") > 1}
        return {pid for pid in pids if pid != os.getpid() and Path(f"/proc/{pid}").exists()}

    def wait(self, ended: Callable[[], bool], family: Callable[[], set[int]], share: float = 1.0) -> None:
        """Until a moment between the first sign of the family at work and the end of its work, or of the first part of it."""
        until(lambda: ended() or self.workers() & family())
        moment = self.done() + self.draw.uniform(0, (self.cohorts - self.done()) * share + (share == 1))
        until(lambda: ended() or self.done() >= min(int(moment), self.cohorts))
        time.sleep(self.each * (moment % 1))

    def kill(self, process: int) -> None:
        """Kills a process, if it is there."""
        done = self.done()
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
            self.at.append(done)


def _work(engine: str, recipe: Recipe, out: Path) -> None:
    os.setsid()
    torch.set_num_threads(1)
    job = prepare(recipe, out)
    run_with_workers(job, recipe, 2) if engine == "workers" else run(job)


def processes_round(engine: str, recipe: Recipe, out: Path, kills: Kills | None, more: int = 0) -> None:
    """Starts processes of one run, and kills all but one of them (or the only one, or one of its workers).

    Args:
        more: Such rounds of the same run will follow.
    """
    processes = [FORK.Process(target=_work, args=(engine, recipe, out)) for _ in range(PROCESSES[engine])]
    for process in processes:
        process.start()
    victims = processes[: max(1, len(processes) - 1)] if kills else []
    for left, victim in zip(range(len(victims) + more, 0, -1), victims, strict=False):
        pid = victim.pid or 0
        kills.wait(lambda each=victim: not each.is_alive(), lambda pid=pid: {pid, *children(pid)}, 1 / left)
        own = [each for each in children(pid) if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
        chosen = kills.draw.choice([pid, *own])
        if victim.is_alive():
            kills.kill(chosen)
        if chosen == pid:
            until(lambda own=own: not any(Path(f"/proc/{each}").exists() for each in own))  # they end with it
    for process in processes:
        process.join(HANGS)
        assert not process.is_alive(), "it hangs"


def ray_round(recipe: Recipe, out: Path, kills: Kills | None) -> None:
    """Runs by two actors, of which as many as three are killed: a new one takes the place of each."""
    failed: list[BaseException] = []

    def by_ray() -> None:
        try:
            run_by_ray(prepare(recipe, out), recipe, 2)
        except BaseException as error:
            failed.append(error)

    work = threading.Thread(target=by_ray)
    work.start()
    for number in range(3 if kills else 0):
        kills.wait(lambda: not work.is_alive(), kills.workers, 1 / (3 - number))
        if work.is_alive() and (there := kills.workers()):
            kills.kill(kills.draw.choice(sorted(there)))
    work.join(HANGS)
    assert not work.is_alive(), "it hangs"
    if failed:
        raise failed[0]


def rounds(engine: str, recipe: Recipe, root: Path, wanted: dict[str, str], asked: argparse.Namespace, say: Any) -> int:
    """All rounds of one engine; how many kills."""
    torch.set_num_threads(1)
    draw, count = random.Random(f"{asked.seed} {engine}"), 0
    one_round = ray_round if engine == "ray" else lambda *args: processes_round(engine, *args)
    out, cohorts = root / engine, sum(name.startswith(".handful/cohorts/") for name in wanted)
    one_round(recipe, out, None)
    assert sums(out) == wanted, f"{engine}, undisturbed: {differences(sums(out), wanted)}"
    moments = [path.stat().st_mtime for path in (out / ".handful" / "cohorts").iterdir()]
    each = (max(moments) - min(moments)) / (cohorts - 1)
    say(f"{engine}: undisturbed, {len(wanted)} files the same, {each * cohorts:.1f} s of work")
    for number in range(1, 10_000):
        out, before = root / f"{engine}-{number}", count
        kills = Kills(out, each, cohorts, draw)
        if engine == "one":
            for more in range(4, -1, -1):
                processes_round(engine, recipe, out, kills, more)
        else:
            one_round(recipe, out, kills)
        if len(kills.at) and engine != "ray":
            run(prepare(recipe, out))  # whatever is left
        count += len(kills.at)
        assert sums(out) == wanted, f"{engine}, round {number}, seed {asked.seed}: {differences(sums(out), wanted)}"
        say(f"{engine}, round {number}: killed when {kills.at} of {cohorts} cohorts were done; {len(wanted)} files the same")
        if count >= asked.kills / len(asked.engines.split(",")):
            break
        assert count > before or number < 5, "nothing is killed"
    return count


def _ray_rounds(*rest: Any) -> None:
    """The same by Ray, on a cluster of two nodes, in a process of its own."""
    import ray
    from ray.cluster_utils import Cluster

    os.setsid()
    answer = rest[-1]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        answer.send(rounds("ray", *rest[:-1], answer.send))
    except BaseException as error:
        answer.send(error if isinstance(error, AssertionError) else AssertionError(f"{type(error).__name__}: {error}"))
    finally:
        ray.shutdown()
        cluster.shutdown()


def by_ray(*rest: Any) -> int:
    """Rounds by Ray; how many kills."""
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_ray_rounds, args=(*rest[:-1], there))
    process.start()
    while True:
        assert here.poll(3 * HANGS), "it hangs"
        answer = here.recv()
        if isinstance(answer, AssertionError):
            raise answer
        if isinstance(answer, int):
            process.join(120)
            return answer
        rest[-1](answer)


def main() -> None:
    """Runs until enough were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default=",".join(PROCESSES))
    parser.add_argument("--out", type=Path, help="a folder that stays; else one that is removed")
    asked, counts = parser.parse_args(), Counter[str]()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = asked.out or Path(name)
        os.environ["HANDFUL_CACHE"] = str(Path(name) / "cache")
        recipe = recipe_from(
            {"model": {"name": "digits"}, "classes": list("0123"), "per_class": 96, "cohort": 4, "sampler": {"steps": 8}}
        )
        run(prepare(recipe, root / "undisturbed"))
        wanted = sums(root / "undisturbed")
        for engine in asked.engines.split(","):
            asked_of = by_ray if engine == "ray" else lambda *rest, engine=engine: rounds(engine, *rest)
            counts[engine] = asked_of(recipe, root, wanted, asked, lambda text: print(text, flush=True))
    told = ", ".join(f"{engine} {count}" for engine, count in counts.items())
    print(f"{counts.total()} kills ({told}): nothing lost, nothing twice, no hang")


if __name__ == "__main__":
    main()
