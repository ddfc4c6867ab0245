"""Whether two trees generate the same images: every digits and cifar10 recipe, small, by a commit and by this checkout.

    python tools/same_bytes.py COMMIT [--recipes digits-chamfer digits-cfg]

Compares the SHA-256 of all images, from the manifests. Exit code 1 where they differ. The recipes are those of the commit, so
that this checkout must read them too. CIFAR-10's exemplars are what the packaged model draws, since no image of it is in the
package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
# One process a tree, since imports cost more than such small runs.
WORK = """
import json, sys
from handful import cli, console
for arguments in json.load(sys.stdin):
    code = console.answer(cli.app, arguments)
    print(arguments[1], "exit code", code)
"""


def hashes(out: Path) -> dict[str, str]:
    """The images of a run: by file, its SHA-256."""
    rows = pq.ParquetFile(out / "manifest.parquet").read(use_threads=False).to_pylist()
    return {row["file"]: row["sha256"] for row in rows}


def generate(tree: Path, jobs: list[list[str]]) -> None:
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WORK], input=json.dumps(jobs), text=True, env=environment, check=True, cwd=tree)


def main() -> int:
    """Compares, and prints a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--recipes", nargs="*", help="names without .yaml; all of digits and cifar10 if left out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, old = Path(folder), Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", old, asked.commit], check=True)
        try:
            names = asked.recipes or sorted(
                p.stem for kind in ("digits", "cifar10") for p in old.glob(f"recipes/{kind}-*.yaml")
            )
            exemplars = exemplars_of(work)
            for tree, where in ((old, "before"), (ROOT, "now")):
                generate(tree, [small(old / f"recipes/{name}.yaml", work / where / name, exemplars) for name in names])
            same = [report(name, hashes(work / "before" / name), hashes(work / "now" / name)) for name in names]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    return 0 if all(same) else 1


def exemplars_of(work: Path) -> dict[str, Path]:
    """Two folders of exemplars that both trees read: real digits, and colour images that the packaged model draws."""
    from handful.data.images import write_png
    from handful.zoo.digits import load_digits_split

    digits, colour = work / "digits", work / "colour"
    split = load_digits_split()
    for name in "14":
        (digits / name).mkdir(parents=True)
        for place, image in enumerate(split.train_images[split.train_labels == int(name)][:32]):
            write_png(digits / name / f"{place:02d}.png", image)
    drawn = work / "drawn"
    generate(ROOT, [["generate", "--model", "cifar10", "--guidance", "none", "--classes", "ship,truck", "--per-class", "32",
                     "--cohort", "32", "--steps", "4", "--out", str(drawn), "--quiet"]])  # fmt: skip
    (drawn / "images").rename(colour)
    (colour / "metadata.jsonl").unlink()
    return {"digits": digits, "cifar10": colour}


def small(recipe: Path, out: Path, exemplars: dict[str, Path]) -> list[str]:
    kind = recipe.stem.partition("-")[0]
    guided = ["--exemplars", str(exemplars[kind])] if "exemplars:" in recipe.read_text() else []
    classes = "1,4" if kind == "digits" else "ship,truck"
    counts = ["--per-class", "6", "--cohort", "4", "--steps", "6", "--classes", classes]
    return ["generate", str(recipe), "--model", kind, "--out", str(out), *guided, *counts, "--quiet"]


def report(name: str, before: dict[str, str], now: dict[str, str]) -> bool:
    equal = before == now and bool(now)
    print(f"{name:28} {len(now)} images, {'the same' if equal else 'DIFFERENT'}")
    return equal


if __name__ == "__main__":
    sys.exit(main())
