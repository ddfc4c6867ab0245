"""The work itself: cohort by cohort from noise to files.

A cohort's bytes depend on nothing but the recipe and the device: its noise, its terms and its guided denoiser are made
anew for each, so neither order nor resume nor a neighbour's failure shows.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handful.core.denoiser import Clamped, Condition, shrunk
from handful.core.memory import in_smaller_parts, is_out_of_memory
from handful.core.noise import noised
from handful.core.ranges import any_range
from handful.core.samplers import SAMPLERS, start
from handful.data.exemplars import Exemplars, default_cache
from handful.data.images import from_uint8, read_image, to_uint8
from handful.data.notebook import html_table, png_uri
from handful.errors import RequestError, RunError, counted
from handful.files.atomic import write_atomically
from handful.files.sealed import seal, unseal
from handful.generate.finish import finish, planned_rows
from handful.generate.job import GROWING, Job, prepare
from handful.generate.share import at_work, claims_of, work
from handful.guidance import ExemplarPotential, Guidance, Guided, Potential
from handful.guidance.distances import squared_distances
from handful.guidance.inversion import no_condition
from handful.guidance.method import Context, View, energy_columns, make_terms, potentials, views
from handful.models.latent import LatentDenoiser
from handful.recipe.file import PROVENANCE, recipe_yaml
from handful.recipe.plan import Cohort, ImageNoise, image_seed, start_places
from handful.recipe.prompting import prompt_for
from handful.recipe.resolve import sampler_options
from handful.recipe.schema import recipe_from
from handful.runs.manifest import DONE
from handful.runs.metadata import drawn_json
from handful.runs.progress import Progress
from handful.runs.provenance import CONTENTS, describe_device
from handful.runs.run_directory import EXEMPLARS, PLAN, RECIPE, Plan, explain_full_disk

__all__ = ["Job", "RunSummary", "prepare", "run"]

_AT_ONCE = 16  # images through the decoder or an extractor where no chunk is stated
_FITTED = 128  # exemplars that the linear preview is fitted to: every latent pixel of each counts
_PREVIEW = "linear preview"
_EXPLAINED = 0.5  # share of the colours' variance below which it is pointed out


@dataclass
class RunSummary:
    """What a run did.

    Attributes:
        cohorts_done, cohorts_resumed, cohorts_failed: Made now, by this process; found finished; failed.
        cohorts_elsewhere: Made meanwhile by other processes on the same directory.
        seconds: Of sampling alone, in this process: noise to decoded images.
        images_per_second: Of the images made now; None where none was.
        failures: What went wrong, a text for each failed cohort.
    """

    out: Path
    images: int = 0
    cohorts_done: int = 0
    cohorts_resumed: int = 0
    cohorts_failed: int = 0
    cohorts_elsewhere: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `images` and `cohorts_resumed` are former names of `images_done` and `resumed`."""
        return {**asdict(self), "images_done": self.images, "resumed": self.cohorts_resumed, "out": str(self.out)}

    def _repr_html_(self) -> str:
        sheet = self.out / "contact_sheet.png"
        rows = [["images", self.images], ["made now", self.cohorts_done], ["failed", self.cohorts_failed]]
        shown = html_table(str(self.out), ["cohorts", ""], rows, self.failures)
        return shown + (f'<img src="{png_uri(sheet.read_bytes())}" alt="contact sheet">' if sheet.is_file() else "")


class _NotFinite(Exception):
    """The denoised images of a step hold NaN or infinite values."""


