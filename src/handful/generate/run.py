"""The work itself: cohort by cohort from noise to files.

A cohort's bytes depend on nothing but the recipe and the device: its noise, its terms and its guided denoiser are made
anew for each, so neither order nor resume nor a neighbour's failure shows.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handful.core.denoiser import Clamped, Condition, shrunk
from handful.core.images import any_range
from handful.core.memory import in_smaller_parts, is_out_of_memory
from handful.core.samplers import SAMPLERS, start
from handful.data.exemplars import default_cache
from handful.data.images import encode_png, from_uint8, read_image, to_uint8
from handful.errors import RunError
from handful.generate.job import Job, check_against_stored, prepare
from handful.guidance import ExemplarPotential, Guidance, Guided, Potential
from handful.guidance.distances import squared_distances
from handful.guidance.inversion import no_condition
from handful.guidance.method import Context, View, energy_columns, make_terms, views
from handful.models.latent import LatentDenoiser
from handful.recipe.file import PROVENANCE, recipe_yaml
from handful.recipe.plan import Cohort, ImageNoise, image_seed
from handful.recipe.resolve import sampler_options
from handful.recipe.schema import recipe_from
from handful.runs.contact_sheet import contact_sheet_png
from handful.runs.manifest import DONE, FAILED, guidance_text, parquet_bytes
from handful.runs.progress import Progress
from handful.runs.provenance import describe_device
from handful.runs.run_directory import RECIPE, full_disk_told
from handful.runs.writers import IMAGES, METADATA, image_file, metadata_jsonl

__all__ = ["Job", "RunSummary", "prepare", "run"]

_AT_ONCE = 16  # images through the decoder or an extractor where no chunk is stated
_FITTED = 128  # exemplars that the linear preview is fitted to: every latent pixel of each counts
_EXPLAINED = 0.5  # share of the colours' variance below which it is pointed out
_SHEET_COLUMNS = 16  # of the contact sheet: no more images of a class are read back for it than two rows


@dataclass
class RunSummary:
    """What a run did.

    Attributes:
        out: The run directory.
        images: How many lie there now.
        cohorts_done, cohorts_resumed, cohorts_failed: Made now; found finished; failed.
        seconds: Of sampling alone, in this process: noise to decoded images.
        images_per_second: Of the images made now; None where none was.
        failures: What went wrong, a text for each failed cohort.
        notes: What was concluded from the request.
    """

    out: Path
    images: int = 0
    cohorts_done: int = 0
    cohorts_resumed: int = 0
    cohorts_failed: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "out": str(self.out)}


class _NotFinite(Exception):
    """The denoised images of a step hold NaN or infinite values."""


def run(
    job: Job, progress: Progress | None = None, *, order: Iterable[int] | None = None, cache: Path | None = None
) -> RunSummary:
    """Generates what is not there yet.

    Args:
        job: From `prepare`.
        progress: Told of every step; None tells nobody.
        order: Places of the cohorts in the plan, in the order to make them; None: as planned. It changes no byte.
        cache: Where exemplar features are kept; None: `handful.data.exemplars.default_cache()`.

    Returns:
        The summary. Cohorts that failed are counted there and told in `failures`; the next run makes them again.

    Raises:
        RequestError: If another process works in the directory, or another recipe's run has begun there meanwhile.
        RunError: If the disk is full.
    """
    progress = progress or Progress()
    summary = RunSummary(job.directory.path)
    with full_disk_told(job.directory.path), job.directory.locked(), ExitStack() as stack:
        check_against_stored(job)  # again, now that nobody else can begin here
        stack.enter_context(same_arithmetic(job.threads))
        _write_recipe(job)
        features = _exemplar_features(job, cache or default_cache())
        rows = dict(_finished(job))
        pending = [cohort for cohort in _ordered(job.cohorts, order) if cohort.key not in rows]
        summary.cohorts_resumed, summary.notes = len(rows), [*job.notes, *job.changes]
        if pending:
            _fit_preview(job, progress)
        progress.begin(job.images, job.images - sum(cohort.count for cohort in pending))
        try:
            for cohort in pending:
                try:
                    images, rows[cohort.key] = _make(job, cohort, features, progress, summary)
                except RunError as error:
                    summary.failures.append(str(error))
                    progress.note(f"failed: {error}")
                    continue
                job.directory.commit(cohort, images, rows[cohort.key], job.schema)
                summary.cohorts_done += 1
        finally:
            progress.end()
        summary.cohorts_failed = len(summary.failures)
        summary.images = sum(len(of_cohort) for of_cohort in rows.values())
        made = sum(cohort.count for cohort in pending if cohort.key in rows)
        summary.images_per_second = made / summary.seconds if made and summary.seconds else None
        _finish(job, rows)
    return summary


def _write_recipe(job: Job) -> None:
    """recipe.yaml says what made the images that are kept: it stays as it was written, but for what has changed since."""
    if not job.done:
        job.directory.publish(RECIPE, recipe_yaml(job.recipe, job.provenance).encode())
    elif job.changes and (stored := job.directory.stored()) is not None:
        provenance = stored.pop(PROVENANCE)
        provenance["notes"] = list(dict.fromkeys([*provenance.get("notes", []), *job.changes]))
        job.directory.publish(RECIPE, recipe_yaml(recipe_from(stored), provenance).encode())


def _ordered(cohorts: Sequence[Cohort], order: Iterable[int] | None) -> list[Cohort]:
    if order is None:
        return list(cohorts)
    places = list(order)
    if sorted(places) != list(range(len(cohorts))):
        raise ValueError(f"order must name each of the {len(cohorts)} cohorts once")
    return [cohorts[place] for place in places]


def _finished(job: Job) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for cohort in job.cohorts:
        if cohort.key in job.done and (rows := job.directory.finished(cohort, job.schema)) is not None:
            yield cohort.key, rows


def _exemplar_features(job: Job, cache: Path) -> dict[str, dict[View, Tensor]]:
    """Class -> what a term looks at -> the exemplars' features (k, D), on the device.

    Kept apart by what computed them: features that another machine rounded otherwise would change the images' last bits.
    """
    threads = f" {job.threads} threads" if job.threads else ""
    cache = cache / re.sub(r"\W+", "-", f"torch {torch.__version__} {describe_device(job.device)}{threads}").strip("-")
    by_class: dict[str, dict[View, Tensor]] = {cohort.class_name: {} for cohort in job.cohorts}
    if job.exemplars is not None:
        for name, reduce in views(job.recipe.guidance or ()):
            for class_name, features in job.exemplars.seen_by(job.extractors[name], reduce, cache).items():
                by_class[class_name][name, reduce] = features.to(job.device)
    return by_class


def _fit_preview(job: Job, progress: Progress) -> None:
    """Fits the linear preview of latents to the exemplars, some of each class, where a term looks through it."""
    if job.exemplars is None or not job.exemplars.images or not isinstance(job.denoiser, LatentDenoiser):
        return
    if not any(job.denoiser.is_linear(reduce) for _, reduce in views(job.recipe.guidance or ())):
        return
    each = max(1, _FITTED // len(job.exemplars.classes))
    explained = job.denoiser.fit_preview(torch.cat([images[:each] for images in job.exemplars.images.values()]))
    if not explained > _EXPLAINED:
        progress.note(
            f"note: the linear preview explains {explained:.0%} of the exemplars' colours, so guidance sees little; "
            "guidance.chamfer.reduce=1 looks through the decoder"
        )


def _make(
    job: Job, cohort: Cohort, features: Mapping[str, Mapping[View, Tensor]], progress: Progress, summary: RunSummary
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Samples and measures one cohort.

    Returns:
        The files' contents, and the rows of the manifest.

    Raises:
        RunError: If the model or the guidance gives NaN or infinite values; naming model, class, cohort and step.
    """
    seeds = [image_seed(job.recipe.seed, cohort.class_name, index) for index in _indices(cohort)]
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

    began = time.perf_counter()
    try:
        images = sample_cohort(job, cohort, terms, seeds, each)
        summary.seconds += time.perf_counter() - began
        contents = [encode_png(image) for image in images]
        # Measured as the files hold them, so that anyone can measure the same.
        rows = _rows(job, cohort, seeds, terms, from_uint8(to_uint8(images)).to(job.device), contents)
    except Exception as error:
        if not (isinstance(error, _NotFinite | RunError) or is_out_of_memory(error)):
            raise
        progress.advance(cohort.count - told)  # done with, if not done
        if isinstance(error, _NotFinite):
            error = RunError("the denoised images hold NaN or infinite values. " + _remedy(job))
        elif is_out_of_memory(error):  # smaller chunks have been tried already
            error = RunError("out of memory with one image at once. " + _memory_remedy(job))
        place = f"step {at + 1} of {steps}" if at < steps else "decoding and measuring"
        raise RunError(f"model '{job.recipe.model.name}', {cohort}, {place}: {error}") from None
    return contents, rows


