"""Everything that can be checked before the long work: a recipe and a directory become a job, or a refusal.

What needs no model is checked first, then what needs it; nothing is written but a cache, so `--dry-run` is this and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from handful.core.denoiser import Denoiser
from handful.core.noise import Levels
from handful.data.exemplars import Exemplars
from handful.data.sources import ONLY_CLASS, labelled_files
from handful.errors import HandfulError, RequestError, counted, first_line, some_of
from handful.features.extractor import FeatureExtractor
from handful.generate.ready import encoded_by, make_ready, placement_of, with_weights
from handful.guidance.classifier import class_request
from handful.guidance.method import PotentialRequest, TermRequest, energy_columns, named, needing, potentials
from handful.models import skeleton
from handful.models.placement import check_placement
from handful.recipe.exemplar_source import Given, drawn_exemplars, fitting, listed_exemplars, too_few_left, with_their_prompts
from handful.recipe.extractors import answer, load_for, targets_of
from handful.recipe.file import PROVENANCE, anchored
from handful.recipe.inverting import Inverted, read_inversion
from handful.recipe.plan import Cohort, plan_cohorts, setting_of
from handful.recipe.prompting import all_prompts
from handful.recipe.resolve import Resolved, complete, model_options, resolve
from handful.recipe.schema import MixRequest, Recipe, with_new_fields
from handful.runs.claims import Timeouts
from handful.runs.comparison import changed_versions, compared
from handful.runs.manifest import manifest_schema
from handful.runs.metadata import drawn
from handful.runs.provenance import CONTENTS, choose_device, provenance_of
from handful.runs.run_directory import RunDirectory
from handful.runs.writers import Writer, check_class_names

GROWING = ("classes", "per_class", "counts")  # of a recipe: what may change while all that is there stays
FEW_STEPS = 8  # so many or fewer are for models that were distilled to it
_BLOCK = 4096  # bytes a small file takes on a disk
_ROW = 1024  # more than a row of the manifest and of metadata.jsonl take, in the marker and in the final files


@dataclass(frozen=True)
class Setting:
    """One setting of a mixture: an ordinary recipe, with what a job has of it."""

    recipe: Recipe
    levels: Levels
    targets: dict[str, dict[int, int]]


@dataclass
class Job:
    """A checked run, ready to start.

    Attributes:
        recipe: With every automatic choice replaced by what it became.
        exemplars: Of the classes to generate, images or features alone; None without.
        extractors: By name, on the device.
        cohorts: All of them, in the plan's order.
        image_shape: (c, h, w) of one image.
        notes: What was concluded, in words for the user.
        inverted: What guidance by inversion takes; None without.
        targets: For classifiers, by class and by the term's place: which of its classes that is.
        threads: Of the CPU; as many as the run was begun with, since another number adds up in another order.
        changes: What is not as it was when the run began, where cohorts of then are kept and others made now.
        how: What only says how to compute, and is not as it was.
        grown: Whether other classes or numbers of images are asked for than when the run began.
        done: Keys of the cohorts that lie finished in the directory.
        encoded: x0 of the exemplars that images start from, by class, as far as they are encoded.
        timeouts: When other processes that share the run count as gone.
        bytes_needed: Estimate of the disk space that the others take; the upper bound, as if nothing compressed.
    """

    recipe: Recipe
    directory: RunDirectory
    denoiser: Denoiser
    device: torch.device
    levels: Levels
    exemplars: Given | None
    extractors: dict[str, FeatureExtractor]
    cohorts: list[Cohort]
    schema: pa.Schema
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]
    notes: list[str]
    allow_version_change: bool = False
    inverted: Inverted | None = None
    targets: dict[str, dict[int, int]] = field(default_factory=dict)
    threads: int | None = None
    changes: list[str] = field(default_factory=list)
    grown: bool = False
    how: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    encoded: dict[str, Tensor] = field(default_factory=dict)
    parts: list[Setting] = field(default_factory=list)
    timeouts: Timeouts = field(default_factory=Timeouts)
    bytes_needed: int = 0

    @property
    def images(self) -> int:
        """How many images the finished run has."""
        return sum(cohort.count for cohort in self.cohorts)

    @property
    def terms(self) -> list[TermRequest]:
        """The guidance of all settings."""
        recipes = [each.recipe for each in self.parts] or [self.recipe]
        return [term for each in recipes for term in each.guidance or ()]

    def of(self, cohort: Cohort) -> Job:
        """The job as it is for a cohort: of a mixture, that of the cohort's setting."""
        if not self.recipe.mix:
            return self
        setting = self.parts[setting_of(cohort.index, [each.share for each in self.recipe.mix])]
        return replace(self, recipe=setting.recipe, levels=setting.levels, targets=setting.targets)

    def refresh(self) -> None:
        """Looks for cohorts that were made since `prepare`; markers that are not true go. By the holder of the lock."""
        marked = self.directory.marked()
        for cohort in self.cohorts:
            if cohort.key in marked and cohort.key not in self.done:
                if self.directory.finished(cohort, self.schema):
                    self.done.add(cohort.key)
                else:
                    self.directory.forget(cohort)
        self.done &= marked


