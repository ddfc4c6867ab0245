"""The reverse process, watched: every step once, and what is kept is what guidance would show the classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibration import asked
from support.pipelines import tiny_stable_diffusion
from torch import Tensor

from handful.calibrate import CalibrateJob, calibrate, prepare
from handful.calibrate.watch import Recorded, Watched, watch
from handful.core.denoiser import Condition, Denoiser
from handful.core.noise import Level
from handful.core.ranges import any_range
from handful.features.registry import load_extractor
from handful.generate.job import Job
from handful.generate.run import sample_cohort
from handful.guidance import Classifier, Pull
from handful.guidance.classifier import ClassifierRequest
from handful.recipe.plan import ImageNoise, image_seed
from handful.runs.progress import Progress


class Told:
    """Keeps what a watched denoiser tells."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[Level, Tensor, Tensor]] = {}

    def __call__(self, index: int, level: Level, x_t: Tensor, x0_hat: Tensor) -> None:
        assert index not in self.steps, "each step is told once"
        self.steps[index] = level, x_t.clone(), x0_hat.clone()


def sampled(job: Job, denoiser: Denoiser) -> Tensor:
    cohort = job.cohorts[0]
    seeds = [image_seed(0, cohort.class_name, index) for index in range(cohort.count)]
    return sample_cohort(replace(job, denoiser=denoiser), cohort, (), seeds, lambda *_: None)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "ddpm"])
def test_watching_tells_every_step_once_and_changes_no_image(tmp_path: Path, sampler: str):
    job = prepare(asked(sampler={"name": sampler, "steps": 4}), tmp_path / "out").run
    told = Told()
    watched = sampled(job, Watched(job.denoiser, job.cohorts[0].count, told))
    assert torch.equal(watched, sampled(job, job.denoiser))
    assert list(told.steps) == [0, 1, 2, 3]
    condition = job.denoiser.condition([1] * 4)
    for level, x_t, x0_hat in told.steps.values():
        with torch.no_grad():
            assert torch.equal(job.denoiser(x_t, level, condition), x0_hat)


def test_watching_in_chunks_tells_whole_cohorts(tmp_path: Path):
    job = prepare(asked(chunk=3), tmp_path / "out").run
    told = Told()
    sampled(job, Watched(job.denoiser, 4, told))
    assert [len(x_t) for _, x_t, _ in told.steps.values()] == [4] * 4


