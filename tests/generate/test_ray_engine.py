"""Ray maps cohorts over actors on two real nodes, beside a plain process; a node that is killed loses nothing.

The same recipe has the same bytes by one process, two, four, and Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import contents, tiny_recipe

import handful
from handful.errors import RequestError
from handful.generate.job import prepare
from handful.generate.ray_engine import run_by_ray
from handful.generate.run import run
from handful.recipe.schema import Recipe

ray = pytest.importorskip("ray")


def _work(recipe: Recipe, out: Path) -> None:
    run(prepare(recipe, out))


@pytest.mark.slow
def test_two_nodes_of_which_one_is_killed_and_a_plain_process_make_the_bytes_of_one(
    tiny_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(handful.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    recipe = tiny_recipe(tiny_model(2), per_class=16, cohort=1, sampler={"steps": 12})
    handful.generate(recipe, tmp_path / "one")
    fork = multiprocessing.get_context("fork")
    for count in (2, 4):
        processes = [fork.Process(target=_work, args=(recipe, tmp_path / str(count))) for _ in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * count
        assert contents(tmp_path / str(count)) == contents(tmp_path / "one")
    out = tmp_path / "ray"
    command = [sys.executable, "-m", "handful.cli", "generate", str(tmp_path / "one" / "recipe.yaml"), "--out", str(out)]
    job = prepare(recipe, out)
    with pytest.raises(RequestError, match="no Ray cluster answers"):
        run_by_ray(job, recipe, 2, address="127.0.0.1:1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def kill_one() -> None:
        while len(job.directory.marked()) < 3:
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    beside = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        summary = run_by_ray(job, recipe, 2)
        said, _ = beside.communicate(timeout=120)
    finally:
        ray.shutdown()
        cluster.shutdown()
    killer.join(10)
    assert not killer.is_alive()
    assert (summary.images, summary.failures) == (32, [])
    assert beside.returncode == 0, said
    # The plain process starts from a recipe that is resolved, so its notes are other ones; whoever is first writes them.
    wanted, found = contents(tmp_path / "one"), contents(out)
    assert found.pop("recipe.yaml").partition(b"notes:")[0] == wanted.pop("recipe.yaml").partition(b"notes:")[0]
    assert found == wanted