def _from_here(recipe: Recipe) -> Recipe:
    """A recipe made in Python has paths relative to the working directory; recipe.yaml, elsewhere, must find them again."""
    parts = {"model": recipe.model, "exemplars": recipe.exemplars}
    held = {"model": {"name": recipe.model.name}, "exemplars": {"path": recipe.exemplars.path}}
    found = anchored({name: {key: value for key, value in part.items() if value} for name, part in held.items()}, Path.cwd())
    return recipe.model_copy(update={name: part.model_copy(update=found[name]) for name, part in parts.items()})


def prepare(recipe: Recipe, out: str | Path, *, allow_version_change: bool = False, timeouts: Timeouts | None = None) -> Job:
    """Checks a request against the world; writes nothing.

    Args:
        out: The run directory: new, empty, or with an unfinished (or finished) run of this same recipe.
        allow_version_change: Go on with a run that other versions of the libraries began. Its bytes are then no longer
            those of either version alone.
        timeouts: When other processes that share the run count as gone.

    Raises:
        RequestError: Naming what can't be done, and the remedy.
    """
    recipe = _from_here(recipe)
    inverted = read_inversion(recipe.guidance or ())
    mix, places = recipe.mix, [f"mix[{number}]" for number in range(len(recipe.mix or ()))]
    ways, notes = [], []
    for number, part in enumerate(recipe.parts):
        with named(places[number]) if mix else nullcontext():
            if mix and needing(part.guidance or (), "embeddings"):
                problem = "inversion has its own sampling path and condition, so it can't be mixed with other settings"
                remedy = "Use it in a run of its own, without mix."
                raise RequestError("guidance", "inversion", problem, remedy)
            way, said = complete(part, inverted)
        ways.append({"guidance": way.guidance, "start": way.start})
        notes += [f"{places[number]}.{note}" for note in said] if mix else said
    recipe = way
    guided = [each for way in ways for each in needing(way["guidance"] or (), "exemplars")]
    if guided and recipe.exemplars.path is None:
        remedy = "Give real images, a folder per class (--exemplars DIR), or use another guidance."
        raise RequestError("exemplars.path", None, f"{guided[0][1].method} guidance needs exemplars", remedy)
    directory = RunDirectory(out)
    directory.stored()
    asked_classes, laid = recipe.classes, directory.plan()
    kept = {name: laid.sizes[name][:count] for name, count in directory.begun().items()}
    recipe = _with_kept_classes(recipe, kept)
    recipe, counts = listed_exemplars(recipe, directory.path)
    found = None if counts is None else list(counts)
    device = choose_device(recipe.model.device)

    options = model_options(recipe)
    outline = skeleton(recipe.model.name, options)
    if found == [ONLY_CLASS] and (outline.label_count or outline.prompted):
        labelled_files(str(recipe.exemplars.path), field="exemplars")  # images alone have no class: it refuses them
    if outline.prompted:
        recipe, said = with_their_prompts(recipe)
        notes += said
    settings = []
    for number, way in enumerate(ways):
        with named(places[number]) if mix else nullcontext():
            settings.append(resolve(recipe.model_copy(update=way), outline, found, inverted))
    resolved = settings[0]
    placement = placement_of(recipe, device)
    check_placement(outline, placement)
    recipe, labels = resolved.recipe, resolved.labels
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": str(device)})})
    notes += labels.notes
    check_class_names(labels.of, "classes")
    guidance, image_shape = [term for each in settings for term in each.recipe.guidance or ()], outline.image_shape
    at: list[int | str] = [
        f"{places[number]}.guidance[{index}]" if mix else index
        for number, each in enumerate(settings)
        for index in range(len(each.recipe.guidance or ()))
    ]
    starts = {each.recipe.start.of: each.recipe for each in settings if each.recipe.start is not None}
    started = starts.get("others", starts.get("class", recipe))
    exemplars = drawn_exemplars(started, image_shape, list(labels.of))
    notes += exemplars.warnings if exemplars else []
    fewest = min(exemplars.counts.values()) if exemplars else 0
    of_few = {index: term.of_few(fewest) for index, term in needing(guidance, "exemplars")} if fewest else {}
    notes += [f"{at[index] if mix else f'guidance[{index}]'}.{note}" for index, note in of_few.items() if note]
    extractors: dict[str, FeatureExtractor] = {}
    for index, term in potentials(guidance):
        if term.key not in extractors:
            with named(at[index]):
                extractors[term.key] = load_for(term.looks, list(labels.of)).to(device)
    exemplars = fitting(exemplars, guidance, extractors)
    targets: dict[str, dict[int, int]] = {name: {} for name in labels.of}
    for index, term in potentials(guidance):
        with named(at[index]):
            seen = _tried(term, extractors[term.key], outline)
            if (asked := class_request(term)) is not None:
                names, classes = extractors[term.key].classes, labels.model_classes or outline.classes
                for name, target in targets_of(asked, names, seen.shape[1], labels.of, classes).items():
                    targets[name][index] = target

    denoiser = with_weights(outline, recipe.model.name, options, labels.null_class)
    provenance = provenance_of(
        denoiser, device, resolved.levels, exemplars, extractors, notes, inverted.sha256 if inverted else None
    )
    if inverted is not None:
        inverted.check(denoiser, provenance["model_sha256"])
    prompts = all_prompts(recipe.model.prompts)
    told = prompts[:1] if denoiser.prompted else [next(iter(labels.of.values()), 0) or 0]
    compared = any(term.scale for _, term in needing(guidance, "null condition"))
    if denoiser.prompted and compared and resolved.levels.steps <= FEW_STEPS:
        notes.append(
            f"classifier-free guidance with only {counted(resolved.levels.steps, 'step')}: models distilled for few steps "
            "have it built in. If yours is such a model, use --scale 0 or --guidance chamfer"
        )
    notes += too_few_left(recipe, {name: counts[name] for name in labels.of if name in counts}) if counts else []
    notes += make_ready(
        denoiser, prompts, placement, resolved.levels, told, encoded_by(options, provenance["model_sha256"], device)
    )
    columns = [column for each in settings for column in energy_columns(each.recipe.guidance or ()) if column]
    energies = list(dict.fromkeys(columns))
    recipe, cohorts, planned = _planned(recipe, labels.of, asked_classes, kept)
    notes += planned
    parts: list[Setting] = []
    if mix:
        recipe, parts = _mixed(recipe, mix, settings, targets, cohorts)
    directory.writer = Writer(recipe.output.format, recipe.output.image, tuple(labels.of))
    several = any(not isinstance(each, str) for each in recipe.model.prompts.values())
    job = Job(
        recipe,
        directory,
        denoiser,
        device,
        resolved.levels,
        exemplars,
        extractors,
        cohorts,
        manifest_schema(energies, started.start is not None, several),
        image_shape,
        provenance,
        notes,
        allow_version_change,
        inverted,
        targets,
        parts=parts,
        timeouts=timeouts or Timeouts(),
    )
    check_against_stored(job)
    marked = directory.marked()
    job.done = {each.key for each in job.cohorts if each.key in marked and directory.finished(each, job.schema)}
    check_rest(job)
    return job


