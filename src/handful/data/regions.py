"""GeoDE and DollarStreet as they are published: photographs with object and region (`geode:DIR`, `dollarstreet:DIR`).

The class of an image is its prompt, "{object} in {region}", and its group is the region, as in c-VSG (Askari Hemmat et al.,
ECCV 2024) and DIG In (Hall et al., arXiv 2308.06198), which generate by these prompts and measure by region with k = 3.

- GeoDE (Ramaswamy et al., NeurIPS 2023): `index.csv` with file_path, object, region; the images lie in `images/`.
- DollarStreet (Gaviria Rojas et al., NeurIPS 2022): `images_v2.csv` or `images.csv` with imageRelPath, topics, region.id; an
  image of several topics is an image of each.

`geode:DIR@180` is the published protocol: objects with at least 180 images in every region, and 180 of each, drawn once.
"""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from handful.data.archives import Listed, read_table
from handful.data.images import natural_order, open_file
from handful.errors import RequestError, counted

NEIGHBOURS = 3  # of precision, recall, density and coverage in these protocols
REGION = "region"


@dataclass(frozen=True)
class Layout:
    """Where a data set's index lies, and what its columns and regions are called.

    Attributes:
        indexes: File names, the first one that is there is read.
        folders: Where the index may lie, and where its paths begin.
        regions: By the index's word for a region, what prompts call it; others are taken unchanged.
    """

    title: str
    indexes: tuple[str, ...]
    folders: tuple[str, ...]
    path: str
    object: str
    region: str
    regions: Mapping[str, str]


_GEODE = {"Americas": "the Americas", "EastAsia": "East Asia", "SouthEastAsia": "Southeast Asia", "WestAsia": "West Asia"}
_DOLLARSTREET = {"af": "Africa", "am": "the Americas", "as": "Asia", "eu": "Europe"}
LAYOUTS = {
    "geode": Layout("GeoDE", ("index.csv",), ("images", ""), "file_path", "object", "region", _GEODE),
    "dollarstreet": Layout(
        "DollarStreet",
        ("images_v2.csv", "images.csv"),
        ("", "dataset_dollarstreet"),
        "imageRelPath",
        "topics",
        "region.id",
        _DOLLARSTREET,
    ),
}


def region_images(kind: str, root: Path, each: int | None, field: str) -> Listed:
    """Lists the images of one of `LAYOUTS`; reads none, but looks whether every file is there.

    Args:
        each: Only objects with so many images in every region, and so many of each; None: all.

    Raises:
        RequestError: There is no such index, it can't be read, columns or files are missing, or no object has enough images.
    """
    layout = LAYOUTS[kind]
    index = _index(layout, root, field)
    rows = read_table(index, field)
    columns = list(rows[0]) if rows else []
    if lacking := [name for name in (layout.path, layout.object, layout.region) if name not in columns]:
        problem = f"it lacks the column '{lacking[0]}'; it has {', '.join(map(str, columns)) or 'none'}"
        wanted = f"{layout.path}, {layout.object} and {layout.region}"
        raise RequestError(field, index, problem, f"Give {layout.title}'s own index, whose columns include {wanted}.")
    found: list[tuple[str, str, Path]] = []  # object, region, file
    dead: list[str] = []
    for number, row in enumerate(rows, 2):
        path, objects, region = ((row[name] or "").strip() for name in (layout.path, layout.object, layout.region))
        if not path or not objects or not region:
            problem = f"line {number} lacks its path, its object or its region"
            raise RequestError(field, index, problem, "Complete it, or remove the line.")
        places = [index.parent / folder / path for folder in ("", *layout.folders)]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            dead.append(path)
        else:
            found += [(name, layout.regions.get(region, region), file) for name in _objects(objects)]
    if dead:
        problem = f"it names images that are missing: {len(dead)} of {len(rows)}, first '{dead[0]}'"
        remedy = f"Unpack {layout.title}'s images beside it, or remove these lines from the index."
        raise RequestError(field, index, problem, remedy)
    if each is not None:
        found = _balanced(found, each, index, layout, field)
    return _listed(found)


def _index(layout: Layout, root: Path, field: str) -> Path:
    if not root.is_dir():
        raise RequestError(field, root, "there is no such folder", "Check the path.")
    for folder in ("", *layout.folders):
        for name in layout.indexes:
            if (root / folder / name).is_file():
                return root / folder / name
    names = " or ".join(layout.indexes)
    raise RequestError(field, root, f"it holds no {names}", f"Give the folder that contains {layout.title}'s {names}.")


def _objects(text: str) -> list[str]:
    """`hand_soap`, or a list of topics as DollarStreet writes them, ['Hand soap', 'Sinks']: in words, in small letters."""
    names: object = text
    if text.startswith("["):
        with suppress(ValueError, SyntaxError):
            names = ast.literal_eval(text)
    listed = names if isinstance(names, list) else [names]
    return list(dict.fromkeys(" ".join(str(name).lower().replace("_", " ").split()) for name in listed))


def _balanced(
    found: Sequence[tuple[str, str, Path]], each: int, index: Path, layout: Layout, field: str
) -> list[tuple[str, str, Path]]:
    cells: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    regions = sorted({region for _, region, _ in found})
    for name, region, file in found:
        cells[name][region].append(file)
    enough = [name for name in cells if all(len(cells[name][region]) >= each for region in regions)]
    if not enough:
        most = max(min(len(cells[name][region]) for region in regions) for name in cells)
        problem = (
            f"no object of {layout.title} has {counted(each, 'image')} in each of {len(regions)} regions; the most is {most}"
        )
        remedy = f"Ask for fewer, @{most}." if most else "Leave @ out to take all images."
        raise RequestError(field, index, problem, remedy)

    def drawn(name: str, region: str) -> list[Path]:
        def draw(file: Path) -> str:
            return hashlib.sha256(f"{name}/{region}/{file.name}".encode("utf-8", "surrogateescape")).hexdigest()

        return sorted(cells[name][region], key=draw)[:each]

    return [(name, region, file) for name in enough for region in regions for file in drawn(name, region)]


def _listed(found: Sequence[tuple[str, str, Path]]) -> Listed:
    prompts = [f"{name} in {region}" for name, region, _ in found]
    labels = [prompt.replace("/", "_") for prompt in prompts]  # a class is a folder's name too
    classes = sorted(set(labels), key=natural_order)
    place = {name: number for number, name in enumerate(classes)}
    order = sorted(range(len(found)), key=lambda at: (place[labels[at]], natural_order(str(found[at][2]))))
    files = [found[at][2] for at in order]

    def content(at: int) -> bytes:
        with open_file(files[at]) as stream:
            return stream.read()

    return Listed(
        [str(file) for file in files],
        [labels[at] for at in order],
        classes,
        content,
        columns={"object": [found[at][0] for at in order], REGION: [found[at][1] for at in order]},
        prompts={labels[at]: prompts[at] for at in order},
    )
