"""The command line's commands. Each imports what it needs when it runs, so that `handful --help` answers at once.

Results go to stdout (with --json one object, alone), everything else to stderr. A command raises; `console.py` turns what
it raises into one line and an exit code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from handful import __version__, console
from handful.errors import RequestError

if TYPE_CHECKING:
    from handful.generate.job import Job

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"handful {__version__}")
        raise typer.Exit


@app.callback()
def _handful(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")] = False,
) -> None:
    """Turn a handful of real images into a training set.

    Guides pretrained diffusion models by a few real images of each class, without training them, and measures whether
    what comes out has the quality and the diversity of real data.
    """


@app.command(short_help="Generate a labelled image set from exemplars.")
def generate(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe; the options below override it.", metavar="RECIPE.yaml")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A packaged model (digits), a directory that diffusers wrote, a hub name, a checkpoint (.pt, .safetensors), "
            "FILE.py:FUNCTION.",
            metavar="NAME",
        ),
    ] = None,
    exemplars: Annotated[str | None, typer.Option(metavar="DIR", help="Real images, a folder per class.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory; an interrupted run goes on there.")
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="Images to generate of each class.  [64]")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Exemplars drawn of each class.  [all]")] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            help="chamfer, energy, cfg, inversion or none; may be repeated.  [chamfer if there are exemplars]", metavar="METHOD"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Of the guidance; 0 is none.")] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="What exemplars are compared by: pixels, digits-guide, dinov2, clip, a directory, FILE.py:FUNCTION.",
            metavar="NAME",
        ),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option(metavar="FILE", help="What handful invert wrote, for inversion guidance.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.  [18]")] = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp_2m, ddim, ddpm or heun.  [dpmpp_2m]", metavar="NAME")] = None,
    cohort: Annotated[int | None, typer.Option(help="Images guided together.  [64]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all noise.  [0]")] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="Only these classes.")] = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of all the model's classes, by label.")
    ] = None,
    null_class: Annotated[int | None, typer.Option(help='The model\'s label for "no class".')] = None,
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For text models, how a class becomes a prompt.  [a photo of a {}]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, of the networks.  [float32]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.  [auto]")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Run the code in a pickled network: only of people that you trust.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other field of the recipe; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")] = False,
    allow_version_change: Annotated[
        bool, typer.Option("--allow-version-change", help="Go on with a run begun by other library versions.")
    ] = False,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    order: Annotated[str, typer.Option(hidden=True)] = "plan",
) -> None:
    """Generate a labelled image set from exemplars and a pretrained model.

    \b
    Examples:
      handful generate --model digits --exemplars digits/ --out out
      handful generate --model ./cifar10-unet --exemplars photos/ --k 32 --features dinov2 --out out
      handful generate --model stabilityai/stable-diffusion-2-1 --exemplars photos/ --dtype bfloat16 --out out
      handful generate --model digits --guidance cfg --scale 1 --per-class 256 --out baseline
      handful generate --model digits --guidance inversion --embeddings SGE.safetensors --per-class 100 --out many
      handful generate recipe.yaml --out out --set guidance.chamfer.every=1
      handful generate out/recipe.yaml --out again

    The same command goes on where an interrupted run stopped, and ends with the same files.
    """
    from handful.generate.recipe import did_you_mean, recipe_from
    from handful.generate.recipe_file import overridden, read_mapping

    flags: dict[str, Any] = {
        "model.name": model, "model.null_class": null_class, "model.classes": _listed(class_names),
        "model.template": template, "model.dtype": dtype, "model.trust_pickle": trust_pickle or None,
        "model.device": device, "exemplars.path": exemplars, "exemplars.per_class": k, "classes": _listed(classes),
        "per_class": per_class, "cohort": cohort, "seed": seed, "sampler.name": sampler, "sampler.steps": steps,
    }  # fmt: skip
    asked = recipe_from(
        overridden(
            {} if recipe is None else read_mapping(recipe), flags,
            guidance=guidance, scale=scale, features=features, embeddings=embeddings, settings=settings or (),
        )
    )  # fmt: skip
    if out is None:
        raise RequestError("out", None, "where to is not said", "Give a new or empty directory with --out DIR.")
    if order not in ("plan", "reversed"):
        raise RequestError("--order", order, "there is no such order", did_you_mean(order, ["plan", "reversed"], "Orders"))

    if quiet:
        from handful.libraries import hide_loading_bars

        hide_loading_bars()
    from handful.generate.job import prepare
    from handful.generate.run import run
    from handful.progress import progress_for

    job = prepare(asked, out, allow_version_change=allow_version_change)
    if not quiet:
        for note in [*job.notes, *job.changes]:
            print(f"note: {note}", file=sys.stderr)
    if dry_run:
        from handful.generate.describe import plan_as_dict, plan_as_text

        print(json.dumps(plan_as_dict(job)) if json_wanted else plan_as_text(job))
        return
    summary = run(job, progress_for(quiet), order=_places(job, order))
    failed = f"{summary.cohorts_failed} of {len(job.cohorts)} cohorts failed" if summary.failures else None
    if json_wanted:
        print(json.dumps(summary.as_dict() | ({"error": console.error_object("run", failed)} if failed else {})))
    elif not quiet:
        rate = f", {summary.images_per_second:.3g} images/s" if summary.images_per_second else ""
        print(f"{summary.images} images in {summary.out} ({summary.cohorts_done} cohorts made, {summary.cohorts_resumed} "
              f"were there, {summary.cohorts_failed} failed; {summary.seconds:.1f} s of sampling{rate})")  # fmt: skip
    if failed:
        for failure in summary.failures:
            print(f"error: {failure}", file=sys.stderr)
        print(f"error: {failed}; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command(short_help="Fit a few images of a new domain, to generate many.")
def invert(
    targets: Annotated[Path, typer.Argument(help="A folder of images: ten, more or fewer.")],
    model: Annotated[str, typer.Option(help="As for generate: a model of a neighbouring domain.", metavar="NAME")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write; an interrupted fit goes on there.")],
    segments: Annotated[
        int | None, typer.Option(help="Embeddings of a target, 1 to the number of guided steps: more are stricter.  [15]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 25,
    spacing: Annotated[str | None, typer.Option(help="Of the steps.  [the model's own]", metavar="NAME")] = None,
    interval: Annotated[
        str | None, typer.Option(metavar="LO,HI", help="Guided steps LO <= i < HI, 0 the last one.  [5,20 of 25 steps]")
    ] = None,
    score_scale: Annotated[float, typer.Option(help="Strength of the embeddings.")] = 2.0,
    method: Annotated[str, typer.Option(help="difference (closed form) or adam (the paper's).", metavar="NAME")] = "difference",
    epochs: Annotated[int | None, typer.Option(help="Of each segment.  [difference: 10, adam: 120]")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of adam.")] = 0.05,
    spread_weight: Annotated[float, typer.Option(help="What draws the targets' embeddings together.")] = 1.0,
    perturbation: Annotated[float, typer.Option(help="Noise on the embeddings when generating, unless said there.")] = 0.05,
    condition: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told: a class, a prompt, or null for nothing.  [null]")
    ] = None,
    clamp: Annotated[
        bool | None, typer.Option("--clamp/--no-clamp", help="Keep the model's estimate in range.  [where it makes pixels]")
    ] = None,
    class_names: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of all the model's classes, by label.")
    ] = None,
    null_class: Annotated[int | None, typer.Option(help='The model\'s label for "no class".')] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="At most so many images at once through the networks.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, of the networks.  [float32]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.  [auto]")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Run the code in a pickled network: only of people that you trust.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")] = False,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Fit a few images of a new domain (CRDI), so that generate makes many of them with a model of a neighbouring one.

    Writes the embeddings that carry the model to each target. The model itself is not changed, and no other model can use
    them. At the end the targets are reconstructed from their noised selves, and compared.

    \b
    Examples:
      handful invert babies/ --model ./ffhq-256 --out babies.safetensors
      handful generate --model ./ffhq-256 --guidance inversion --embeddings babies.safetensors --out babies-1000
      handful invert sketches/ --model digits --condition null --segments 5 --out sketches.safetensors
      handful invert photos/ --model stabilityai/stable-diffusion-2-1 --condition "a photo" --chunk 2 --out sge.safetensors

    The same command goes on where an interrupted fit stopped, and ends with the same file.
    """
    from handful.invert import EPOCHS_DONE, InvertRequest, prepare
    from handful.invert import invert as run_invert
    from handful.progress import progress_for

    given = {
        "name": model, "null_class": null_class, "classes": _listed(class_names), "device": device, "dtype": dtype,
        "trust_pickle": trust_pickle or None,
    }  # fmt: skip
    named: Any = method  # checked there
    request = InvertRequest(
        {name: value for name, value in given.items() if value is not None}, segments, steps, spacing, _pair(interval),
        score_scale, named, epochs, lr, spread_weight, perturbation, seed, condition, clamp, chunk,
    )  # fmt: skip
    job = prepare(request, targets, out)
    if not quiet:
        for note in job.notes:
            print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(json.dumps(job.as_dict()) if json_wanted else job.as_text())
        return
    summary = run_invert(job, progress_for(quiet, EPOCHS_DONE))
    if json_wanted:
        print(json.dumps(summary.as_dict()))
    elif not quiet:
        print(summary.as_text())