def _mixed(
    recipe: Recipe,
    mix: Sequence[MixRequest],
    settings: Sequence[Resolved],
    targets: Mapping[str, Mapping[int, int]],
    cohorts: Sequence[Cohort],
) -> tuple[Recipe, list[Setting]]:
    """The recipe of a mixture with its settings decided, and what each cohort's job takes."""
    shares = [each.share for each in mix]
    for name in dict.fromkeys(cohort.class_name for cohort in cohorts):
        count = sum(cohort.class_name == name for cohort in cohorts)
        if {setting_of(index, shares) for index in range(count)} != set(range(len(shares))):
            problem = f"class '{name}' has {counted(count, 'cohort')}, but mix has {len(mix)} settings, and each needs one"
            raise RequestError("mix", len(mix), problem, "Use a smaller cohort (--cohort), or more images (--per-class).")
    parts, first = [], 0
    for each in settings:
        count = len(each.recipe.guidance or ())
        own = {name: {i - first: to for i, to in of.items() if first <= i < first + count} for name, of in targets.items()}
        way = {"guidance": each.recipe.guidance, "start": each.recipe.start, "mix": None}
        parts.append(Setting(recipe.model_copy(update=way), each.levels, own))
        first += count
    decided = tuple(
        MixRequest(share=asked.share, guidance=part.recipe.guidance or (), start=part.recipe.start)
        for asked, part in zip(mix, parts, strict=True)
    )
    return recipe.model_copy(update={"guidance": None, "start": None, "mix": decided}), parts