def _indices(cohort: Cohort) -> range:
    return range(cohort.first, cohort.first + cohort.count)


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
    x = job.inverted.start(seeds, noise()) if job.inverted else start(noise(), job.levels)
    x0 = SAMPLERS[asked.name](denoiser, x, job.levels, _condition(job, cohort, guided), each=each, **options)
    images = _in_parts(guided.decode, x0, guided.chunk or _AT_ONCE).float().cpu()
    if not bool(images.isfinite().all()):
        raise _NotFinite
    return images.clamp(-1, 1)


def _in_parts(call: Callable[[Tensor], Tensor], cohort: Tensor, size: int) -> Tensor:
    """`call` on parts of a cohort, smaller ones for as long as the device is out of memory."""
    return in_smaller_parts(lambda at_once: torch.cat([call(part) for part in cohort.split(at_once)]), size)


def _condition(job: Job, cohort: Cohort, guided: Guided) -> Condition:
    if job.denoiser.prompted:
        return guided.condition([job.recipe.model.prompts[cohort.class_name]] * cohort.count)
    label = job.inverted.told.label if job.inverted else cohort.label or 0
    return no_condition(guided, cohort.count) if label is None else guided.condition([label] * cohort.count)


def _remedy(job: Job) -> str:
    if job.recipe.model.dtype != "float32":
        return "Use model.dtype float32."
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
    rows = _planned_rows(job, cohort, DONE)
    for place, row in enumerate(rows):
        row |= {column: values[place] for column, values in energies.items()}
        row |= {"seed": seeds[place], "sha256": hashlib.sha256(contents[place]).hexdigest()}
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


