"""`handful exemplars`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.commands.shared import Json, print_notes
from handful.errors import RequestError, counted

if TYPE_CHECKING:
    from handful.data.shared_exemplars import ExemplarFeatures


def exemplars(
    given: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Real images, a folder per class; or a file of features, to show what it holds."),
    ],
    features: Annotated[
        list[str] | None,
        typer.Option(help="The feature extractor that will guide, as in handful generate; may be repeated.", metavar="NAME"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write, FILE.safetensors.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that will be guided: gives the images' size and channels.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIDE|HxW", help="Instead of --model: the images' size in pixels, such as 32 or 32x48."),
    ] = None,
    channels: Annotated[int, typer.Option(help="With --size: 1 (gray) or 3 (colour).")] = 3,
    k: Annotated[int | None, typer.Option("--k", help="Number of exemplars of each class, drawn at random.  [all]")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the draw.")] = 0,
    reduce: Annotated[
        list[int] | None,
        typer.Option(
            help="Compute features of images reduced to 1/REDUCE of the resolution; may be repeated.  [1]",
            metavar="REDUCE",
            min=1,
        ),
    ] = None,
    softplus: Annotated[
        float | None,
        typer.Option(
            metavar="BETA",
            help="Also compute features with Softplus in place of ReLU, for guidance with the same softplus setting.",
        ),
    ] = None,
    source: Annotated[str, typer.Option(metavar="TEXT", help="Where the images come from; kept in the file.")] = "",
    licence: Annotated[str, typer.Option(metavar="TEXT", help="What may be done with them; kept in the file.")] = "",
    json_wanted: Json = False,
) -> None:
    """Save only the features of your exemplars, in a file that can guide generate where the images may not be shared.

    The file holds no image and no code: for each feature extractor the features of every image by class, the extractor's
    digest, and hashes of the images. It can guide with these features only.

    \b
    Examples:
      handful exemplars photos/ --model ./my-unet --features dinov2 --k 32 --out photos.safetensors
      handful exemplars digits/ --size 8 --channels 1 --features digits-guide --source "UCI digits" --out digits.safetensors
      handful exemplars photos.safetensors
      handful generate --model ./my-unet --exemplars photos.safetensors --features dinov2 --out out
    """
    from handful.data.shared_exemplars import ExemplarFeatures, features_file

    file = features_file(given)
    if file is not None:
        _refuse_beside(
            file, {"--features": features, "--out": out, "--model": model, "--size": size, "--k": k, "--softplus": softplus}
        )
        _say(ExemplarFeatures.load(file), file, json_wanted)
        return
    if not features:
        remedy = "Name the feature extractor that will guide, such as --features dinov2."
        raise RequestError("--features", None, "--features is missing", remedy)
    if out is None or out.suffix != ".safetensors":
        raise RequestError("--out", out, "this is not the name of a .safetensors file", "Give --out NAME.safetensors.")
    if out.exists() or not out.absolute().parent.is_dir():
        problem = "this file exists already" if out.exists() else "its folder does not exist"
        raise RequestError("--out", out, problem, "Choose another --out; nothing has been changed.")
    shape = _shape(model, size, channels)

    from handful.data.exemplars import Exemplars
    from handful.features.registry import load_extractor
    from handful.features.softplus import softened

    extractors = [load_extractor(name) for name in dict.fromkeys(features)]
    if softplus is not None:
        extractors += [softened(extractor, softplus) for extractor in extractors]
    drawn = Exemplars.from_folder(given, channels=shape[0], size=shape[1:], k=k, seed=seed, minimum=1 if k == 1 else 2)
    print_notes(drawn.warnings)
    made = ExemplarFeatures.of(
        drawn, extractors, tuple(dict.fromkeys(reduce or (1,))), seed=seed, source=source, licence=licence
    )
    print_notes(made.notes())
    made.save(out)
    _say(made, out, json_wanted)


def _refuse_beside(file: Path, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            remedy = "Give the folder of images; or give the file without options, to see what it holds."
            raise RequestError(name, value, f"'{file}' is already a file of features, and holds no images", remedy)


def _shape(model: str | None, size: str | None, channels: int) -> tuple[int, int, int]:
    """(c, h, w) of the images to read."""
    if (model is None) == (size is None):
        problem = "both --model and --size are given" if model else "neither --model nor --size is given"
        remedy = "Give one of them: the model that will be guided (--model NAME), or its images' size (--size 32)."
        raise RequestError("--model", model, problem, remedy)
    if model is not None:
        from handful.models import skeleton

        return skeleton(model).image_shape
    sides = str(size).split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        remedy = "Write one number for square images, such as 32, or HEIGHTxWIDTH, such as 32x48."
        raise RequestError("--size", size, "this is not a size", remedy)
    return channels, int(sides[0]), int(sides[-1])


def _say(held: ExemplarFeatures, file: Path, json_wanted: bool) -> None:
    views = [
        {
            "features": held.names[view],
            "reduce": view.reduce,
            "dimensions": of_view[held.classes[0]].shape[1],
            "digest": view.digest,
        }
        for view, of_view in held.features.items()
    ]
    told: dict[str, Any] = {
        "file": str(file),
        "classes": held.counts,
        "images": list(held.shape),
        "seed": held.seed,
        "views": views,
        "source": held.source,
        "licence": held.licence,
        "made_by": dict(held.made_by),
        "digest": held.digest,
    }
    if json_wanted:
        print(json.dumps(told))
        return
    channels, height, width = held.shape
    names, counts = held.classes, sorted(held.counts.values())
    most = counted(counts[-1], "exemplar")
    print(
        f"{file}: {counted(len(names), 'class')} of {f'{counts[0]} to {most}' if counts[0] < counts[-1] else most} "
        f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}), "
        f"images of {height} x {width} x {channels}, draw of seed {held.seed}"
    )
    for view in views:
        print(f"  {view['features']} at reduce {view['reduce']}: {counted(view['dimensions'], 'feature')} an image")
    for name in ("source", "licence"):
        if told[name]:
            print(f"{name}: {told[name]}")
