"""`handful calibrate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from handful.commands import shared
from handful.errors import RequestError


def calibrate(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe: gives the model, the classes and the sampler; the options below override it.", metavar="RECIPE.yaml"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to guide, as in handful generate.", metavar="NAME")] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The classifier: a transformers model (a directory or hub name), digits-guide, clip, or FILE.py:FUNCTION.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory, or that of an interrupted calibration, which continues."),
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME=NUMBER",
            help="Which of the classifier's classes is a class of the model, such as cat=281; may be repeated.",
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(help="Images to generate of each class, to measure on.", min=1)] = 16,
    steps: shared.Steps = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp_2m, ddim, ddpm or heun.  [dpmpp_2m]", metavar="NAME")] = None,
    seed: shared.Seed = None,
    betas: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Softplus betas to try in place of ReLU; none keeps ReLU.  [none,3,5,8]"),
    ] = None,
    taus: Annotated[
        str | None, typer.Option(metavar="A:B,...", help="Inverse temperatures tau1:tau2 to try.  [1:1,1:0.5,1:0,0.5:0.5]")
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Real images, a folder per class: choose by judging generated images against them (needs --judge).",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The network that judges, such as dinov2; unrelated to the classifier (needs --real)."
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="With --real: the metric to choose by, such as robust_frechet, robust_f1 or utility.", metavar="COLUMN"
        ),
    ] = "robust_frechet",
    max_cost: Annotated[
        float, typer.Option(help="With --real: the longest sampling time to accept, relative to sampling without guidance.")
    ] = 1.15,
    scales: Annotated[str, typer.Option(help="With --real: guidance scales to try.", metavar="A,B,...")] = "0.2,0.4,0.8",
    jacobians: Annotated[
        str, typer.Option(help="With --real: ways to take the gradient to try.", metavar="A,B,...")
    ] = "gaussian,exact",
    trial_per_class: Annotated[
        int, typer.Option(help="With --real: images to generate of each class for each setting.", min=1)
    ] = 32,
    classes: shared.Classes = None,
    class_names: shared.ClassNames = None,
    null_class: shared.NullClass = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    trust_pickle: shared.TrustPickle = False,
    settings: shared.Settings = None,
    dry_run: shared.DryRun = False,
    json_wanted: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Find the settings (the pre-conditioning) with which an off-the-shelf classifier guides best.

    Runs the model without guidance and measures, at every step, how well the classifier is calibrated on the images it would
    see: with Softplus in place of ReLU, with other temperatures, with one temperature fitted for each level of noise, on the
    estimate and on the noisy image. With --real and --judge, the best settings of each kind then generate small sets; the one
    that is best for an unrelated judge after mild transforms is chosen, within --max-cost. Writes guidance.yaml (a block for a
    recipe), calibration.json, calibration.parquet and reliability.png.

    \b
    Examples:
      handful calibrate --model digits --classifier digits-guide --out calibrated
      handful calibrate --model digits --classifier digits-guide --real held-out/ --judge digits-judge --out calibrated
      handful calibrate --model ./cifar10-unet --classifier ./resnet-50 --class airplane=404 --class cat=281 --out calibrated
      handful calibrate recipe.yaml --classifier my_classifier.py:load --betas none,5 --taus 1:1,1:0 --out calibrated --dry-run

    The same command continues an interrupted calibration, and ends with the same files.
    """
    from handful.calibrate import MEASURED, CalibrateRequest, prepare
    from handful.calibrate import calibrate as run_calibrate
    from handful.calibrate.candidates import TAUS, read_betas, read_taus
    from handful.calibrate.report import calibration_table, trials_table
    from handful.calibrate.trials import SETS
    from handful.guidance.classifier import ClassifierRequest
    from handful.guidance.method import first_of
    from handful.recipe.file import anchored_extractor, overridden, read_mapping
    from handful.recipe.schema import recipe_from
    from handful.report.tables import print_table
    from handful.runs.progress import progress_for

    flags: dict[str, Any] = {
        "model.name": model,
        "model.null_class": null_class,
        "model.classes": shared.listed(class_names),
        "model.dtype": dtype,
        "model.device": device,
        "model.trust_pickle": trust_pickle or None,
        "classes": shared.listed(classes),
        "per_class": per_class,
        "seed": seed,
        "sampler.name": sampler,
        "sampler.steps": steps,
    }
    asked = recipe_from(overridden({} if recipe is None else read_mapping(recipe), flags, settings=settings or ()))
    if out is None:
        raise RequestError("out", None, "--out is missing", "Give a new or empty directory with --out DIR.")
    base = first_of(asked.guidance or (), ClassifierRequest)
    if classifier is not None:
        named = anchored_extractor(classifier, Path.cwd())
        base = base.model_copy(update={"classifier": named}) if base else ClassifierRequest(classifier=named)
    if base is None:
        remedy = "Name one with --classifier NAME, or give a recipe with classifier guidance."
        raise RequestError("--classifier", None, "no classifier is named", remedy)
    base = base.model_copy(update={"classes": {**base.classes, **_mapping(mapping or [])}})
    request = CalibrateRequest(
        asked,
        base,
        None if betas is None else read_betas(betas),
        TAUS if taus is None else read_taus(taus),
        _trials(real, judge, objective, max_cost, scales, jacobians, trial_per_class),
        " ".join(["handful", *sys.argv[1:]]),
    )
    shared.hide_bars(quiet)
    job = prepare(request, out)
    shared.print_notes(job.notes, quiet)
    if dry_run:
        print(json.dumps(job.plan()) if json_wanted else job.plan_text())
        return
    summary = run_calibrate(job, progress_for(quiet, MEASURED), progress_for(quiet, SETS))
    if json_wanted:
        print(json.dumps(summary.as_dict()))
    elif not quiet:
        print_table(calibration_table(summary.result))
        if summary.result["trials"]:
            print()
            print_table(trials_table(summary.result["trials"]))
        there = " (from an earlier run)" if summary.kept else ""
        chosen = summary.result["chosen"]
        print(f"\nchosen by {chosen['by']}: {chosen['candidate']}{there}")
        print(f"guidance: {out / 'guidance.yaml'}   picture: {out / 'reliability.png'}   all: {out / 'calibration.json'}")


