"""The pictures of a report: exemplars, each run's images of the same noise beside each other, and the nearest to exemplars.

Round after round one more image of each class, so that where not all find room every class shows as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handful.data.exemplars import drawn_files
from handful.data.images import image_folder
from handful.errors import RequestError, counted
from handful.report.gather import Shown
from handful.report.thumbnails import Pictures, fitting_side
from handful.runs.metadata import exemplars_of

ROOM = 9_000_000  # characters of all pictures together: the page stays below 12 MB
COLUMNS = 16  # images of a class and run at most
COPIES = 48  # images nearest to an exemplar
_EXEMPLARS = 8  # of a class


def gallery(runs: Sequence[Shown], room: int = ROOM) -> dict[str, Any]:
    """What the page's script shows.

    Args:
        runs: The first is the report's; the others stand beside it.

    Returns:
        Plain data: `classes`, `runs` (name, whether its noise is the first one's), `pictures` (data URIs), `exemplars` (by
        class: name and picture), `images` (class, run, index, picture, file, nearest exemplar, distance, its picture, whether
        it counts as a copy), `strips` (places among the images, by class and run), `copies` (places, those that count as
        copies first, then the nearest), and `notes` on what was left out. A picture is a place
        among the pictures, or -1.
    """
    first = runs[0]
    by_place = [_by_class(run) for run in runs]
    exemplars = _exemplars(first)
    sample = [row["file"] for row in first.rows[:: max(1, len(first.rows) // 8)][:8]]
    wanted = len(first.classes) * (len(runs) + bool(exemplars)) + 2 * COPIES
    pictures = Pictures(room, fitting_side(first.path, sample, wanted, room))
    images: list[list[Any]] = []
    flagged = set((first.found or {}).get("copies") or ())
    shown: dict[tuple[int, str], int] = {}
    places = {name: place for place, name in enumerate(first.classes)}

    def add(run: int, row: dict[str, Any]) -> bool:
        if (run, row["file"]) in shown:
            return True
        picture = pictures.add(runs[run].path, row["file"])
        if picture < 0:
            return False
        nearest, folder = row.get("nearest_exemplar"), runs[run].exemplars
        near = pictures.add(folder, nearest) if nearest and folder else -1
        distance = row.get("nearest_exemplar_distance")
        shown[run, row["file"]] = len(images)
        is_copy = run == 0 and row["file"] in flagged
        images.append([places.get(row["class"], -1), run, row["index"], picture, row["file"], nearest, distance, near, is_copy])
        return True

    measured = [row for row in first.rows if row.get("nearest_exemplar_distance") is not None]
    nearest = sorted(measured, key=lambda row: (row["file"] not in flagged, row["nearest_exemplar_distance"]))[:COPIES]
    copies = [shown[0, row["file"]] for row in nearest if add(0, row)]
    strips: list[list[list[int]]] = [[[] for _ in runs] for _ in first.classes]
    shown_exemplars: dict[str, list[list[Any]]] = {name: [] for name in first.classes}
    for column in range(COLUMNS):
        for name in first.classes:
            files = exemplars.get(name, [])
            if (
                column < min(len(files), _EXEMPLARS)
                and (picture := pictures.add(files[column].parent, files[column].name)) >= 0
            ):
                shown_exemplars[name].append([files[column].name, picture])
            for run, of_class in enumerate(by_place):
                rows = of_class.get(name, [])
                if column < len(rows) and add(run, rows[column]):
                    strips[places[name]][run].append(shown[run, rows[column]["file"]])
    return {
        "classes": first.classes,
        "runs": [[run.name, _same_noise(first, run)] for run in runs],
        "pictures": pictures.uris,
        "pixelated": bool(pictures.uris) and pictures.uris[0].startswith("data:image/png"),  # small ones, as they are
        "exemplars": [shown_exemplars[name] for name in first.classes],
        "images": images,
        "strips": strips,
        "copies": copies,
        "notes": _notes(first, images, pictures, runs),
    }


def _by_class(run: Shown) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in run.rows:
        rows.setdefault(row["class"], []).append(row)
    return rows


def _exemplars(run: Shown) -> dict[str, list[Path]]:
    """By class the files that guided, in the order of the draw."""
    if run.exemplars is None:
        return {}
    drawn = exemplars_of(run.path)
    try:
        files = image_folder(run.exemplars, field="exemplars")
    except RequestError as error:
        run.notes.append(f"The exemplars are not shown: {error}")
        return {}
    return drawn_files(files, drawn.k if drawn else None, drawn.seed if drawn else 0)


def _same_noise(first: Shown, other: Shown) -> bool:
    """Whether images of the same class and number began with the same noise."""
    seeds = {(row["class"], row["index"]): row["seed"] for row in first.rows[:2000]}
    pairs = [(seeds[key], row["seed"]) for row in other.rows[:2000] if (key := (row["class"], row["index"])) in seeds]
    same_model = first.provenance.get("model_sha256") == other.provenance.get("model_sha256")
    return same_model and bool(pairs) and all(one == two for one, two in pairs)


def _notes(first: Shown, images: Sequence[Sequence[Any]], pictures: Pictures, runs: Sequence[Shown]) -> list[str]:
    notes = []
    own = sum(1 for image in images if image[1] == 0)
    if own < len(first.rows):
        notes.append(
            f"{own:,} of {len(first.rows):,} images are shown: the first ones of each class and the {COPIES} nearest to an "
            "exemplar. The others are in the run directory."
        )
    if pictures.left_out:
        notes.append("No more pictures are shown, to keep the page small.")
    if pictures.unreadable:
        notes.append(f"Missing or damaged: {counted(pictures.unreadable, 'image file')}; handful verify names them.")
    missing = {image[0] for image in images if image[1] == 0}
    without = len(first.classes) - len(missing)
    if without:
        notes.append(f"Without pictures here: {without:,} of {counted(len(first.classes), 'class')}.")
    more = [name for run in runs[1:] for name in run.classes if name not in set(first.classes)]
    if more:
        notes.append(f"Classes that only other runs have are left out: {', '.join(list(dict.fromkeys(more))[:5])}.")
    return notes