def _planned_rows(job: Job, cohort: Cohort, status: str) -> list[dict[str, Any]]:
    """What is known of a cohort's images before they are made."""
    return [
        {
            "file": image_file(cohort.class_name, index) if status == DONE else None,
            "class": cohort.class_name,
            "label": cohort.label,
            "index": index,
            "seed": image_seed(job.recipe.seed, cohort.class_name, index),
            "cohort": cohort.index,
            "model": Path(job.recipe.model.name).name,
            "guidance": guidance_text(job.recipe),
            "status": status,
        }
        for index in _indices(cohort)
    ]


def _finish(job: Job, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Writes what sums the run up: manifest, imagefolder metadata and contact sheet."""
    ordered = [row for cohort in job.cohorts for row in rows.get(cohort.key) or _planned_rows(job, cohort, FAILED)]
    job.directory.publish("manifest.parquet", parquet_bytes(ordered, job.schema))
    done = [row for row in ordered if row["status"] == DONE]
    if done:
        text = metadata_jsonl((row["file"], row["class"]) for row in done)
        job.directory.publish(f"{IMAGES}/{METADATA}", text.encode())
        job.directory.publish("contact_sheet.png", _contact_sheet(job, done))


def _contact_sheet(job: Job, rows: Sequence[Mapping[str, Any]]) -> bytes:
    files: dict[str, list[str]] = {}
    for row in rows:
        files.setdefault(row["class"], []).append(row["file"])
    generated = {
        name: torch.stack([read_image(job.directory.path / file, channels=job.image_shape[0]) for file in of_class])
        for name, of_class in ((name, found[: 2 * _SHEET_COLUMNS]) for name, found in files.items())
    }
    return contact_sheet_png(job.exemplars.images if job.exemplars else {}, generated, columns=_SHEET_COLUMNS)


@contextmanager
def same_arithmetic(wanted: int | None = None) -> Iterator[None]:
    """The sums of every start of a run in the same order: threads as at the first, no algorithm chosen by its timing.

    Args:
        wanted: Threads; None leaves them.
    """
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