def _mapping(texts: list[str]) -> dict[str, str | int]:
    """`cat=281` -> {"cat": 281}; `cat=tabby` -> {"cat": "tabby"}."""
    found: dict[str, str | int] = {}
    for text in texts:
        name, equals, of = text.partition("=")
        if not (name and equals and of):
            raise RequestError("--class", text, "this is not NAME=NUMBER", "Write for instance --class cat=281.")
        if name in found:
            raise RequestError("--class", text, f"'{name}' is mapped twice", "Map each class once.")
        found[name] = int(of) if of.isascii() and of.isdecimal() else of
    return found


def _trials(
    real: str | None, judge: str | None, objective: str, max_cost: float, scales: str, jacobians: str, per_class: int
) -> Any:
    from handful.calibrate.trials import TrialsRequest
    from handful.recipe.file import anchored_extractor

    if real is None and judge is None:
        return None
    if real is None or judge is None:
        remedy = "Give both; or give neither, to choose by calibration alone."
        raise RequestError("--judge" if judge is None else "--real", None, "--real and --judge only work together", remedy)
    try:
        numbers = tuple(float(part) for part in scales.split(","))
    except ValueError:
        raise RequestError("--scales", scales, "these are not numbers", "Write for instance --scales 0.2,0.4.") from None
    ways: Any = tuple(shared.listed(jacobians) or ())  # checked there
    folder = str(Path(real).expanduser().absolute())
    return TrialsRequest(folder, anchored_extractor(judge, Path.cwd()), objective, max_cost, numbers, ways, per_class)
