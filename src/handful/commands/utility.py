"""`handful utility`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from handful.commands.shared import Json, Quiet, Workers, named_folders


def utility(
    synthetic: Annotated[Path, typer.Argument(metavar="OUT", help="Generated images: a run directory, or a folder per class.")],
    test: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Real test images, a folder per class.  [images of the exemplars' folder that were not used as exemplars]",
        ),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Further real test images, out of distribution, such as sketches=sketches/ or ImageNet-V2; may be repeated.",
        ),
    ] = None,
    ood_classes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The class of each folder of --test and --ood: ImageNet's list of synsets, or a CSV file with folder,class.",
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="Another generated set to train on, for comparison; may be repeated."),
    ] = None,
    exemplars: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The exemplars, a folder per class.  [those that guided the run]")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The classifier: a pretrained network to fine-tune, such as dinov2-small or efficientnet-lite0.  [for "
            "images up to 64 pixels: a small network trained from scratch; else dinov2]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of classifiers to train on each set.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Training steps of each classifier.")] = 400,
    workers: Workers = 1,
    json_wanted: Json = False,
    quiet: Quiet = False,
) -> None:
    """Is it worth it? Train classifiers with and without the generated images, and test them on real images.

    Classifiers are trained on the exemplars alone (with augmentation), on the generated images alone, on both, and on each
    --baseline. All are tested on real images that were used for nothing else. The last line says whether the generated
    images help. Results are kept in the run directory.

    \b
    Examples:
      handful utility out
      handful utility out --test photos-held-out --ood sketches=sketches/
      handful utility out --ood v2=imagenetv2/ --ood r=imagenet-r/ --ood-classes LOC_synset_mapping.txt
      handful utility out --baseline plain=out-none --seeds 5
      handful utility out --features dinov2-small --json > utility.json
    """
    from handful.judge.worth import worth
    from handful.report.tables import print_table
    from handful.report.worth_table import worth_table
    from handful.runs.progress import Words, progress_for

    found = worth(
        synthetic,
        test=test,
        ood=named_folders(ood or [], "ood"),
        baselines=named_folders(baseline or []),
        exemplars=exemplars,
        features=features,
        ood_classes=ood_classes,
        seeds=seeds,
        steps=steps,
        workers=workers,
        progress=progress_for(quiet, Words("training", "trained", "classifiers")),
    )
    if json_wanted:
        print(json.dumps(found.to_dict(), allow_nan=False))
        return
    print_table(worth_table(found))