def run(
    job: Job, progress: Progress | None = None, *, order: Iterable[int] | None = None, cache: Path | None = None
) -> RunSummary:
    """Generates what is not there yet, together with all other processes that run the same job in the same directory.

    Each cohort is made by one of them (`handful.runs.claims`); what a process leaves that dies is made by another.

    Args:
        progress: Is notified of every step; None: nobody is.
        order: Places of the cohorts in the plan, in the order to make them; None: as planned. It changes no byte.
        cache: Where exemplar features are kept; None: `handful.data.exemplars.default_cache()`.

    Returns:
        The summary. Cohorts that failed are counted there and listed in `failures`; the next run makes them again.

    Raises:
        RequestError: If another recipe's run has begun there meanwhile.
        RunError: If the disk is full.
    """
    with Worker(job, progress, cache) as worker:
        pending = [cohort for cohort in _ordered(job.cohorts, order) if cohort.key not in job.done]
        summary = worker.summary
        summary.cohorts_resumed, summary.notes = len(job.done), [*job.notes, *job.changes]
        worker.progress.begin(job.images, job.images - sum(cohort.count for cohort in pending))
        try:
            failures = work(job, worker.claims, pending, worker.make, worker.progress)
        finally:
            worker.progress.end()
        summary.failures = [failures[cohort.key] for cohort in job.cohorts if cohort.key in failures]
        summary.cohorts_failed = len(summary.failures)
        summary.cohorts_elsewhere = len(pending) - summary.cohorts_done - summary.cohorts_failed
        summary.images_per_second = worker.made / summary.seconds if worker.made and summary.seconds else None
        with job.directory.lock():
            summary.images = finish(job)
            lost = job.images - summary.images - sum(each.count for each in job.cohorts if each.key in failures)
            if lost > 0 or not (job.directory.path / RECIPE).is_file():
                raise RunError(
                    f"out: '{job.directory.path}': files were removed from it while it was generated: {max(lost, 0)} of "
                    f"{counted(job.images, 'image')}, or {RECIPE}. Choose a new --out, and let nothing else clear it."
                )
    return summary