def _with_kept_classes(recipe: Recipe, kept: Mapping[str, Sequence[int]]) -> Recipe:
    """The classes asked for, after those of which images are there: what is there stays."""
    if recipe.classes is None or set(kept) <= set(recipe.classes):
        return recipe
    return recipe.model_copy(update={"classes": tuple(dict.fromkeys([*kept, *recipe.classes]))})


def _planned(
    recipe: Recipe, labels: Mapping[str, int | None], asked: Sequence[str] | None, kept: Mapping[str, Sequence[int]]
) -> tuple[Recipe, list[Cohort], list[str]]:
    """The cohorts, and the recipe that asks for them: what is there stays, whatever is asked for now."""
    wanted = {name: recipe.images_of(name) if asked is None or name in asked else 0 for name in labels}
    cohorts, classes_of = plan_cohorts(labels, wanted, recipe.cohort, kept), defaultdict[str, list[str]](list)
    counts = dict.fromkeys(labels, 0)
    for cohort in cohorts:
        counts[cohort.class_name] += cohort.count
    for name, sizes in kept.items():
        if counts.get(name, 0) > wanted.get(name, 0):
            classes_of[f"it keeps {counted(counts[name], 'image')} made before; you asked for {wanted[name]}"].append(name)
        short = next((index for index, size in enumerate(sizes) if size < recipe.cohort), None)
        if short is not None and counts.get(name, 0) > sum(sizes[: short + 1]):
            classes_of[
                f"its cohort {short} keeps {counted(sizes[short], 'image')}, and new cohorts follow; a run that makes "
                f"{counts[name]} at once has other images from number {sum(sizes[:short])} on"
            ].append(name)
    notes = [f"class {some_of(names)}: {text}" for text, names in classes_of.items()]
    if counts == wanted and not recipe.counts:
        return recipe, cohorts, notes
    same = len(set(counts.values())) == 1
    update = {"per_class": max(counts.values()), "counts": {} if same else counts}
    return recipe.model_copy(update=update), cohorts, notes


def check_against_stored(job: Job, *, shared: bool = False) -> None:
    """Compares a job with what lies in its directory; a run of which no cohort is done binds nobody but those who work on it.

    Args:
        shared: Others work here.

    Raises:
        RequestError: If another recipe's run lies there.
    """
    job.how, job.grown = [], False
    stored = job.directory.stored() if shared or job.directory.marked() else None
    if stored is None:
        return
    before, there, here = stored.pop(PROVENANCE), with_new_fields(stored), job.recipe.as_dict()
    job.grown = any(there.get(key) != here[key] for key in GROWING if key in there)
    begun = job.directory.begun()
    for data in (there, here):
        data["model"] = {key: value for key, value in data["model"].items() if key != "labels"}  # compared one by one below
        for key in GROWING:
            data.pop(key, None)
        if job.grown:  # labels and prompts of the classes that are there are compared one by one
            model = data["model"] = dict(data["model"])
            model.pop("classes", None)
            model["prompts"] = {name: text for name, text in (model.get("prompts") or {}).items() if name in begun}
    if _same_exemplars(job):  # of the classes that are there; others may be asked for now
        before["exemplars_sha256"] = job.provenance["exemplars_sha256"]
    plan, labels = job.directory.plan(), {cohort.class_name: cohort.label for cohort in job.cohorts}
    for name in begun:
        there[f"label of '{name}'"], here[f"label of '{name}'"] = plan.labels[name], labels.get(name)
    comparison = compared(there, here, before, job.provenance, CONTENTS)
    comparison.refuse(job.directory.path, "it holds the run of another recipe")
    job.how = comparison.how
    if job.recipe.output.format == "parquet" and begun and list(plan.labels) != list(labels):
        problem = (
            f"its parquet files have a fixed list of classes ({', '.join(list(plan.labels)[:8])}), so no class can be added"
        )
        remedy = "Generate the other classes into another --out, or all of them with --format webdataset or imagefolder."
        raise RequestError("classes", ", ".join(list(labels)[:8]), problem, remedy)