@app.command(short_help="Judge a generated set against real images.")
def evaluate(
    synthetic: Annotated[Path, typer.Argument(help="Generated images: a run directory, or a folder per class.")],
    real: Annotated[Path, typer.Option(metavar="DIR", help="Real images, a folder per class; not the exemplars.")],
    features: Annotated[
        str, typer.Option(help="The judge: digits-judge, dinov2, clip, a directory, FILE.py:FUNCTION.", metavar="NAME")
    ] = "dinov2",
    k: Annotated[int, typer.Option("--k", help="Neighbour of precision, recall, density and coverage.", min=1)] = 5,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Judge again after mild transforms of both sets.")] = True,
    ceiling: Annotated[bool, typer.Option("--ceiling/--no-ceiling", help="Measure real against real too.")] = True,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON there as well.")] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")] = False,
) -> None:
    """Judge a generated set against real images: precision, recall, density, coverage, F1, Frechet distance, Vendi score.

    Each is pooled and per class, with the value that one half of the real images gets against the other beside it. The
    judge should be unrelated to what guided: a gain that only the guide's own family sees is adversarial.

    \b
    Examples:
      handful evaluate out --real digits-held-out/ --features digits-judge
      handful evaluate out --real photos-held-out/ --features dinov2 --json > result.json
      handful evaluate out --real photos-held-out/ --features my_judge.py:load
    """
    from handful.evaluate import evaluate as judge
    from handful.tables import evaluation_table, print_table

    found = judge(synthetic, real, features, k=k, audit=audit, ceiling=ceiling)
    text = json.dumps(found.to_dict(), indent=None if json_wanted else 1)
    if report is not None:
        from handful.images import write_atomically

        write_atomically(report, (text + "\n").encode())
    if json_wanted:
        print(text)
    else:
        print_table(evaluation_table(found))


