"""Judges a folder of generated images against real ones: every metric, a ceiling beside it, what is left after mild transforms,
and what it gains over baselines.

The judge should share nothing with the guide: another architecture, other training (docs/findings.md,
section 4). Each number is meaningless without the judge, k and n, so they travel with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from handful.data.exemplars import default_cache
from handful.data.regions import NEIGHBOURS, REGION
from handful.data.shared_exemplars import features_file
from handful.data.sources import LabelledFiles, labelled_files
from handful.errors import Note, RequestError, counted
from handful.features.registry import FeatureExtractor, load_extractor
from handful.files.digests import marks
from handful.judge.clip_score import ClipScore
from handful.judge.copies import CopyCheck
from handful.judge.evaluation import Evaluation
from handful.judge.gains import AS_IS, compare
from handful.judge.groups import by_group, read_groups
from handful.judge.image_sets import FileImages, common_size
from handful.judge.judge import Judge, Seen
from handful.judge.viewer import Keeping, Viewer, eye
from handful.metrics.catalogue import chosen
from handful.runs.kept import keep, key_of, run_root
from handful.runs.metadata import exemplars_of, guided_by, prompts_of, unused_images
from handful.runs.processes import Processes
from handful.runs.progress import Progress

__all__ = ["Evaluation", "Judge", "Seen", "evaluate"]


def evaluate(
    synthetic: str | Path,
    real: str | Path | None = None,
    judge: str = "dinov2",
    *,
    neighbours: int | None = None,
    audit: bool = True,
    ceiling: bool = True,
    baselines: Mapping[str, str | Path] | None = None,
    exemplars: str | Path | None = None,
    judge_class: Mapping[str, str | int] | None = None,
    metrics: Sequence[str] = (),
    groups: str | None = None,
    clip: str | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    workers: int = 1,
    features: str | None = None,
    k: int | None = None,
) -> Evaluation:
    """Judges a folder of generated images (or a run directory) against a folder of real ones, a folder per class each.

    Where all images have one size they are judged at it. Else each is cropped and resized once, to the judge's own input size.
    Images are read part by part, and what the judge sees of them is kept by content: an interrupted evaluation goes on.

    Args:
        synthetic, real: The images (`handful.data.sources`). Real ones must not be the exemplars: the generator knows those.
            Without real ones, those of the run's exemplars' folder that guided nothing.
        judge: A name that `handful.features.load_extractor` knows.
        neighbours: As `k` of `Judge`; None: 5, or what the real set's own protocol says (GeoDE and DollarStreet: 3, and
            groups by region where none are asked for).
        audit, ceiling, judge_class, metrics: As for `Judge`.
        baselines: By name, sets to compare with: of the same classes and size as the synthetic one.
        exemplars: The folder of the exemplars, to count copies of them; None: those that guided the run, where they are there.
        groups: Measure by group too; see `handful.judge.groups.read_groups`.
        clip: A CLIP, for CLIPScore: each image to the prompt of its class (the run's own, or "a photo of a CLASS").
        seed: Of the bootstrap draws that separate a gain from chance.
        cache: Where features are kept; None: `handful.data.exemplars.default_cache()`.
        progress: Is notified of every image.
        workers: Processes that take the features; each has its share of the threads.
        features, k: Former names of `judge` and `neighbours`.

    Raises:
        RequestError: If a folder, the classes, an image, a baseline, the exemplars or the judge do not fit; said before any
            feature is taken.
    """
    for old, given, new in (("features", features, "judge"), ("k", k, "neighbours")):
        if given is not None:
            warnings.warn(f"evaluate({old}=...) is now called {new}=", DeprecationWarning, stacklevel=2)
    judge, neighbours, baselines = features or judge, k or neighbours, dict(baselines or {})
    notes: list[str] = []

    def tell(text: str, kind: type[Warning] = UserWarning) -> None:
        notes.append(text)
        warnings.warn(text, kind, stacklevel=3)

    sets, neighbours = _listed(synthetic, real, baselines, neighbours, tell)
    classes, known = sets["synthetic"].files.classes, sets["real"].files
    groups = groups or (REGION if REGION in known.columns else None)
    grouped = {role: read_groups(sets[role].files, groups, tell, role, known) for role in ("real", "synthetic") if groups}
    scorer = clip and ClipScore(clip, {name: prompts_of(synthetic).get(name, f"a photo of a {name}") for name in classes})
    metrics = [*metrics, *(["clip_score"] if clip and "clip_score" not in metrics else [])]
    chosen(metrics)  # refuses unknown ones before any image is looked at
    if exemplars is not None:
        labelled_files(exemplars, classes=classes, field="exemplars", flat=True)
    elif (drawn := exemplars_of(synthetic)) is not None and features_file(drawn.folder) is None:
        try:
            labelled_files(drawn.folder, classes=classes, field="exemplars", flat=True)
            exemplars = drawn.folder
        except RequestError as error:
            tell(f"copies are not counted: {error}", Note)
    try:
        extractor = load_extractor(judge)
    except RequestError as error:
        field = "judge" if error.field == "features" else error.field
        raise RequestError(field, error.value, error.problem, error.remedy) from error
    keeping = Keeping(default_cache() if cache is None else cache, progress or Progress())
    waiting = _make_ready(sets, extractor, Viewer(extractor, audit, keeping), tell)
    for name, folder in {"": synthetic, **baselines}.items():
        if guided_by(folder, judge, extractor.digest, marks(extractor)):
            which = f"the baseline {folder}" if name else "these images"
            tell(f"{judge} guided {which}, so it judges its own work: use an unrelated judge (--judge)")
    reference, made = sets["real"], sets["synthetic"]
    processes = Processes(workers if waiting else 1, eye, judge, extractor.digest, note=tell)
    keeping.processes = processes
    try:
        sitting = Judge(
            reference,
            reference.labels,
            extractor,
            k=neighbours,
            audit=audit,
            ceiling=ceiling,
            judge_class=judge_class,
            metrics=metrics,
            keeping=keeping,
        )
        check = CopyCheck(exemplars, synthetic, reference, classes, keeping) if exemplars is not None else None
        seen = {name: _seen(sitting, check, scorer or None, images) for name, images in sets.items() if name != "real"}
        for role, images in sets.items():
            if role != "real":
                _tell_of_shared(role, images, seen[role].features[AS_IS], reference, sitting.real, tell)
            if role not in ("real", "synthetic"):
                _tell_of_shared(role, images, seen[role].features[AS_IS], made, seen["synthetic"].features[AS_IS], tell)
        for role, images in sets.items():
            if check is not None and role != "real" and (count := check.identical(images)):
                whose = "generated images" if role == "synthetic" else f"images of the {role}"
                tell(f"exemplars, pixel for pixel, among the {whose}: {count} of {len(images)}")
        keeping.progress.note("comparing features")
    finally:
        processes.close()
        keeping.progress.end()
    of_made = sitting.sets(seen["synthetic"])
    found, gains = sitting.judged(seen["synthetic"], of_made), {}
    views = None if baselines else [AS_IS]
    mine = sitting.measured(seen["synthetic"], found, of_made, stream="synthetic", seed=seed, views=views)
    for name in baselines:
        of_baseline = sitting.sets(seen[f"baseline {name}"])
        other = sitting.judged(seen[f"baseline {name}"], of_baseline)
        theirs = sitting.measured(seen[f"baseline {name}"], other, of_baseline, stream=f"baseline {name}", seed=seed)
        if theirs.images != mine.images:
            tell(
                f"the baseline {name} has {theirs.images} images and this set {mine.images}: recall, coverage, Frechet "
                f"distance and Vendi score depend on this number, so their gains mislead. Generate equal numbers"
            )
        gains[name] = compare(mine, theirs)
    of_groups = None
    if grouped:
        of_groups = by_group(of_made[AS_IS], grouped["real"], grouped["synthetic"], sitting.metrics, seed)
    notes += sitting.notes
    found = replace(found, gains=gains, intervals=mine.intervals(), groups=of_groups, notes=tuple(notes))
    if check is not None:
        root, flags = run_root(synthetic) or made.files.root, seen["synthetic"].per_image[AS_IS]["copied"]
        files = [Path(name) for name, is_copy in zip(made.files.names, flags, strict=True) if is_copy]
        found = replace(found, copies=tuple((f.relative_to(root) if f.is_relative_to(root) else f).as_posix() for f in files))
    asked = {
        "real": str(reference.files.root),
        "judge": judge,
        "neighbours": neighbours,
        "baselines": {name: str(folder) for name, folder in baselines.items()},
        "exemplars": exemplars and str(exemplars),
    }
    contents = {role: sorted(zip(images.labels, images.contents, strict=True)) for role, images in sets.items()}
    decided = [audit, ceiling, dict(judge_class or {}), list(metrics), groups, clip, seed]
    key = key_of([asked, extractor.digest, decided, contents])
    keep(synthetic, "evaluation", key, {"asked": asked, "result": found.to_dict()})
    return found


def _tell_of_shared(
    role: str, images: FileImages, seen: np.ndarray, other: FileImages, known: np.ndarray, tell: Callable[..., None]
) -> None:
    """Says how many images of a set are in another one: the same bytes, or to the judge the same (saved in another format)."""
    contents, features = set(other.contents), {row.tobytes() for row in known}
    same = [content in contents for content in images.contents]
    alike = [row.tobytes() in features for row in seen]
    if count := max(sum(same), sum(alike)):
        how = "byte for byte" if sum(same) == count else "with the same features of the judge"
        which = f"of the {role}" if role.startswith("baseline") else "of the generated images"
        if other.field == "real":
            where, so = "the real images", "metrics look too good. Give other real images"
        else:
            where, so = "those of the set itself", "the gains look too small. Compare with another set"
        tell(f"also among {where}, {how}: {count} {which}, so {so}")


def _seen(judge: Judge, check: CopyCheck | None, scorer: ClipScore | None, images: FileImages) -> Seen:
    seen = judge.see(images, images.labels)
    if scorer is not None:
        seen.per_image[AS_IS]["clip_score"] = scorer(images)
    if check is not None:
        seen.per_image[AS_IS]["copied"] = check(images)
    return seen


def _listed(
    synthetic: str | Path,
    real: str | Path | None,
    baselines: Mapping[str, str | Path],
    k: int | None,
    tell: Callable[..., None],
) -> tuple[dict[str, FileImages], int]:
    """All sets by role, the real one's classes being the generated ones', and k; refuses those that do not fit together."""
    made, wanted = labelled_files(synthetic, field="OUT", flat=True), _real(synthetic, real, tell)
    if k is None:
        k = NEIGHBOURS if REGION in wanted.columns else 5
    if unknown := [name for name in made.classes if name not in wanted.classes]:
        problem = f"it has no folder for {', '.join(unknown[:8])}, which {synthetic} has"
        raise RequestError("real", str(wanted.root), problem, "Add real images of these classes, or remove the folders.")
    if missing := [name for name in wanted.classes if name not in made.classes]:
        tell(f"real classes without generated images are left out: {', '.join(missing[:8])}", Note)
    places = wanted.by_class()
    found = {"synthetic": made, "real": wanted.only([place for name in made.classes for place in places[name]])}
    for role, files in found.items():
        _require_enough("OUT" if role == "synthetic" else role, files, k)
    for name, folder in baselines.items():
        files = labelled_files(folder, field="baseline", flat=True)
        _require_baseline(folder, files, found["synthetic"], found["real"])
        _require_enough("baseline", files, k)
        found[f"baseline {name}"] = files
    for files in found.values():
        for note in files.notes:
            tell(note, Note)
    sets = {role: FileImages(files, "OUT" if role == "synthetic" else role.partition(" ")[0]) for role, files in found.items()}
    height, width = sets["synthetic"].usual_size
    for role, images in sets.items():
        if role.startswith("baseline") and images.usual_size != (height, width):
            (h, w), root = images.usual_size, str(images.files.root)
            problem = f"its images have {h} x {w} pixels, the generated ones {height} x {width}"
            raise RequestError("baseline", root, problem, "Generate both at the same resolution.")
    return sets, k


def _real(synthetic: str | Path, real: str | Path | None, tell: Callable[..., None]) -> LabelledFiles:
    if real is not None:
        return labelled_files(real, field="real", flat=True)
    left = unused_images(synthetic)
    tell(f"compared with the {counted(len(left), 'image')} of {left.root} that were not used as exemplars", Note)
    return left


def _make_ready(sets: Mapping[str, FileImages], extractor: FeatureExtractor, viewer: Viewer, tell: Callable[..., None]) -> int:
    """Says what images are read as, and decodes those that the judge has not seen yet, so that none fails later.

    Returns:
        How many parts it has not seen yet.
    """
    made, others = sets["synthetic"], [images for role, images in sets.items() if role != "synthetic"]
    if extractor.squeeze and extractor.size:
        size = extractor.size
        note = f"each image is resized to {size[0]} x {size[1]} without cropping and rounded to 8 bits, as dgm-eval does"
    else:
        size, note = common_size(extractor.size, made, others)
    if note:
        tell(note, Note)
    if extractor.channels == 1 and made.has_colours:
        tell(f"the judge {extractor.name} sees gray images and these have colours: take a judge of such images")
    left = {}
    for role, images in sets.items():
        images.seen_as(extractor.channels or 3, size, extractor.squeeze)
        left[role] = viewer.pending(images, answers=extractor.is_classifier)
        images.check([part for part, _ in left[role]])
    total, views = sum(map(len, sets.values())), len(viewer.views)
    waiting = sum((part.stop - part.start) * len(missing) / views for parts in left.values() for part, missing in parts)
    viewer.keeping.progress.begin(total, total - round(waiting))
    return sum(map(len, left.values()))


def _require_enough(role: str, files: LabelledFiles, k: int) -> None:
    if len(files) <= k:
        problem = f"it has {counted(len(files), 'image')}, too few for {counted(k, 'neighbour')}"
        raise RequestError(role, str(files.root), problem, "Add images, or lower --neighbours.")


def _require_baseline(folder: str | Path, files: LabelledFiles, made: LabelledFiles, real: LabelledFiles) -> None:
    """Refuses what is no baseline of the synthetic set: its own or the real images, or other classes."""
    for role, known in (("generated", made), ("real", real)):
        if files.root.resolve() == known.root.resolve() or set(files.names) & set(known.names):
            remedy = "Name another set of the same classes, such as one generated with --guidance none."
            raise RequestError("baseline", str(folder), f"these are the {role} images themselves", remedy)
    lacks, more = (
        [repr(name) for name in a if name not in b] for a, b in ((made.classes, files.classes), (files.classes, made.classes))
    )
    if lacks or more:
        told = [f"lacks {', '.join(lacks[:5])}"] * bool(lacks) + [f"also has {', '.join(more[:5])}"] * bool(more)
        problem = f"its classes differ from those of the evaluated set: it {' and '.join(told)}"
        raise RequestError("baseline", str(folder), problem, "Generate both sets with the same --classes.")
