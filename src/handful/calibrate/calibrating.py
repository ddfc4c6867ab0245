"""`handful calibrate`: which pre-conditioning suits a classifier that shall guide (EluCD, arXiv 2310.11311, section 4).

First, without any real image: the reverse process runs unguided, and at every step each pre-conditioning's calibration error is
measured with respect to the class that the image was asked to be; its mean over the path, the integral calibration error, is
the paper's compass. A classifier can be calibrated and still guide adversarially, so then, where real images and an unrelated
judge are given, the best of each kind generate small sets, and what survives the audit decides (`calibrate.trials`).

    DIR/request.yaml         what was asked for, with its provenance
    DIR/guidance.yaml        the chosen guidance, ready for a recipe
    DIR/calibration.json     everything that was found
    DIR/calibration.parquet  a row for each candidate and step
    DIR/reliability.png      the picture
    DIR/trials/, confirmed/  sweeps, where there were real images; step_costs.json what a guided step was found to cost
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from handful.calibrate.analysis import Found, analyse, with_roughness
from handful.calibrate.candidates import BETAS, TAUS, Candidate, Looks, candidates
from handful.calibrate.plot import reliability_png
from handful.calibrate.report import guidance_block, guidance_yaml, rows_parquet
from handful.calibrate.shortlist import Choice, by_calibration, shortlist
from handful.calibrate.trials import Trials, TrialsRequest, by_trials, check_trials, most_sets, run_trials, step_costs
from handful.calibrate.watch import KEPT_STEPS, SEEN, Recorded, Sees, bytes_needed, kept_images, watch
from handful.errors import RequestError, counted
from handful.features.extractor import FeatureExtractor
from handful.features.softplus import softened
from handful.generate.job import Job, megabytes
from handful.generate.job import prepare as prepare_run
from handful.generate.run import same_arithmetic
from handful.guidance.classifier import ClassifierRequest
from handful.models import skeleton
from handful.recipe.file import PROVENANCE
from handful.recipe.resolve import model_options
from handful.recipe.schema import Recipe
from handful.runs.comparison import changed_versions, compared
from handful.runs.job_directory import OwnedDirectory
from handful.runs.progress import Progress, Words
from handful.runs.provenance import CONTENTS, DECIDING
from handful.runs.run_directory import explain_full_disk

REQUEST, RESULT, ROWS, PICTURE, GUIDANCE = (
    "request.yaml",
    "calibration.json",
    "calibration.parquet",
    "reliability.png",
    "guidance.yaml",
)
MEASURED = Words("measuring", "measured", "images")
FEW = 100  # images at a step, below which chance makes much of a calibration error


@dataclass(frozen=True)
class CalibrateRequest:
    """What is asked for.

    Attributes:
        recipe: Model, classes, images of each class, sampler and seed. Its guidance is not applied.
        classifier: Which, and which of its classes are meant; its other fields are what is sought.
        betas: Of Softplus, None for ReLU; None instead of a list: BETAS, or ReLU alone for a classifier without any ReLU.
        trials: What real images decide; None: calibration alone.
        command: As it was typed; kept with the result.
    """

    recipe: Recipe
    classifier: ClassifierRequest
    betas: tuple[float | None, ...] | None = None
    taus: tuple[tuple[float, float], ...] = TAUS
    trials: TrialsRequest | None = None
    command: str = ""


@dataclass
class CalibrateJob:
    """A checked calibration, ready to start.

    Attributes:
        run: The reverse process, its one term the plain classifier.
        classifiers: By Softplus, on the device; they share one network.
        targets: By class, the classifier's.
        asked: All that decides the result, as plain data.
        kept: What calibration.json says, where this same calibration is done.
        notes: What was concluded, in words for the user.
    """

    request: CalibrateRequest
    directory: OwnedDirectory
    run: Job
    classifiers: dict[float | None, FeatureExtractor]
    targets: dict[str, int]
    candidates: list[Candidate]
    asked: dict[str, Any]
    provenance: dict[str, Any]
    kept: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def sees(self) -> list[Sees]:
        return list(dict.fromkeys(each.sees for each in self.candidates))

    def plan(self) -> dict[str, Any]:
        """How much work it is, as plain data."""
        run, steps, sees = self.run, self.run.levels.steps, self.sees
        kept = sum(kept_images(run, name, len({looks for _, looks in sees})) for name in self.targets)
        trials = most_sets(self.request.trials) if self.request.trials else 0
        return {
            "out": str(self.directory.path),
            "model": run.recipe.model.name,
            "classifier": self.request.classifier.classifier,
            "classes": len(self.targets),
            "images": run.images,
            "steps": steps,
            "candidates": len(self.candidates),
            "denoiser_evaluations": run.images * steps,
            "classifier_evaluations": run.images * steps * len(sees),
            "gradients": kept * min(KEPT_STEPS, steps) * len(self.candidates),
            "trial_sets": trials,
            "trial_images": trials * len(self.targets) * self.request.trials.per_class if self.request.trials else 0,
            "bytes": bytes_needed(run, sees, _classes(self)),
            "there": self.kept is not None,
            "notes": self.notes,
        }

    def plan_text(self) -> str:
        """The plan as lines for people."""
        plan = self.plan()
        there = "; already done" if plan["there"] else ""
        return "\n".join(
            [
                f"out         {plan['out']}{there}",
                f"model       {plan['model']}, {counted(plan['classes'], 'class')}, {counted(plan['images'], 'image')}, "
                f"{counted(plan['steps'], 'step')}: {plan['denoiser_evaluations']} denoiser evaluations (one image once)",
                f"classifier  {plan['classifier']}: {plan['classifier_evaluations']} evaluations, "
                f"{plan['gradients']} gradients",
                f"candidates  {plan['candidates']}",
                f"trials      at most {plan['trial_sets']} small sets, {counted(plan['trial_images'], 'image')}"
                if plan["trial_sets"]
                else "trials      none: no real images are given (--real, --judge)",
                f"disk        {megabytes(plan['bytes'])} while it runs",
            ]
        )


@dataclass(frozen=True)
class CalibrateSummary:
    """What came of a calibration.

    Attributes:
        result: What calibration.json holds.
        kept: Whether it was there already.
    """

    out: Path
    result: dict[str, Any]
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"out": str(self.out), "resumed": self.kept, "kept": self.kept, **self.result}


def prepare(request: CalibrateRequest, out: str | Path) -> CalibrateJob:
    """Checks a request against the world; writes nothing.

    Args:
        out: A new or empty directory, or one with this same calibration, finished or not.

    Raises:
        RequestError: Naming what can't be done, and the remedy.
    """
    request.recipe.require_equal_counts("a calibration")
    if request.recipe.per_class < 2:
        problem = "temperatures are fitted to one half of a class's images and judged on the other"
        raise RequestError("per_class", request.recipe.per_class, problem, "Give 2 or more; 16 is usual.")
    directory = OwnedDirectory(out, REQUEST, job="calibration", request="request", doing="calibrating")
    stored = directory.stored()
    outline = skeleton(request.recipe.model.name, model_options(request.recipe))
    if not outline.label_count and not outline.prompted:
        problem = "it is unconditional, but calibration needs the class that each image was generated for"
        raise RequestError("model", request.recipe.model.name, problem, "Use a model that takes classes or prompts.")
    term = request.classifier.model_copy(update={"softplus": None, "temperatures": (), "tau1": 1.0, "tau2": 1.0, "scale": 1.0})
    with _as_options():
        run = prepare_run(request.recipe.model_copy(update={"guidance": (term,)}), directory.path / "reverse")
    settled: Any = next(iter(run.recipe.guidance or ()))
    classifiers, notes = _pre_conditioned(request, run.extractors[settled.key])
    targets = {name: of[0] for name, of in run.targets.items()}
    if request.trials is not None:
        notes += check_trials(request.trials, run, classifiers[None])
    made = candidates(list(classifiers), request.taus)
    recipe = run.recipe.as_dict()
    asked = {
        "recipe": {key: recipe[key] for key in recipe if key not in ("guidance", "exemplars")},
        "classifier": {"name": term.classifier, "classes": targets, "prompts": dict(term.prompts), "template": term.template},
        "betas": list(classifiers),
        "taus": [list(pair) for pair in request.taus],
        "trials": request.trials and request.trials.as_dict(),
    }
    provenance = {key: run.provenance[key] for key in (*DECIDING, *CONTENTS, "python", "device", "threads")}
    provenance["classifier_sha256"] = classifiers[None].digest
    job = CalibrateJob(request, directory, run, classifiers, targets, made, asked, provenance, None, [*run.notes, *notes])
    if job.run.images < FEW:
        job.notes.append(
            f"with only {counted(job.run.images, 'image')} per step even a perfectly calibrated classifier shows an error, "
            f"which is given beside each value (chance). Raise --per-class to see smaller differences"
        )
    _compare(job, stored)
    _check_space(job)
    return job


def calibrate(job: CalibrateJob, progress: Progress | None = None, trying: Progress | None = None) -> CalibrateSummary:
    """Measures, chooses and writes; takes what is there already.

    Raises:
        RequestError: If another process works in the directory, or another calibration has begun there meanwhile.
        RunError: If the model, a classifier or a trial fails.
    """
    progress = progress or Progress()
    if job.kept is not None:
        return CalibrateSummary(job.directory.path, job.kept, True)
    run, directory = job.run, job.directory
    with explain_full_disk(directory.path), directory.locked(), same_arithmetic(run.provenance["threads"]):
        _compare(job, directory.stored())
        asked = {**job.asked, PROVENANCE: {**job.provenance, "command": job.request.command, "notes": job.notes}}
        if directory.stored() is None:
            directory.publish(REQUEST, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True, width=120).encode())
        asked_trials = job.request.trials
        added = step_costs(asked_trials, run, job.candidates, job.classifiers, directory) if asked_trials else {}
        looks: list[Looks] = list(dict.fromkeys(looks for _, looks in job.sees))
        watch(run, job.classifiers, looks, directory, progress)
        progress.note("comparing pre-conditionings")
        found = _found(job)
        choice, trials = by_calibration(found), None
        if asked_trials and any(each.guides for each in found.values()):
            trials = run_trials(
                asked_trials,
                run,
                shortlist(found),
                _base(job),
                found,
                added,
                job.request.taus,
                directory.path,
                trying or Progress(),
            )
            choice = by_trials(trials)
        result = _result(job, found, choice, trials)
        _write(job, found, choice, result)
    return CalibrateSummary(directory.path, result, False)


def _found(job: CalibrateJob) -> dict[str, Found]:
    run = job.run
    recorded = Recorded(run, job.directory.path)
    labels = torch.tensor([job.targets[name] for name, _ in recorded.places()])
    found = analyse(recorded, job.candidates, labels, run.levels, run.recipe.seed)
    return with_roughness(found, recorded, job.classifiers, job.targets, run.device)


def _base(job: CalibrateJob) -> ClassifierRequest:
    """The classifier, with every class's counterpart by number."""
    return job.request.classifier.model_copy(update={"classes": dict(job.targets)})