def _same_exemplars(job: Job) -> bool:
    """Whether the classes that are there were guided by the very images that guide them now."""
    if not isinstance(job.exemplars, Exemplars):
        return False
    before, now = drawn(job.directory.path), job.exemplars.hashes
    there = job.directory.begun() or before
    return bool(before) and all(name in now and sorted(before.get(name, ())) == sorted(now[name]) for name in there)


def check_rest(job: Job) -> None:
    """Says what has changed since what is done was made, and what space the rest takes.

    Raises:
        RequestError: If it was made by other versions, or the disk is too small.
    """
    stored = job.directory.stored() if job.done else None
    before = stored[PROVENANCE] if stored else {}
    left = [cohort for cohort in job.cohorts if cohort.key not in job.done]
    job.threads, job.changes = job.provenance["threads"], []
    if stored is not None and left:
        job.changes = [f"{line}; pixels may differ by rounding" for line in job.how] + _changes(job, before)
        job.threads = before.get("threads", job.threads)
    _check_space(job, sum(cohort.count for cohort in left))


def _changes(job: Job, before: dict[str, Any]) -> list[str]:
    changed = changed_versions(before, job.provenance)
    if changed and not job.allow_version_change:
        problem = f"its run was begun with other library versions ({'; '.join(changed)}), which may give other images"
        remedy = "Install the earlier versions, choose another --out, or add --allow-version-change to continue anyway."
        raise RequestError("out", job.directory.path, problem, remedy)
    told = [f"versions: {'; '.join(changed)}: this directory may hold images of both"] if changed else []
    if before.get("device") != job.provenance["device"]:
        told.append(f"device: {before.get('device')} then, {job.provenance['device']} now; pixels may differ by rounding")
    return told


def _check_space(job: Job, images: int) -> None:
    channels, height, width = job.image_shape
    raw = channels * height * width + height + 200  # uncompressed, a filter byte a row, the format's own headers
    job.bytes_needed = images * (-(-raw // _BLOCK) * _BLOCK + _ROW)
    free = job.directory.free_bytes()
    if job.bytes_needed > free:
        problem = f"the disk has {megabytes(free)} free, but {counted(images, 'image')} may need {megabytes(job.bytes_needed)}"
        raise RequestError("out", job.directory.path, problem, "Free some space, or choose another --out.")


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 2}f} MB"


@torch.enable_grad()
def _tried(term: PotentialRequest, extractor: FeatureExtractor, outline: Denoiser) -> Tensor:
    """What an extractor answers to a gray image of the size that guidance shows it: what it can't do is known now."""
    channels, height, width = outline.image_shape
    reduce, looks, name = term.reduce or 1, term.looks, term.key
    device = next(extractor.parameters(), torch.zeros(())).device
    shape = outline.shape if looks.noisy else (channels, height // reduce, width // reduce)
    gray = torch.zeros(1, *shape, device=device, requires_grad=True)
    try:
        row = answer(looks, extractor, gray)
    except HandfulError:
        raise
    except Exception as error:  # a network of the user's own may raise anything
        problem = f"it can't take images of {tuple(gray.shape[1:])} ({first_line(error)})"
        remedy = "State its size and channels (handful.features.FeatureExtractor)."
        raise RequestError(looks.field, name, problem, remedy) from error
    if not isinstance(row, Tensor) or row.ndim != 2 or len(row) != 1:
        problem = f"for one image it returns the shape {tuple(getattr(row, 'shape', ()))}"
        raise RequestError(looks.field, name, problem, "It must return one row of numbers for each image, (n, D).")
    if not bool(torch.isfinite(row).all()):
        kind = "logits" if looks.logits else "features"
        raise RequestError(looks.field, name, f"its {kind} contain NaN or infinite values", "Use another.")
    if not row.requires_grad:
        remedy = "Use only torch operations in it, without no_grad and detach; or name another extractor."
        raise RequestError(looks.field, name, "no gradient flows through it to the image", remedy)
    return row.detach()