class ShortOfMemory(Denoiser):
    """Runs out of memory once, in the middle of a cohort."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0
        self.shape, self.levels, self.classes = inner.shape, inner.levels, inner.classes
        self.label_count, self.null_class, self.prompted = inner.label_count, inner.null_class, inner.prompted

    def condition(self, labels: Any) -> Condition:
        return self.inner.condition(labels)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError
        return self.inner(x_t, level, condition)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_cohort_that_comes_again_in_smaller_chunks_is_told_once(tmp_path: Path):
    job = prepare(asked(chunk=2), tmp_path / "out").run
    told = Told()
    sampled(job, Watched(ShortOfMemory(job.denoiser), 4, told))
    assert [len(x_t) for _, x_t, _ in told.steps.values()] == [4] * 4


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[CalibrateJob, Path]:
    out = tmp_path_factory.mktemp("watched") / "out"
    job = prepare(asked(cohort=3), out)
    with job.directory.locked():
        watch(job.run, job.classifiers, ["x0_hat", "x_t"], job.directory, Progress())
    return job, out


def test_what_is_recorded_is_what_the_classifier_says_of_the_models_own_estimate(watched_run):
    """Against DPM-Solver++ by hand: the first step is enough of it, where x_t is the noise itself."""
    job, out = watched_run
    recorded = Recorded(job.run, out)
    assert recorded.places() == [(name, index) for name in ("1", "4") for index in range(4)]
    guide, levels = load_extractor("digits-guide"), job.run.levels
    labels = [int(name) for name, _ in recorded.places()]
    noise = torch.from_numpy(
        np.stack(
            [
                np.random.RandomState(np.random.Philox(key=image_seed(0, name, index)))
                .standard_normal((1, 8, 8))
                .astype(np.float32)
                for name, index in recorded.places()
            ]
        )
    )
    with torch.no_grad():
        x0_hat = job.run.denoiser(noise, levels[0], job.run.denoiser.condition(labels))
        rms = noise.square().mean((1, 2, 3), keepdim=True).sqrt()
        with any_range():
            expected = {"x0_hat": guide.logits(x0_hat), "x_t": guide.logits(noise / rms.clamp_min(1))}
    for looks, logits in expected.items():
        assert torch.allclose(recorded.logits((None, looks), 0), logits, atol=1e-4)


class Spy(Classifier):
    """A classifier that keeps what it is shown."""

    shown: Tensor | None = None

    def view(self, images: Tensor) -> Tensor:
        if Spy.shown is None:
            Spy.shown = images.detach().clone()
        return super().view(images)


@pytest.mark.parametrize("looks", ["x0_hat", "x_t"])
def test_what_is_measured_is_what_guidance_would_show(watched_run, looks: Any):
    """At the first step, before guidance has moved anything."""
    job, out = watched_run
    cohort = job.run.cohorts[0]
    seeds = [image_seed(0, cohort.class_name, index) for index in range(cohort.count)]
    Spy.shown = None
    spy = Spy(job.classifiers[None], 1, 0.1, pull=Pull(jacobian="identity", input=looks))
    sample_cohort(job.run, cohort, [spy], seeds, lambda *_: None)
    assert Spy.shown is not None
    with torch.no_grad(), any_range():
        seen = job.classifiers[None].logits(Spy.shown)
    assert torch.allclose(Recorded(job.run, out).logits((None, looks), 0)[: cohort.count], seen, atol=1e-5)


def test_another_cohort_size_records_the_same(watched_run, tmp_path: Path):
    job, out = watched_run
    other = prepare(asked(cohort=64), tmp_path / "out")
    with other.directory.locked():
        watch(other.run, other.classifiers, ["x0_hat"], other.directory, Progress())
    for step in range(4):
        mine, theirs = (Recorded(j.run, at).logits((5.0, "x0_hat"), step) for j, at in ((job, out), (other, tmp_path / "out")))
        assert torch.allclose(mine, theirs, atol=1e-3)


COLOURS = """
import torch
from torch import nn
from handful.features.registry import FeatureExtractor

def load():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 2))
    return FeatureExtractor("colours", network, size=(16, 16), classify=network, classes=("cat", "golden retriever"))
"""


def test_latents_are_decoded_for_the_classifier_and_prompts_are_told(tmp_path: Path):
    tiny_stable_diffusion(tmp_path / "sd")
    (tmp_path / "colours.py").write_text(COLOURS)
    names = ["cat", "golden_retriever"]
    request = asked(
        ClassifierRequest(classifier=f"{tmp_path / 'colours.py'}:load"),
        model={"name": str(tmp_path / "sd")},
        classes=names,
        per_class=2,
        sampler={"steps": 2},
    )
    job = prepare(request, tmp_path / "out")
    assert job.targets == {"cat": 0, "golden_retriever": 1}
    with job.directory.locked():
        watch(job.run, job.classifiers, ["x0_hat", "x_t"], job.directory, Progress())
    recorded, model, level = Recorded(job.run, tmp_path / "out"), job.run.denoiser, job.run.levels[0]
    prompts = ["a photo of a cat"] * 2 + ["a photo of a golden retriever"] * 2
    noise = torch.cat([ImageNoise([image_seed(0, name, 0), image_seed(0, name, 1)], model.shape)() for name in names])
    with torch.no_grad():
        seen = model.decode(model(noise, level, model.condition(prompts)))
        assert seen.shape[1:] == model.image_shape != model.shape
        with any_range():
            expected = job.classifiers[5.0].logits(seen)
    assert torch.allclose(recorded.logits((5.0, "x0_hat"), 0), expected, atol=1e-4)
    result = calibrate(prepare(request, tmp_path / "out")).result
    assert result["guidance"][0]["reduce"] == 1, "with exemplars a recipe's default would be the linear map"
