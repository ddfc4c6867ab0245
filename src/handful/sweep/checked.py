"""Everything of a sweep that can be checked before the long work; nothing is written, so `--dry-run` is this and no more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handful.data.shared_exemplars import features_file
from handful.errors import RequestError, some_of
from handful.features.extractor import FeatureExtractor
from handful.features.registry import load_extractor
from handful.files.digests import marks
from handful.generate.job import prepare
from handful.recipe.file import PROVENANCE
from handful.runs.comparison import changed_versions
from handful.runs.job_directory import OwnedDirectory
from handful.runs.provenance import DECIDING
from handful.sweep.planned import PlannedSet, chosen_methods, completed, planned_sets
from handful.sweep.real import Folder, look_into, refuse_shared, split_places
from handful.sweep.request import SweepRequest
from handful.sweep.results import Record
from handful.sweep.store import check_same_sweep, read_records, sweep_directory


@dataclass
class SweepJob:
    """A checked sweep, ready to start.

    Attributes:
        request: With all that is automatic replaced by what it became.
        records: What is known of them, by name.
        pending: Those to work on now: not yet measured, of the methods asked for.
        real, exemplars, test: The folders; None without. Exemplars may be a file of features, which is no folder.
        judge: What judges; None where nothing is pending.
        image_shape: (c, h, w) of the generated images; None where nothing is pending.
        allow_version_change: Go on with run directories that other versions began.
    """

    request: SweepRequest
    directory: OwnedDirectory
    sets: list[PlannedSet]
    records: dict[str, Record]
    pending: list[PlannedSet]
    real: Folder
    exemplars: Folder | None
    test: Folder | None
    judge: FeatureExtractor | None = None
    image_shape: tuple[int, int, int] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    allow_version_change: bool = False

    @property
    def classes(self) -> list[str]:
        """The classes that are generated and judged."""
        return list(self.real.files)


def prepare_sweep(
    request: SweepRequest, out: str | Path, *, only: Sequence[str] | None = None, allow_version_change: bool = False
) -> SweepJob:
    """Checks a sweep against the world; writes nothing.

    Of every method with work to do, one set is prepared as `handful generate` would: the one with the most exemplars.

    Args:
        out: The sweep's directory: new, empty, or with a sweep that this one goes on with.
        only: Names of methods to work on; None: all.
        allow_version_change: Go on with a sweep that other versions of the libraries began.

    Raises:
        RequestError: Naming what can't be done, and the remedy.
    """
    request = completed(request)
    request.recipe.require_equal_counts("a sweep")
    sets = planned_sets(request)
    wanted = chosen_methods(request, only)
    directory = sweep_directory(out)
    stored = directory.stored()
    records = read_records(directory, sets)
    pending = [each for each in sets if each.setting.method in wanted and not records.get(each.name, {}).get("measured")]
    trials = {name: (each, directory.path / each.name) for name, each in _trials(pending).items()}
    tried: dict[str, _Tried] = {}
    classes = request.recipe.classes or (tuple(stored[PROVENANCE].get("classes") or ()) if stored else ())
    if not classes and trials:  # those of the model, which must be read to know them
        name, trial = next(iter(trials.items()))
        tried[name] = _tried(*trial, allow_version_change)
        classes = tried[name].classes
    real, exemplars, test = _folders(request, classes or None, directory.path)
    job = SweepJob(
        request,
        directory,
        sets,
        records,
        pending,
        real,
        exemplars,
        test,
        stored=stored,
        allow_version_change=allow_version_change,
    )
    if exemplars is not None:
        _check_pool(exemplars, sets)
        job.notes += refuse_shared(real, exemplars)
    halves = split_places(real, request.validation, request.neighbours)
    known: dict[str, Any] = {
        "classes": list(classes),
        "exemplars_sha256": _exemplars_digest(request, exemplars),
        "real_sha256": real.digest,
        "test_sha256": test and test.digest,
        "real_images": {split: sum(map(len, places.values())) for split, places in halves.items()},
    }
    if stored is not None:
        check_same_sweep(directory, stored, request, known, sets, records)
    if trials:
        job.judge = load_extractor(request.judge)
        _check_judge(job, request)
        tried |= {name: _tried(*trial, allow_version_change) for name, trial in trials.items() if name not in tried}
        known |= _known_of(job, list(tried.values()))
        if stored is not None:
            check_same_sweep(directory, stored, request, known, sets, records)
            _check_versions(job, stored, known)
    before = stored[PROVENANCE] if stored else {}
    features = {**before.get("features_sha256", {}), **known.get("features_sha256", {})}
    job.provenance = {**before, **known, "features_sha256": features}
    return job


@dataclass(frozen=True)
class _Tried:
    """What is kept of a prepared run: not its model, of which many would fill the memory."""

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]
    guides: dict[str, frozenset[str]]  # the weights of what guides


def _trials(pending: Sequence[PlannedSet]) -> dict[str, PlannedSet]:
    """Of each method one set to try: the one with the most exemplars."""
    trials: dict[str, PlannedSet] = {}
    for each in pending:
        best = trials.get(each.setting.method)
        if best is None or each.setting.k > best.setting.k:
            trials[each.setting.method] = each
    return trials


def _tried(planned: PlannedSet, out: Path, allow_version_change: bool) -> _Tried:
    """Prepares a set as `handful generate` would."""
    try:
        job = prepare(planned.recipe, out, allow_version_change=allow_version_change)
    except RequestError as error:
        field = error.field if error.field == "out" else f"methods.{planned.setting.method}: {error.field}"
        raise RequestError(field, error.value, error.problem, error.remedy) from None
    guides = {name: marks(extractor) for name, extractor in job.extractors.items()}
    return _Tried(tuple(dict.fromkeys(cohort.class_name for cohort in job.cohorts)), job.image_shape, job.provenance, guides)


def _known_of(job: SweepJob, tried: Sequence[_Tried]) -> dict[str, Any]:
    """What the tried sets and the judge add to the provenance; warns of a judge that guides."""
    assert job.judge is not None
    first = tried[0].provenance
    job.image_shape = tried[0].image_shape
    guides = {name: digest for each in tried for name, digest in each.provenance["features_sha256"].items()}
    weights, own = {name: of for each in tried for name, of in each.guides.items()}, marks(job.judge)
    same = [name for name, digest in guides.items() if digest == job.judge.digest or weights[name] & own]
    job.notes += [f"{name} both guides and judges (the same weights): use an unrelated judge" for name in same]
    return {
        **{name: first[name] for name in (*DECIDING, "python", "device", "threads", "model_sha256")},
        "judge_sha256": job.judge.digest,
        "features_sha256": guides,
    }


def _folders(request: SweepRequest, classes: Sequence[str] | None, out: Path) -> tuple[Folder, Folder | None, Folder | None]:
    """The real images, the exemplars' pool, and what classifiers are tested on."""
    pool, test = request.recipe.exemplars.path, request.utility and request.utility.test
    for name, root in (("real", request.real), ("recipe.exemplars.path", pool), ("utility.test", test)):
        if root is not None and Path(root).resolve() in (out.resolve(), *out.resolve().parents):
            problem = f"it is inside {name} '{root}', where it would count as one more class"
            raise RequestError("out", out, problem, "Choose an --out outside that folder.")
    real = look_into(request.real, classes, "real")
    return (
        real,
        look_into(pool, classes, "recipe.exemplars.path") if pool is not None and features_file(pool) is None else None,
        look_into(test, list(real.files), "utility.test") if test else None,
    )