def _result(job: CalibrateJob, found: Mapping[str, Found], choice: Choice, trials: Trials | None) -> dict[str, Any]:
    """What calibration.json holds: only what is the same whenever the same is asked, but for the trials' seconds."""
    run, of = job.run, choice.candidate
    levels = run.levels
    stored = job.directory.stored() or {}
    return {
        "model": run.recipe.model.name,
        "classifier": job.request.classifier.classifier,
        "images": run.images,
        "steps": levels.steps,
        "chosen": {**of.facts, "by": choice.by, "settings": dict(choice.settings)},
        "guidance": guidance_block(choice.request(_base(job), found)),
        "notes": [*job.notes, *choice.notes],
        "sigma_over_alpha": [_finite(float(levels[step].ratio)) for step in range(levels.steps)],
        "candidates": [
            {**each.as_dict(), "ece": [at.ece for at in each.steps], "accuracy_at_steps": [at.accuracy for at in each.steps]}
            for each in found.values()
        ],
        "reliability": {
            name: {
                str(step): {
                    key: [_finite(value) for value in getattr(at, key).tolist()] for key in ("count", "confidence", "accuracy")
                }
                for step, at in each.reliability.items()
            }
            for name, each in found.items()
        },
        "trials": trials and trials.as_dict(),
        "request": job.asked,
        PROVENANCE: stored.get(PROVENANCE, job.provenance),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(job: CalibrateJob, found: Mapping[str, Found], choice: Choice, result: dict[str, Any]) -> None:
    """The files; calibration.json last, as it says that all is done."""
    directory, run = job.directory, job.run
    name = Path(job.request.classifier.classifier.rpartition(":")[2] or job.request.classifier.classifier).name
    title = (
        f"{name} on what {Path(run.recipe.model.name).name} makes: {counted(run.images, 'image')}, {run.recipe.sampler.name}, "
        f"{counted(run.levels.steps, 'step')}; chosen: {choice.candidate.name}"
    )
    directory.publish(ROWS, rows_parquet(found))
    directory.publish(PICTURE, reliability_png(found, choice.candidate, title))
    directory.publish(GUIDANCE, guidance_yaml(choice.request(_base(job), found), choice))
    directory.publish(RESULT, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    shutil.rmtree(directory.path / SEEN, ignore_errors=True)  # large, and of no use to anyone now


def _pre_conditioned(
    request: CalibrateRequest, plain: FeatureExtractor
) -> tuple[dict[float | None, FeatureExtractor], list[str]]:
    """The classifier with each Softplus."""
    made: dict[float | None, FeatureExtractor] = {None: plain}
    notes: list[str] = []
    for beta in request.betas or BETAS:
        if beta is None:
            continue
        try:
            made[beta] = softened(plain, beta)
        except RequestError as error:
            if request.betas is not None:
                raise RequestError("--betas", beta, error.problem, "Use --betas none.") from None
            notes = [f"softplus is left out: {error.problem}"]
            break
    # the plain classifier is measured in any case: it is what all others are compared with
    return made, notes


def _classes(job: CalibrateJob) -> int:
    """How many the classifier has."""
    channels, height, width = job.run.image_shape
    with torch.no_grad():
        return job.classifiers[None].logits(torch.zeros(1, channels, height, width, device=job.run.device)).shape[1]


@contextmanager
def _as_options() -> Iterator[None]:
    """Tells what a term's field lacks as the command's options have it."""
    try:
        yield
    except RequestError as error:
        place, dot, name = error.field.partition("].")
        if not dot or not place.startswith("guidance["):
            raise
        remedy = f"{error.remedy} Here: --class NAME=NUMBER." if name.startswith("classes") else error.remedy
        raise RequestError(name, error.value, error.problem, remedy) from None


def _compare(job: CalibrateJob, stored: dict[str, Any] | None) -> None:
    """Sets `kept` where this same calibration is done."""
    job.kept = None
    if stored is None:
        return
    stored = dict(stored)
    before = stored.pop(PROVENANCE)
    comparison = compared(stored, job.asked, before, job.provenance, ("model_sha256", "classifier_sha256"))
    comparison.refuse(job.directory.path, "it holds another calibration")
    with suppress(OSError, ValueError):
        job.kept = json.loads((job.directory.path / RESULT).read_text(encoding="utf-8"))
    changed = changed_versions(before, job.provenance)
    job.notes += [line for line in comparison.how if line not in job.notes]
    if changed and job.kept is None:
        problem = f"it was begun with other library versions ({'; '.join(changed)})"
        raise RequestError("out", job.directory.path, problem, "Install the earlier versions, or choose another --out.")


def _check_space(job: CalibrateJob) -> None:
    needed, free = bytes_needed(job.run, job.sees, _classes(job)), job.directory.free_bytes()
    if job.kept is None and needed > free:
        problem = f"the disk has {megabytes(free)} free, but the calibration needs {megabytes(needed)} while it runs"
        raise RequestError("out", job.directory.path, problem, "Ask for fewer classes, images or --betas.")