@app.command(short_help="Say what a recipe costs, before anything runs.")
def cost(
    recipe: Annotated[Path, typer.Argument(help="A recipe; the options below override it.", metavar="RECIPE.yaml")],
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Images guided together.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images of each class.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other field of the recipe; may be repeated.")
    ] = None,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")] = False,
) -> None:
    """Say what a recipe costs, before anything runs: operations an image, parameters, peak memory.

    Plain sampling and classifier-free guidance of the same model stand beside it. It reads no weights and no exemplars, and
    computes nothing. Published models are known by their hub names; others need their configs, in a directory or the hub.

    \b
    Examples:
      handful cost recipes/sd15-chamfer.yaml
      handful cost recipes/sd15-chamfer.yaml --set guidance.0.jacobian=gaussian --set chunk=8
      handful cost recipe.yaml --json
    """
    from handful.cost import cost_of
    from handful.generate.recipe import recipe_from
    from handful.generate.recipe_file import overridden, read_mapping
    from handful.tables import cost_tables, print_table

    flags = {"sampler.steps": steps, "cohort": cohort, "per_class": per_class}
    found = cost_of(recipe_from(overridden(read_mapping(recipe), flags, settings=settings or ())))
    if json_wanted:
        print(json.dumps(found.as_dict()))
        return
    for index, table in enumerate(cost_tables(found)):
        print("\n" * (index > 0), end="")
        print_table(table)


@app.command(short_help="The main job on packaged digits, end to end.")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory; an interrupted demo goes on there.")] = Path(
        "demo"
    ),
    seeds: Annotated[int, typer.Option(help="Repetitions, exemplars drawn anew in each.")] = 3,
    per_class: Annotated[int, typer.Option(help="Images to generate of each class.")] = 64,
    json_wanted: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
) -> None:
    """Generate digits without guidance, with classifier-free guidance and with Chamfer guidance, and compare them.

    Every set is judged on held-out real digits by a classifier that guided nothing, and a small classifier trained on it
    alone is tested on them. Writes run directories, contact_sheet.png and results.json.

    \b
    Examples:
      handful demo --seeds 1
      handful demo --out demo --json > rows.json
    """
    from handful.demo import demo as run_demo
    from handful.demo import means
    from handful.tables import demo_table, print_table

    rows = run_demo(out, seeds=seeds, per_class=per_class, say=lambda text: None if quiet else print(text, file=sys.stderr))
    if json_wanted:
        print(json.dumps(rows))
        return
    print_table(demo_table(means(rows)))
    print(f"\npictures: {out / 'contact_sheet.png'}   rows: {out / 'results.json'}   sets: {out}/seed-*/METHOD/")


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            "--interval", text, "these are not two whole numbers", "Write for instance --interval 5,20."
        ) from None
    return low, high


def _places(job: Job, order: str) -> list[int]:
    places = list(range(len(job.cohorts)))
    return places[::-1] if order == "reversed" else places


def main() -> NoReturn:
    """The console script: runs a command and exits with its code."""
    console.main(app)


if __name__ == "__main__":
    main()