def _exemplars_digest(request: SweepRequest, pool: Folder | None) -> str | None:
    """Of the folder, or of the file of features."""
    path = request.recipe.exemplars.path
    if pool is not None or path is None:
        return pool and pool.digest
    file = features_file(path)
    return file and hashlib.sha256(file.read_bytes()).hexdigest()


def _check_pool(pool: Folder, sets: Sequence[PlannedSet]) -> None:
    most = max(each.setting.k for each in sets)
    few = [f"'{name}' has {len(files)}" for name, files in pool.files.items() if len(files) < most]
    if few:
        raise RequestError("k", most, f"'{pool.root}' holds fewer exemplars: {some_of(few)}", "Ask for fewer, or add images.")


def _check_judge(job: SweepJob, request: SweepRequest) -> None:
    assert job.judge is not None
    if request.objective.endswith("judge_accuracy") and not job.judge.is_classifier:
        problem = f"the judge {request.judge} is not a classifier, which this column needs"
        raise RequestError("objective", request.objective, problem, "Choose another column, or use a classifier as the judge.")


def _check_versions(job: SweepJob, stored: dict[str, Any], known: dict[str, Any]) -> None:
    changed = changed_versions(stored[PROVENANCE], known)
    if changed and not job.allow_version_change:
        problem = f"it was begun with other library versions ({'; '.join(changed)}), which may give other rows"
        remedy = "Install the earlier versions, choose another --out, or add --allow-version-change to continue anyway."
        raise RequestError("out", job.directory.path, problem, remedy)
    job.notes += [f"versions: {'; '.join(changed)}: this directory may hold rows of both"] if changed else []
    for name in ("device", "threads"):
        if name in known and stored[PROVENANCE].get(name) != known[name]:
            job.notes.append(
                f"{name}: {stored[PROVENANCE].get(name)} then, {known[name]} now: seconds of both can't be compared"
            )
