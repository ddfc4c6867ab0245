"""Real photographs, real domains: what evaluate, groups, the audit, copies and utility say of PACS, domain against domain.

    python benchmarks/pacs.py --out /tmp/pacs            (minutes on two cores; a second time it goes on from what is kept)

PACS (Li et al., ICCV 2017, arXiv 1710.03077) has seven classes in four domains: photo, art painting, cartoon, sketch. Each
domain is cut into two halves: one stands for generated images, the other for real ones, so the diagonal of the table is the
ceiling. The judge is EfficientNet-lite0 (the extra `photos`) at the images' own 96 pixels. No image of PACS is in this
repository: no licence of it is stated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from handful.judge.evaluate import evaluate
from handful.judge.worth import worth

DATA = Path(__file__).parents[2] / "shared/data/pacs/pacs96.parquet"
DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
JUDGE = "efficientnet-lite0@96"


def halves(data: Path, out: Path, images: int) -> None:
    """Writes out/made/DOMAIN/CLASS and out/real/DOMAIN/CLASS, at most `images` in each, and out/few/DOMAIN/CLASS, eight."""
    table, counts = pq.read_table(data, use_threads=False), defaultdict(int)
    for row in table.to_pylist():
        domain, name = row["domain"], CLASSES[row["label"]]
        number = counts[domain, name]
        counts[domain, name] += 1
        half, place = ("made", "real")[number % 2], number // 2
        if place >= min(images, 40):  # of every class and domain as many: houses in sketch are 80
            continue
        for kind in (half, "few") if half == "made" and place < 8 else (half,):
            file = out / kind / domain / name / f"{place:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["image"]["bytes"])


def in_one(out: Path, name: str, of: dict[str, str]) -> Path:
    """A set of all domains, its classes called "CLASS in DOMAIN"; `of` says whose images stand for a domain."""
    half, root = name.partition("-")[0], out / "together" / name
    for domain in DOMAINS:
        for label in CLASSES:
            target = root / f"{label} in {domain}"
            if not target.is_dir():
                shutil.copytree(out / half / of.get(domain, domain) / label, target)
    return root


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def pairs(out: Path, asked: dict[str, Any]) -> list[str]:
    """Every domain as generated images against every domain as real ones, with the audit."""
    lines = [
        "| stands for generated | real | precision | coverage | F1 | Frechet | robust coverage |",
        "|---|---|---|---|---|---|---|",
    ]
    for made in DOMAINS:
        for real in DOMAINS:
            found = evaluate(out / "made" / made, out / "real" / real, JUDGE, ceiling=False, **asked)
            row = found.row()
            shown = [row["precision"], row["coverage"], row["f1"], row["frechet"], found.robust("coverage")]
            lines.append(f"| {made} | {real} | {' | '.join(map(cell, shown))} |")
    return lines


def by_groups(out: Path, asked: dict[str, Any]) -> list[str]:
    """All domains together, groups by domain: as they are, and with sketches in the place of cartoons."""
    lines = ["| generated | group | precision | coverage | 90 % interval | Frechet |", "|---|---|---|---|---|---|"]
    real = in_one(out, "real", {})
    for title, name, of in (("all honest", "made", {}), ("cartoons are sketches", "made-bad", {"cartoon": "sketch"})):
        found = evaluate(in_one(out, name, of), real, JUDGE, audit=False, ceiling=False, groups=".* in (.*)", **asked).groups
        assert found is not None
        for group, scores in found.per_group.items():
            low, high = found.intervals[group]["coverage"]
            shown = [cell(scores.precision), cell(scores.coverage), f"{low:.3f} to {high:.3f}", cell(scores.values["frechet"])]
            lines.append(f"| {title} | {group} | {' | '.join(shown)} |")
        worst = ", ".join(f"{metric}: {group}" for metric, group in found.worst.items() if metric in ("coverage", "frechet"))
        lines.append(
            f"| {title} | **worst** ({worst}) | | gap {found.gap['coverage']:.3f} | | gap {found.gap['frechet']:.3f} |"
        )
    return lines


def copies(out: Path, asked: dict[str, Any]) -> list[str]:
    """The exemplars are eight photographs of each class: how much of a set is a copy of them."""
    lines = ["| set | copied |", "|---|---|"]
    for title, made in (("photographs, the eight among them", "photo"), ("art paintings", "art_painting")):
        found = evaluate(
            out / "made" / made,
            out / "real" / "photo",
            JUDGE,
            audit=False,
            ceiling=False,
            exemplars=out / "few" / "photo",
            **asked,
        )
        lines.append(f"| {title} | {cell(found.row()['copied'])} |")
    return lines


def trained(out: Path, seeds: int, steps: int) -> list[str]:
    """Eight photographs of each class, and each domain's half beside them: tested on all four."""
    found = worth(
        out / "made" / "photo",
        exemplars=out / "few" / "photo",
        test=out / "real" / "photo",
        ood={domain: out / "real" / domain for domain in DOMAINS[1:]},
        baselines={domain: out / "made" / domain for domain in DOMAINS[1:]},
        features=JUDGE,
        seeds=seeds,
        steps=steps,
    )
    lines = [f"| trained on | images | {' | '.join(DOMAINS)} |", "|---|---|" + "---|" * len(DOMAINS)]
    for row in found.rows:
        name = row.name.replace("synthetic", "photo").replace("exemplars", "few photographs")
        shown = [f"{tested.mean:.3f} ± {tested.spread or 0:.3f}" for tested in row.tests.values()]
        lines.append(f"| {name} | {row.images} | {' | '.join(shown)} |")
    return [
        f"{found.network}; {found.seeds} of each, {found.steps} steps; {found.augmentation}.",
        "",
        *lines,
        "",
        found.sentence,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for images, features and the tables")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--images", type=int, default=20, help="of each class and half, 40 at most")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # ImageNet's classes are not these seven: no accuracy, once a pair
    halves(asked.data, asked.out, asked.images)
    options = {"cache": asked.out / "cache", "neighbours": min(5, asked.images - 1)}
    parts = {
        "Which domain covers which": lambda: pairs(asked.out, options),
        "By group": lambda: by_groups(asked.out, options),
        "Copies": lambda: copies(asked.out, options),
        "Utility": lambda: trained(asked.out, asked.seeds, asked.steps),
    }
    seconds = {}
    text = []
    for title, make in parts.items():
        began = time.monotonic()
        text += [f"### {title}", "", *make(), ""]
        seconds[title] = round(time.monotonic() - began)
        print(f"{title}: {seconds[title]} s", flush=True)
    (asked.out / "tables.md").write_text("\n".join(text), encoding="utf-8")
    (asked.out / "seconds.json").write_text(json.dumps(seconds))
    print("\n".join(text))


if __name__ == "__main__":
    main()
