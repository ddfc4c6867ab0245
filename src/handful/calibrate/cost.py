"""How often a classifier may guide within a bound on the sampling time.

Guided and unguided steps are timed in turn, and the median ratio of several rounds is taken. On the CPU it is the time of this
process, so that what else the machine does meanwhile counts little; elsewhere the time that passes. The rest is counting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from handful.core.denoiser import Condition
from handful.core.noise import Level
from handful.core.samplers import start
from handful.cost.estimate import evaluated
from handful.generate.job import Job
from handful.guidance import Classifier, Guided, Timing
from handful.recipe.plan import ImageNoise
from handful.recipe.prompting import prompt_for

_ROUNDS = 11
_SECONDS = 60.0  # no further round is begun after so long


def overheads(job: Job, terms: Mapping[str, Classifier], count: int) -> dict[str, float]:
    """What guiding a step adds to it, as a share of the unguided step: 0 is free, 1 doubles it."""
    level = job.levels[job.levels.steps // 2]
    noise = ImageNoise(range(count), job.denoiser.shape, job.device)()
    x = start(noise, job.levels) * float(level.total / job.levels[0].total)
    condition = _condition(job, count)
    runs = {name: Guided(job.denoiser, [term], job.recipe.chunk) for name, term in terms.items()}
    plain = Guided(job.denoiser, (), job.recipe.chunk)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for number in range(_ROUNDS + 1):
        for name, guided in runs.items():
            unguided, seconds = (_seconds(job, lambda each=each: each(x, _alone(level), condition)) for each in (plain, guided))
            if number:  # the first round warms up
                ratios[name].append(seconds / unguided)
        if number and time.perf_counter() - began > _SECONDS:
            break
    return {name: max(0.0, median(of) - 1) for name, of in ratios.items()}


def affordable(job: Job, overhead: float, most: float) -> tuple[int, float] | None:
    """The smallest `every` at which sampling takes at most `most` times the unguided, and what it then takes; None if none."""
    levels = evaluated(job.levels, job.recipe)
    for every in range(1, job.levels.steps + 1):
        timing = Timing(every=every)
        ratio = 1 + overhead * sum(timing.due(level) for level in levels) / len(levels)
        if ratio <= most:
            return every, ratio
    return None


def _alone(level: Level) -> Level:
    """The level without its step: every term acts, and none continues from an earlier step."""
    return Level(level.alpha, level.sigma, None, level.progress)


def _condition(job: Job, count: int) -> Condition:
    cohort = job.cohorts[0]
    if job.denoiser.prompted:
        return job.denoiser.condition([prompt_for(job.recipe.model.prompts[cohort.class_name], 0)] * count)
    return job.denoiser.condition([cohort.label or 0] * count)


@torch.no_grad()
def _seconds(job: Job, call: Callable[[], Tensor]) -> float:
    clock = time.process_time if job.device.type == "cpu" else time.perf_counter
    _finish(job.device)
    began = clock()
    call()
    _finish(job.device)
    return clock() - began


def _finish(device: torch.device) -> None:
    """Waits for what was given to an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
