"""`handful exemplars`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handful.commands.shared import Json
from handful.errors import RequestError

if TYPE_CHECKING:
    from handful.data.shared_exemplars import ExemplarFeatures


def exemplars(
    given: Annotated[
        str, typer.Argument(metavar="DIR", help="Real images, a folder per class; or a file of features, to say what it holds.")
    ],
    features: Annotated[
        list[str] | None, typer.Option(help="What sees the images, as for generate; may be repeated.", metavar="NAME")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write, FILE.safetensors.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model that will be guided: says the images' size and channels.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIDE|HxW", help="Instead of a model: the images' height and width, such as 32.")
    ] = None,
    channels: Annotated[int, typer.Option(help="With --size: 1 (gray) or 3.")] = 3,
    k: Annotated[int | None, typer.Option("--k", help="Exemplars drawn of each class.  [all]")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    reduce: Annotated[
        list[int] | None,
        typer.Option(help="Look at images of 1/REDUCE of the resolution; may be repeated.  [1]", metavar="REDUCE", min=1),
    ] = None,
    softplus: Annotated[
        float | None,
        typer.Option(metavar="BETA", help="See them with Softplus in place of every ReLU too, as terms with that softplus do."),
    ] = None,
    source: Annotated[str, typer.Option(metavar="TEXT", help="Where the images come from; kept in the file.")] = "",
    licence: Annotated[str, typer.Option(metavar="TEXT", help="What may be done with them; kept in the file.")] = "",
    json_wanted: Json = False,
) -> None:
    """Keep exemplars as features alone: a file that guides generate where the images can't be given away.

    It holds, for each extractor, the features of every image by class, in the order of the draw, with the extractor's
    digest and hashes of the images: no image, and no code. Guidance with other features than those is refused.

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
        raise RequestError("--features", None, "what shall see the images is not said", "Name it, such as --features dinov2.")
    if out is None or out.suffix != ".safetensors":
        raise RequestError("--out", out, "it is no name for the file to write", "Give --out NAME.safetensors.")
    if out.exists() or not out.absolute().parent.is_dir():
        problem = "it is there already" if out.exists() else "its folder is not there"
        raise RequestError("--out", out, problem, "Choose another --out; nothing has been touched.")
    shape = _shape(model, size, channels)

    from handful.data.exemplars import Exemplars
    from handful.features.registry import load_extractor
    from handful.features.softplus import softened

    extractors = [load_extractor(name) for name in dict.fromkeys(features)]
    if softplus is not None:
        extractors += [softened(extractor, softplus) for extractor in extractors]
    drawn = Exemplars.from_folder(given, channels=shape[0], size=shape[1:], k=k, seed=seed, minimum=1 if k == 1 else 2)
    for warning in drawn.warnings:
        print(f"note: {warning}", file=sys.stderr)
    made = ExemplarFeatures.of(
        drawn, extractors, tuple(dict.fromkeys(reduce or (1,))), seed=seed, source=source, licence=licence
    )
    for text in made.notes():
        print(f"note: {text}", file=sys.stderr)
    made.save(out)
    _say(made, out, json_wanted)


def _refuse_beside(file: Path, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise RequestError(
                name,
                value,
                f"'{file}' is a file of features already, and holds no images",
                "Give the folder of images, or the file alone to see what it holds.",
            )


def _shape(model: str | None, size: str | None, channels: int) -> tuple[int, int, int]:
    """(c, h, w) of the images to read."""
    if (model is None) == (size is None):
        raise RequestError(
            "--model",
            model,
            "the images' size is said twice" if model else "the images' size is not said",
            "Name the model that will be guided (--model), or its images' size (--size 32).",
        )
    if model is not None:
        from handful.models import skeleton

        return skeleton(model).image_shape
    sides = str(size).split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise RequestError("--size", size, "it is no size", "Write the side, such as 32, or HEIGHTxWIDTH.")
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
    names, counts = held.classes, sorted(set(held.counts.values()))
    print(
        f"{file}: {len(names)} classes of {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} exemplars "
        f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''}), "
        f"images of {height} x {width} x {channels}, draw of seed {held.seed}"
    )
    for view in views:
        print(f"  {view['features']} at reduce {view['reduce']}: {view['dimensions']} features an image")
    for name in ("source", "licence"):
        if told[name]:
            print(f"{name}: {told[name]}")
