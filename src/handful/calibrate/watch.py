"""What a classifier says on the way from noise to images: the unguided reverse process, watched step by step.

Each cohort's logits go to a file of their own as soon as it is done, so that memory holds one cohort however many images there
are, and an interrupted calibration goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from handful.calibrate.candidates import Looks
from handful.core.denoiser import Around, Condition, Denoiser
from handful.core.noise import Level, Levels
from handful.core.ranges import any_range
from handful.errors import RunError
from handful.features.extractor import FeatureExtractor
from handful.generate.job import Job
from handful.generate.run import sample_cohort
from handful.guidance import Guided, Pull
from handful.recipe.plan import Cohort, image_seed
from handful.runs.job_directory import OURS, OwnedDirectory
from handful.runs.progress import Progress

SEEN = f"{OURS}/seen"  # a file a cohort
KEPT_IMAGES = 32  # of the whole calibration, for gradients
KEPT_STEPS = 6
_KEPT_BYTES = 1 << 28  # of all kept images together, in float32
_AT_ONCE = 16  # images through the decoder or a classifier, where no chunk is stated

Sees = tuple[float | None, Looks]  # Softplus, and what is shown


class Watched(Around):
    """A denoiser that passes on the first evaluation of each step: x_t and its own x0_hat.

    Args:
        count: Images of the cohort; they may come in chunks.
        each: Called with the step's index, its level, x_t and x0_hat, both (count, c, h, w).
    """

    def __init__(self, denoiser: Denoiser, count: int, each: Callable[[int, Level, Tensor, Tensor], None]) -> None:
        super().__init__(denoiser)
        self._count, self._each = count, each
        self._due: int | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []

    def enter(self, x: Tensor, levels: Levels, index: int, condition: Condition) -> Tensor:
        self._due = index
        self._parts.clear()
        return self.denoiser.enter(x, levels, index, condition)

    def forward(self, x_t: Tensor, level: Level, condition: Condition) -> Tensor:
        try:
            x0_hat = self.denoiser(x_t, level, condition)
        except Exception:  # where memory is short, the cohort comes again in smaller chunks
            self._parts.clear()
            raise
        self.learned_variance = self.denoiser.learned_variance
        if level.index is not None and level.index == self._due:
            self._parts.append((x_t.detach(), x0_hat.detach()))
            if sum(len(part) for part, _ in self._parts) == self._count:
                self._due = None
                x, x0 = (torch.cat(both) for both in zip(*self._parts, strict=True))
                self._each(level.index, level, x, x0)
        return x0_hat


def kept_steps(steps: int) -> list[int]:
    """The steps whose images are kept for gradients: KEPT_STEPS of them, evenly over the path."""
    if steps <= KEPT_STEPS:
        return list(range(steps))
    return [round(place * (steps - 1) / (KEPT_STEPS - 1)) for place in range(KEPT_STEPS)]


def kept_images(job: Job, name: str, looks: int) -> int:
    """How many images of a class are kept: shares of KEPT_IMAGES, or of what there is room for; none of the last of many."""
    channels, height, width = job.image_shape
    room = _KEPT_BYTES // (4 * channels * height * width * looks * min(KEPT_STEPS, job.levels.steps))
    most = max(1, min(KEPT_IMAGES, room))
    names = list(dict.fromkeys(cohort.class_name for cohort in job.cohorts))
    share = most // len(names) if most >= len(names) else int(names.index(name) < most)
    return min(share, job.recipe.per_class)


def bytes_needed(job: Job, sees: Sequence[Sees], classes: int) -> int:
    """What the files take until the calibration is done."""
    return 4 * job.images * job.levels.steps * len(sees) * classes + _KEPT_BYTES


def watch(
    job: Job,
    classifiers: Mapping[float | None, FeatureExtractor],
    looks: Sequence[Looks],
    directory: OwnedDirectory,
    progress: Progress,
) -> None:
    """Samples every cohort that has no file yet, and writes what the classifiers said.

    Args:
        job: The reverse process; its guidance is not applied.

    Raises:
        RunError: If an estimate or a classifier's answer is not finite.
    """
    pending = [cohort for cohort in job.cohorts if not _readable(directory.path / cohort_file(cohort))]
    progress.begin(job.images, job.images - sum(cohort.count for cohort in pending))
    try:
        for cohort in pending:
            held = _Held(job, cohort, classifiers, looks, progress)
            watched = replace(job, denoiser=Watched(job.denoiser, cohort.count, held.step))
            seeds = [image_seed(job.recipe.seed, cohort.class_name, index) for index in cohort.indices]
            sample_cohort(watched, cohort, (), seeds, lambda *_: None)
            directory.publish(
                cohort_file(cohort), save({name: torch.stack(parts).contiguous() for name, parts in held.tensors.items()})
            )
    finally:
        progress.end()


class _Held:
    """What is kept of one cohort: by name, a tensor a step."""

    def __init__(
        self,
        job: Job,
        cohort: Cohort,
        classifiers: Mapping[float | None, FeatureExtractor],
        looks: Sequence[Looks],
        progress: Progress,
    ) -> None:
        self._job, self._cohort, self._classifiers, self._looks, self._progress = job, cohort, classifiers, looks, progress
        self._guided = Guided(job.denoiser, ())
        self._keep = max(0, min(cohort.count, kept_images(job, cohort.class_name, len(looks)) - cohort.first))
        self._kept_steps = set(kept_steps(job.levels.steps))
        self.tensors: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    @any_range()  # x_t and early estimates leave it
    def step(self, index: int, level: Level, x_t: Tensor, x0_hat: Tensor) -> None:
        where = f"model '{self._job.recipe.model.name}', {self._cohort}, step {index + 1} of {self._job.levels.steps}"
        if not bool(x0_hat.isfinite().all()):
            raise RunError(f"{where}: the denoised images contain NaN or infinite values; use --dtype float32")
        size = self._job.recipe.chunk or _AT_ONCE
        for looks in self._looks:
            pull = Pull(jacobian="identity", input=looks)
            parts = [self._guided.seen(pull, x, x0, level) for x, x0 in zip(x_t.split(size), x0_hat.split(size), strict=True)]
            for softplus, classifier in self._classifiers.items():
                logits = torch.cat([classifier.logits(images) for images in parts]).float().cpu()
                if not bool(logits.isfinite().all()):
                    raise RunError(f"{where}: the logits of '{classifier.name}' are not finite")
                self.tensors.setdefault(logits_name((softplus, looks)), []).append(logits)
            if self._keep and index in self._kept_steps:
                self.tensors.setdefault(f"images {looks}", []).append(torch.cat(parts)[: self._keep].float().cpu())
        self._progress.advance(self._cohort.count / self._job.levels.steps, self._cohort.class_name)


def logits_name(sees: Sees) -> str:
    softplus, looks = sees
    return f"logits {looks} {'relu' if softplus is None else repr(float(softplus))}"


def cohort_file(cohort: Cohort) -> str:
    return f"{SEEN}/{cohort.key}.safetensors"


def _readable(path: Path) -> bool:
    with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as held:
        return bool(held.keys())
    return False


class Recorded:
    """What was written, read back step by step, the cohorts in the plan's order."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._files = [(cohort, folder / cohort_file(cohort)) for cohort in job.cohorts]

    def logits(self, sees: Sees, step: int) -> Tensor:
        """(n, classes) of all images, on the CPU."""
        return torch.cat([held for _, held in self._slices(logits_name(sees), step)])

    def images(self, looks: Looks) -> Iterator[tuple[int, Tensor, list[str]]]:
        """The steps whose images are kept: the index, images (k, c, h, w) and their classes."""
        for place, step in enumerate(kept_steps(self._job.levels.steps)):
            parts = list(self._slices(f"images {looks}", place))
            yield step, torch.cat([held for _, held in parts]), [c.class_name for c, held in parts for _ in range(len(held))]

    def places(self) -> list[tuple[str, int]]:
        """Class and index of each image."""
        return [(c.class_name, i) for c, _ in self._files for i in c.indices]

    def _slices(self, name: str, place: int) -> Iterator[tuple[Cohort, Tensor]]:
        for cohort, file in self._files:
            with safe_open(file, framework="pt") as held:
                if name in held.keys():  # noqa: SIM118 - it is no mapping
                    yield cohort, held.get_slice(name)[place]