class Worker:
    """One of the processes that make a run's cohorts; at work inside a `with` block.

    Attributes:
        claims: Who makes what.
        summary: What this process has done.
        made: How many images it has made.
    """

    def __init__(self, job: Job, progress: Progress | None = None, cache: Path | None = None) -> None:
        self.job, self.progress, self._cache = job, progress or Progress(), cache or default_cache()
        self.claims, self.summary, self.made = claims_of(job), RunSummary(job.directory.path), 0
        self._features: dict[str, dict[View, Tensor]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Worker:
        with ExitStack() as stack:
            stack.enter_context(explain_full_disk(self.job.directory.path))
            stack.enter_context(at_work(self.job, self.claims, lambda alone: _write_request(self.job, alone)))
            stack.enter_context(same_arithmetic(self.job.threads))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def make(self, cohort: Cohort, claim: int) -> bool:
        """Makes and commits a cohort that is claimed; False where the claim was lost meanwhile."""
        if self._features is None:
            self._features = _exemplar_features(self.job, self._cache)
            _fit_preview(self.job, self.progress)
        images, rows = _make(self.job.of(cohort), cohort, self._features, self.progress, self.summary, self.claims.beat)
        if not self.claims.still_mine(cohort.key, claim):
            return False  # this process was silent for so long that another took the cohort over
        self.job.directory.commit(cohort, images, rows, self.job.schema)
        self.summary.cohorts_done += 1
        self.made += cohort.count
        self.claims.images = self.made
        return True

    def make_one(self, place: int) -> None:
        """Makes the cohort at a place of the plan, unless it is there or another process makes it."""
        cohort = self.job.cohorts[place]
        if not self.job.directory.is_marked(cohort):
            work(self.job, self.claims, [cohort], self.make, self.progress, wait=False)


def cohort_again(job: Job, cohort: Cohort, cache: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Makes one cohort in memory: the images' contents, and their rows of the manifest.

    Raises:
        RunError: As `run` counts among the failures.
    """
    with same_arithmetic(job.threads):
        features = _exemplar_features(job, cache)
        _fit_preview(job, Progress())
        return _make(job.of(cohort), cohort, features, Progress(), RunSummary(job.directory.path), lambda: None)


def _write_request(job: Job, alone: bool) -> None:
    """recipe.yaml says what made the images that are kept: it stays as it was written, but for what has changed since."""
    stored = job.directory.stored() if job.done or not alone else None
    if stored is None:
        text = recipe_yaml(job.recipe, job.provenance)
    else:
        provenance = stored.pop(PROVENANCE)
        if job.changes or job.grown:
            provenance["notes"] = list(dict.fromkeys([*provenance.get("notes", []), *job.changes]))
            provenance |= {key: job.provenance[key] for key in CONTENTS} if job.grown else {}
            stored |= {key: value for key, value in job.recipe.as_dict().items() if key in GROWING}
        text = recipe_yaml(recipe_from(stored), provenance)
    job.directory.publish(RECIPE, text.encode())
    job.directory.publish(PLAN, Plan.of(job.cohorts).to_json())
    if isinstance(job.exemplars, Exemplars):
        job.directory.publish(EXEMPLARS, drawn_json(job.recipe.exemplars.path, job.exemplars))


def _ordered(cohorts: Sequence[Cohort], order: Iterable[int] | None) -> list[Cohort]:
    if order is None:
        return list(cohorts)
    places = list(order)
    if sorted(places) != list(range(len(cohorts))):
        raise ValueError(f"order must name each of the {counted(len(cohorts), 'cohort')} once")
    return [cohorts[place] for place in places]


def _exemplar_features(job: Job, cache: Path) -> dict[str, dict[View, Tensor]]:
    """Class -> what a term looks at -> the exemplars' features (k, D), on the device.

    Kept apart by what computed them: features that another machine rounded otherwise would change the images' last bits.
    """
    threads = f" {job.threads} threads" if job.threads else ""
    cache = cache / re.sub(r"\W+", "-", f"torch {torch.__version__} {describe_device(job.device)}{threads}").strip("-")
    by_class: dict[str, dict[View, Tensor]] = {cohort.class_name: {} for cohort in job.cohorts}
    if job.exemplars is not None:
        for name, reduce in views(job.terms):
            for class_name, features in job.exemplars.seen_by(job.extractors[name], reduce, cache).items():
                if class_name in by_class:  # the others' exemplars are there to start from
                    by_class[class_name][name, reduce] = features.to(job.device)
    return by_class


def _fit_preview(job: Job, progress: Progress) -> None:
    """Fits the linear preview of latents to the exemplars, some of each class, where a term looks through it."""
    if job.exemplars is None or not job.exemplars.images or not isinstance(job.denoiser, LatentDenoiser):
        return
    through = [
        each.method for _, each in potentials(job.terms) if "exemplars" in each.needs and job.denoiser.is_linear(each.view[1])
    ]
    if not through:
        return
    explained = _shared_preview(job, job.denoiser)
    if not explained > _EXPLAINED:
        progress.note(
            f"note: guidance may be weak with this model: the quick preview of its latents shows only {100 * explained:.0f} % "
            f"of the exemplars' colours. --set guidance.{through[0]}.reduce=1 uses the model's decoder instead, which is slower"
        )


def _shared_preview(job: Job, denoiser: LatentDenoiser) -> float:
    """The share of colours that the preview explains; it is fitted by the first of many processes, and read by the others."""
    assert job.exemplars is not None
    file = job.directory.own / "preview.safetensors"
    about = {key: job.provenance[key] for key in CONTENTS}
    with job.directory.lock():
        with suppress(RequestError):
            settings, tensors = unseal(file, _PREVIEW, 1, field="out", remedy="")
            if settings["of"] == about:
                denoiser.linear_preview = tensors["weight"]
                return float(settings["explained"])
        each = max(1, _FITTED // len(job.exemplars.classes))
        explained = denoiser.fit_preview(
            torch.cat([images[:each] for images in job.exemplars.images.values()]), min(4, job.recipe.chunk or 4)
        )
        assert denoiser.linear_preview is not None
        write_atomically(file, seal(_PREVIEW, 1, {"of": about, "explained": explained}, {"weight": denoiser.linear_preview}))
    return explained


def _make(
    job: Job,
    cohort: Cohort,
    features: Mapping[str, Mapping[View, Tensor]],
    progress: Progress,
    summary: RunSummary,
    beat: Callable[[], None],
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Samples and measures one cohort.

    Returns:
        The files' contents, and the rows of the manifest.

    Raises:
        RunError: If the model or the guidance gives NaN or infinite values; naming model, class, cohort and step.
    """
    seeds = [image_seed(job.recipe.seed, cohort.class_name, index) for index in cohort.indices]
    context = Context(
        job.extractors,
        features[cohort.class_name],
        seeds,
        job.targets[cohort.class_name],
        job.denoiser.levels,
        job.inverted.embeddings if job.inverted else None,
    )
    terms = make_terms(job.recipe.guidance or (), context)
    steps, at, told = job.levels.steps, 0, 0.0

    def each(index: int, x0_hat: Tensor) -> None:
        nonlocal at, told
        if not bool(x0_hat.isfinite().all()):
            raise _NotFinite
        at, told = index + 1, told + cohort.count / steps
        progress.advance(cohort.count / steps)
        beat()

    began = time.perf_counter()
    try:
        images = sample_cohort(job, cohort, terms, seeds, each)
        summary.seconds += time.perf_counter() - began
        writer = job.directory.writer
        contents = [writer.encode(image) for image in images]
        # Measured as the files hold them, so that anyone can measure the same.
        held = from_uint8(to_uint8(images))
        if not writer.lossless:
            held = torch.stack([read_image(content, channels=len(images[0])) for content in contents])
        rows = _rows(job, cohort, seeds, terms, held.to(job.device), contents)
    except Exception as error:
        if not isinstance(error, _NotFinite | RunError) and not is_out_of_memory(error):
            raise
        progress.advance(cohort.count - told)  # done with, if not done
        if isinstance(error, _NotFinite):
            error = RunError("the denoised images contain NaN or infinite values. " + _remedy(job))
        elif is_out_of_memory(error):  # smaller chunks have been tried already
            error = RunError("out of memory, even with one image at a time. " + _memory_remedy(job))
        place = f"step {at + 1} of {steps}" if at < steps else "decoding and measuring"
        raise RunError(f"model '{job.recipe.model.name}', {cohort}, {place}: {error}") from None
    return contents, rows


@torch.no_grad()
def sample_cohort(job: Job, cohort: Cohort, terms: Sequence[Guidance], seeds: Sequence[int], each: Any) -> Tensor:
    """Noise -> images (n, c, h, w) in [-1, 1], float32 on the CPU."""
    asked, noise = job.recipe.sampler, ImageNoise(seeds, job.denoiser.shape, job.device)
    # Embeddings shift the clamped estimate, as at the fit: clamped after it, targets are reconstructed worse. The rules that
    # move the sample itself leave the estimate to the model, and look at it as it is used.
    before = job.inverted is not None or any(isinstance(term, Potential) and term.pull.rule != "shift" for term in terms)
    inside, outside = asked.clamp and before, asked.clamp and not before
    guided = Guided(Clamped(job.denoiser) if inside else job.denoiser, terms, job.recipe.chunk)
    options = sampler_options(asked, noise)
    if asked.name == "ddpm":
        options["variance"] = asked.variance or "small"
    denoiser = Clamped(guided) if outside else guided
    if job.inverted is not None:
        x = job.inverted.start(seeds, noise())
    elif job.recipe.start is not None:
        latents = [_exemplar_latents(job, name)[place] for name, place in _starts(job, cohort)]
        x = noised(torch.stack(latents), noise(), job.levels[0])
    else:
        x = start(noise(), job.levels)
    x0 = SAMPLERS[asked.name](denoiser, x, job.levels, _condition(job, cohort, guided, seeds), each=each, **options)
    images = _in_parts(guided.decode, x0, guided.chunk or _AT_ONCE).float().cpu()
    if not bool(images.isfinite().all()):
        raise _NotFinite
    return images.clamp(-1, 1)


def _exemplar_latents(job: Job, class_name: str) -> Tensor:
    """x0 of a class's exemplars (k, c, h, w) on the device, float32; encoded once."""
    if class_name not in job.encoded:
        assert job.exemplars is not None
        images, size = job.exemplars.images[class_name], job.recipe.chunk or _AT_ONCE
        job.encoded[class_name] = _in_parts(lambda part: job.denoiser.encode(part.to(job.device)), images, size).float()
    return job.encoded[class_name]


def _starts(job: Job, cohort: Cohort) -> list[tuple[str, int]]:
    """The exemplar that each image starts from: its class, and its place there."""
    assert job.exemplars is not None
    assert job.recipe.start is not None
    own, counts = job.recipe.start.of == "class", job.exemplars.counts
    whose = [(name, place) for name in counts if (name == cohort.class_name) == own for place in range(counts[name])]
    return [whose[place] for place in start_places(job.recipe.seed, cohort.class_name, cohort.indices, len(whose))]


def _in_parts(call: Callable[[Tensor], Tensor], cohort: Tensor, size: int) -> Tensor:
    """`call` on parts of a cohort, smaller ones for as long as the device is out of memory."""
    return in_smaller_parts(lambda at_once: torch.cat([call(part) for part in cohort.split(at_once)]), size)


def _condition(job: Job, cohort: Cohort, guided: Guided, seeds: Sequence[int]) -> Condition:
    if job.denoiser.prompted:
        return guided.condition([prompt_for(job.recipe.model.prompts[cohort.class_name], seed) for seed in seeds])
    label = job.inverted.fitted.label if job.inverted else cohort.label or 0
    return no_condition(guided, cohort.count) if label is None else guided.condition([label] * cohort.count)


def _remedy(job: Job) -> str:
    if float(job.levels.alpha[0]) == 0 and getattr(job.denoiser, "prediction", None) in ("eps", "epsilon"):
        return (
            "The first step has alpha 0 (pure noise), where a network that predicts noise can't estimate the image: set "
            "another sampler.spacing."
        )
    if job.recipe.model.dtype != "float32":
        return "Use --dtype float32."
    if job.recipe.guidance:
        return "Lower the guidance scale; if that does not help, the model's weights may be damaged."
    return "The model's weights may be damaged: copy it again."


def _memory_remedy(job: Job) -> str:
    asked = job.recipe.model
    ways = []
    if isinstance(job.denoiser, LatentDenoiser) and not asked.vae_tiling:
        ways.append("--set model.vae_tiling=true, which decodes in tiles")
    if job.device.type != "cpu":
        ways.append("--device cpu, which is slower")
    if asked.dtype == "float32":
        ways.append("--dtype bfloat16, which takes half" + (", and another --out: its images differ" if job.done else ""))
    return f"Repeat the command with {', or with '.join(ways)}." if ways else "Use a smaller model or resolution."


@any_range()  # they come out of files
@torch.no_grad()
def _rows(
    job: Job, cohort: Cohort, seeds: Sequence[int], terms: Sequence[Guidance], images: Tensor, contents: Sequence[bytes]
) -> list[dict[str, Any]]:
    """The cohort's rows of the manifest; images (n, c, h, w) as the files hold them."""
    potentials = [
        (term, column)
        for term, column in zip(terms, energy_columns(job.recipe.guidance or ()), strict=True)
        if isinstance(term, Potential) and column
    ]
    size = job.recipe.chunk or _AT_ONCE
    seen = [_in_parts(term.view, shrunk(images, term.pull.reduce or 1), size) for term, _ in potentials]
    energies = {
        column: term.energy(each).expand(cohort.count).tolist() for (term, column), each in zip(potentials, seen, strict=True)
    }
    compared = [(term, each) for (term, _), each in zip(potentials, seen, strict=True) if isinstance(term, ExemplarPotential)]
    nearest = _nearest(job, cohort, *compared[0]) if compared and job.exemplars else None
    rows = planned_rows(job, cohort, DONE)
    starts = _starts(job, cohort) if job.recipe.start is not None else []
    for place, row in enumerate(rows):
        row |= {column: values[place] for column, values in energies.items()}
        row |= {"seed": seeds[place], "sha256": hashlib.sha256(contents[place]).hexdigest()}
        if "prompt" in job.schema.names:
            row["prompt"] = prompt_for(job.recipe.model.prompts[cohort.class_name], seeds[place])
        if starts and job.exemplars is not None:
            name, number = starts[place]
            row["started_from"] = f"{name}/{job.exemplars.called(name)[number]}"
        if nearest is not None:
            row["nearest_exemplar"], row["nearest_exemplar_distance"] = nearest[place]
    return rows


def _nearest(job: Job, cohort: Cohort, term: ExemplarPotential, seen: Tensor) -> list[tuple[str, float]]:
    """For each image, seen by the term as (n, D), the nearest exemplar of its class (`called`) and its Euclidean distance."""
    assert job.exemplars is not None
    distances, places = squared_distances(seen, term.exemplars).min(1)
    called = job.exemplars.called(cohort.class_name)
    return [
        (f"{cohort.class_name}/{called[place]}", distance)
        for place, distance in zip(places.tolist(), distances.sqrt().tolist(), strict=True)
    ]


@contextmanager
def same_arithmetic(wanted: int | None = None) -> Iterator[None]:
    """The sums of every start of a run in the same order: threads as at the first, no algorithm chosen by its timing."""
    cudnn: Any = torch.backends.cudnn
    threads = torch.get_num_threads()
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    if wanted and wanted != threads:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
