"""`handful generate`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful import console
from handful.commands import shared
from handful.errors import RequestError, counted
from handful.guidance import METHODS
from handful.zoo import judge_of

if TYPE_CHECKING:
    from handful.generate.job import Job


def generate(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe; the options below override it.", metavar="RECIPE.yaml")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A packaged model (mnist, digits, cifar10), a diffusers directory, a Hugging Face hub name, a checkpoint "
            "(.pt, .safetensors), or FILE.py:FUNCTION.",
            metavar="NAME",
        ),
    ] = None,
    exemplars: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE", help="Real images, a folder per class; or a file of their features, from handful exemplars."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new directory, or that of an interrupted run, which continues.")
    ] = None,
    per_class: Annotated[
        list[str] | None,
        typer.Option(metavar="N|CAT=N,...", help="Images to generate of each class: one number, or a number by class.  [64]"),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Number of exemplars of each class, drawn at random.  [all]")] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(METHODS)} or none; may be repeated.  [chamfer if there are exemplars]", metavar="METHOD"
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Strength of the guidance; 0 is none.  [chamfer: 0.4, with pixels as features 0.2; others: by method]"
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="The features that compare images with exemplars: pixels, digits-guide, dinov2, clip, efficientnet-lite0, a "
            "directory, or FILE.py:FUNCTION.  [dinov2; pixels for most packaged models]",
            metavar="NAME",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --guidance classifier: a transformers model (a directory or hub name), digits-guide, clip, "
            "efficientnet-lite0, or FILE.py:FUNCTION.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --guidance inversion: the file that handful invert wrote.")
    ] = None,
    steps: shared.Steps = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp_2m, ddim, ddpm, heun or lcm.  [dpmpp_2m]", metavar="NAME")] = None,
    cohort: Annotated[
        int | None, typer.Option(help="Number of images guided together; changing it changes the images.  [64]")
    ] = None,
    seed: shared.Seed = None,
    classes: shared.Classes = None,
    class_names: shared.ClassNames = None,
    null_class: shared.NullClass = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|CAT=281,...",
            help="The model's label of each class: a number, the model's name for it, or an ImageNet synset; or a CSV, JSON "
            "or JSONL file of them.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="For text models: the prompt of a class, {} being its name.  [a photo of a {}]"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For text models: one or more prompts of each class, a CSV, JSON or JSONL file."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="Add a LoRA to the model; may be repeated.  [weight 1]")
    ] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD=FILE", help="Teach a text model a word (textual inversion); may be repeated."),
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="DIR", help="Replace the autoencoder of a latent model.")] = None,
    dtype: shared.Dtype = None,
    device: shared.Device = None,
    fit: shared.Fit = None,
    trust_pickle: shared.TrustPickle = False,
    settings: shared.Settings = None,
    image_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="imagefolder, webdataset or parquet.  [imagefolder]")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="KIND", help="png, jpeg:QUALITY, webp:QUALITY or webp-lossless.  [png]")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes on this machine that share the work.")] = 1,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="local, or ray: run --workers actors on a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="With --engine ray: the cluster's address, such as auto.  [a new cluster on this machine]"
        ),
    ] = None,
    ray_gpus: Annotated[
        float | None, typer.Option(metavar="SHARE", help="With --engine ray: GPUs of each actor, such as 0.5.  [1 on CUDA]")
    ] = None,
    heartbeat_timeout: Annotated[
        float,
        typer.Option(min=10, metavar="SECONDS", help="Take over the work of a process that gave no sign of life for so long."),
    ] = 90,
    step_timeout: Annotated[
        float,
        typer.Option(min=10, metavar="SECONDS", help="Take over the work of a process that made no sampling step for so long."),
    ] = 1800,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS/NUMBER", help="Make one image of a run again, such as cat/17, and check that it is the same."
        ),
    ] = None,
    dry_run: shared.DryRun = False,
    allow_version_change: shared.AllowVersionChange = False,
    json_wanted: shared.Json = False,
    quiet: shared.Quiet = False,
    order: Annotated[str, typer.Option(hidden=True)] = "plan",
) -> None:
    """Generate a labelled image set from exemplars and a pretrained model.

    \b
    Examples:
      handful generate --model digits --exemplars digits/ --out out
      handful generate --model ./cifar10-unet --exemplars photos/ --k 32 --features dinov2 --out out
      handful generate --model stabilityai/stable-diffusion-2-1 --exemplars photos/ --dtype bfloat16 --out out
      handful generate --model digits --guidance cfg --scale 1 --per-class 256 --out baseline
      handful generate --model ./cifar10-unet --guidance classifier --classifier ./resnet-50 --out out
      handful generate --model digits --guidance inversion --embeddings SGE.safetensors --per-class 100 --out many
      handful generate recipe.yaml --out out --set guidance.chamfer.every=1
      handful generate out/recipe.yaml --out again
      handful generate out/recipe.yaml --out out --per-class cat=500,dog=200 --workers 4
      handful generate out/recipe.yaml --only cat/17

    The same command continues an interrupted run, and ends with the same files. Started several times, here or on other
    machines that share the folder, the processes share the work.
    """
    from handful.recipe.file import overridden, read_mapping
    from handful.recipe.prompting import read_prompts
    from handful.recipe.schema import did_you_mean, recipe_from

    flags: dict[str, Any] = {
        "model.name": model,
        "model.null_class": null_class,
        "model.classes": shared.listed(class_names),
        "model.labels": labels if labels is None or "=" not in labels else shared.label_pairs(labels),
        "model.template": template,
        "model.prompts": None if prompts is None else read_prompts(prompts),
        "model.lora": [shared.lora_option(one) for one in lora] if lora else None,
        "model.embeddings": {word: file for word, _, file in (one.partition("=") for one in embedding)} if embedding else None,
        "model.vae": vae,
        "model.dtype": dtype,
        "model.trust_pickle": trust_pickle or None,
        "model.device": device,
        "exemplars.path": exemplars,
        "exemplars.k": k,
        "classes": shared.listed(classes),
        "per_class": _counts(per_class, quiet),
        "output.format": image_format,
        "output.image": image,
        "cohort": cohort,
        "seed": seed,
        "sampler.name": sampler,
        "sampler.steps": steps,
    }
    asked = recipe_from(
        overridden(
            {} if recipe is None else read_mapping(recipe),
            flags,
            guidance=guidance,
            scale=scale,
            features=features,
            classifier=classifier,
            embeddings=embeddings,
            settings=settings or (),
        )
    )
    if out is None and only is not None and recipe is not None and (recipe.parent / ".handful").is_dir():
        out = recipe.parent
    if out is None:
        raise RequestError("out", None, "--out is missing", "Give a new or empty directory with --out DIR.")
    if engine not in ("local", "ray"):
        raise RequestError("--engine", engine, "there is no such engine", did_you_mean(engine, ["local", "ray"], "Engines"))
    if engine == "local" and (ray_address or ray_gpus is not None):
        raise RequestError("--ray-address", ray_address or ray_gpus, "the engine is not ray", "Add --engine ray.")
    if order not in ("plan", "reversed"):
        raise RequestError("--order", order, "there is no such order", did_you_mean(order, ["plan", "reversed"], "Orders"))

    shared.hide_bars(quiet)
    from handful.generate.job import prepare
    from handful.generate.run import run
    from handful.runs.claims import Timeouts
    from handful.runs.progress import progress_for

    chosen: list[str] = []
    if fit is not None:
        from handful.cost.fit import fitted
        from handful.runs.provenance import choose_device

        asked, chosen = fitted(asked, fit, str(choose_device(asked.model.device)), sharing=workers if engine == "local" else 1)
    timeouts = Timeouts(heartbeat_timeout, step_timeout)
    job = prepare(asked, out, allow_version_change=allow_version_change, timeouts=timeouts)
    shared.print_notes([*chosen, *job.notes, *job.changes], quiet)
    if dry_run:
        from handful.generate.describe import plan_as_dict, plan_as_text

        print(json.dumps(plan_as_dict(job)) if json_wanted else plan_as_text(job))
        return
    if only is not None:
        from handful.generate.again import make_again

        again = make_again(job, only)
        print(json.dumps(again.as_dict()) if json_wanted else again.as_text())
        raise typer.Exit(0 if again.same else 1)
    if engine == "ray":
        from handful.generate.ray_engine import run_by_ray

        summary = run_by_ray(job, asked, workers, progress_for(quiet), address=ray_address, gpus=ray_gpus)
    elif workers > 1:
        from handful.generate.workers import run_with_workers

        summary = run_with_workers(job, asked, workers, progress_for(quiet))
    else:
        summary = run(job, progress_for(quiet), order=_places(job, order))
    failed = f"{summary.cohorts_failed} of {counted(len(job.cohorts), 'cohort')} failed" if summary.failures else None
    if json_wanted:
        print(json.dumps(summary.as_dict() | ({"error": console.error_object("run", failed)} if failed else {})))
    elif not quiet:
        counts = {
            "already done": summary.cohorts_resumed,
            "failed": summary.cohorts_failed,
            "made by other processes": summary.cohorts_elsewhere,
        }
        others = "".join(f", {count} {words}" for words, count in counts.items() if count)
        rate = f", {summary.images_per_second:.3g} images/s" if summary.images_per_second else ""
        print(
            f"{counted(summary.images, 'image')} in {summary.out} (cohorts: {summary.cohorts_done} made{others}; "
            f"{summary.seconds:.1f} s of sampling{rate})"
        )
        if not failed:
            print(f"next: {_next(job, out)}", file=sys.stderr)
    if failed:
        for failure in summary.failures:
            print(f"error: {failure}", file=sys.stderr)
        print(f"error: {failed}; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


def _next(job: Job, out: Path) -> str:
    """The command that judges what was made."""
    from handful.recipe.exemplar_source import has_images

    judge = judge_of(job.recipe.model.name, (getattr(term, "features", None) for term in job.recipe.guidance or ()))
    real = "" if has_images(job.recipe) else " --real DIR"
    return f"handful evaluate {shlex.quote(str(out))} --judge {judge}{real}"


def _counts(given: list[str] | None, quiet: bool) -> int | dict[str, int] | None:
    """ "64", or "cat=500,dog=200" in one piece or several; of several numbers the last one."""
    if not given:
        return None
    text, remedy = ",".join(given), "Write --per-class 64, or --per-class cat=500,dog=200."
    if all(each.isdecimal() for each in given):
        if len(given) > 1 and not quiet:
            print(f"note: --per-class is given {len(given)} times; the last one counts", file=sys.stderr)
        return int(given[-1])
    counts: dict[str, int] = {}
    for name, _, number in (part.rpartition("=") for part in text.split(",")):
        if not name.strip() or not number.strip().isdecimal():
            raise RequestError("--per-class", text, "this is neither a number nor a list of CLASS=NUMBER", remedy)
        if counts.setdefault(name.strip(), int(number)) != int(number):
            raise RequestError("--per-class", text, f"class '{name.strip()}' has two numbers", remedy)
    return counts


def _places(job: Job, order: str) -> list[int]:
    places = list(range(len(job.cohorts)))
    return places[::-1] if order == "reversed" else places
