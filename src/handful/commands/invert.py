"""`handful invert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from handful.commands.shared import ClassNames, Device, DryRun, Dtype, Json, NullClass, Quiet, TrustPickle, listed, print_notes
from handful.errors import RequestError


def invert(
    targets: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images of the new domain: about ten.")],
    model: Annotated[str, typer.Option(help="A model of a similar domain, as in handful generate.", metavar="NAME")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write, FILE.safetensors; an interrupted fit continues.")
    ],
    segments: Annotated[
        int | None,
        typer.Option(
            help="Embeddings of each target, 1 to the number of guided steps; more follow the target more strictly.  [15]"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 25,
    spacing: Annotated[
        str | None, typer.Option(help="How the steps are spaced.  [the model's own way]", metavar="NAME")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(
            metavar="LO,HI",
            help="The guided steps: LO <= i < HI, counted back from the last step, which is 0.  [5,20 of 25 steps]",
        ),
    ] = None,
    score_scale: Annotated[float, typer.Option(help="Strength of the embeddings.")] = 2.0,
    method: Annotated[str, typer.Option(help="difference (closed form) or adam (the paper's).", metavar="NAME")] = "difference",
    epochs: Annotated[int | None, typer.Option(help="Epochs of each segment.  [difference: 10, adam: 120]")] = None,
    lr: Annotated[float, typer.Option(help="Learning rate, for --method adam.")] = 0.05,
    spread_weight: Annotated[float, typer.Option(help="Weight of the loss that keeps the targets' embeddings similar.")] = 1.0,
    perturbation: Annotated[
        float, typer.Option(help="Noise on the embeddings in handful generate, unless its recipe gives another value.")
    ] = 0.05,
    condition: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The model's condition: a class, a prompt, or null for none.  [null]")
    ] = None,
    clamp: Annotated[
        bool | None,
        typer.Option("--clamp/--no-clamp", help="Keep the denoised estimate within [-1, 1].  [clamp for pixel models]"),
    ] = None,
    class_names: ClassNames = None,
    null_class: NullClass = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="The most images to pass through the networks at once.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_pickle: TrustPickle = False,
    dry_run: DryRun = False,
    json_wanted: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a few images of a new domain (CRDI), so that handful generate can make many more with a model of a similar domain.

    Writes a file of embeddings, which guide this model to each of these images (the targets). The model is not changed, and no
    other model can use the file. At the end each target is noised, reconstructed, and compared with itself.

    \b
    Examples:
      handful invert babies/ --model ./ffhq-256 --out babies.safetensors
      handful generate --model ./ffhq-256 --guidance inversion --embeddings babies.safetensors --out babies-1000
      handful invert sketches/ --model digits --condition null --segments 5 --out sketches.safetensors
      handful invert photos/ --model stabilityai/stable-diffusion-2-1 --condition "a photo" --chunk 2 --out sge.safetensors

    The same command continues an interrupted fit, and ends with the same file.
    """
    from handful.generate.invert import EPOCHS_DONE, InvertRequest, prepare
    from handful.generate.invert import invert as run_invert
    from handful.runs.progress import progress_for

    given = {
        "name": model,
        "null_class": null_class,
        "classes": listed(class_names),
        "device": device,
        "dtype": dtype,
        "trust_pickle": trust_pickle or None,
    }
    named: Any = method  # checked there
    request = InvertRequest(
        {name: value for name, value in given.items() if value is not None},
        segments,
        steps,
        spacing,
        _pair(interval),
        score_scale,
        named,
        epochs,
        lr,
        spread_weight,
        perturbation,
        seed,
        condition,
        clamp,
        chunk,
    )
    job = prepare(request, targets, out)
    print_notes(job.notes, quiet)
    if dry_run:
        print(json.dumps(job.as_dict()) if json_wanted else job.as_text())
        return
    summary = run_invert(job, progress_for(quiet, EPOCHS_DONE))
    if json_wanted:
        print(json.dumps(summary.as_dict()))
    elif not quiet:
        print(summary.as_text())


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
