"""The house is as docs/architecture.md draws it: few rooms, imports that only point downwards, names that are found once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "handful"
ROOMS = re.findall(
    r"^([a-z]+) ", (ROOT / "docs" / "architecture.md").read_text().split("## The house")[1].split("```")[1], re.M
)


def imports(file: Path) -> Iterator[str]:
    """The modules of handful that a file imports, inside functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("handful."):
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)  # a name may be a module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("handful."))


def test_every_room_is_in_the_picture_and_there_are_at_most_24_entries() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 24
    assert {name.removesuffix(".py") for name in entries} - {"__init__", "py.typed"} == set(ROOMS)


def test_no_import_points_upwards() -> None:
    rank = {room: place for place, room in enumerate(ROOMS)}
    upwards = [
        f"{file.relative_to(SOURCE)} -> {module}"
        for file in sorted(SOURCE.rglob("*.py"))
        if (room := file.relative_to(SOURCE).parts[0].removesuffix(".py")) in rank
        for module in imports(file)
        if rank[module.split(".")[1]] < rank[room]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other() -> None:
    """Inside a room too, and inside functions and for types too; what a package's `__init__` gathers does not count."""
    files = {file: ".".join(("handful", *file.relative_to(SOURCE).with_suffix("").parts)) for file in SOURCE.rglob("*.py")}
    names = {name: file for file, name in files.items() if file.stem != "__init__"}
    edges = {name: [module for module in imports(file) if module in names] for name, file in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for module in edges[name]:
                visit(module, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert sum(map(len, edges.values())) > 500, "the imports are no longer found"


def test_requests_of_methods_are_asked_by_what_they_declare() -> None:
    asked = [
        f"{file.relative_to(SOURCE)}: {line.strip()}"
        for file in sorted(SOURCE.rglob("*.py"))
        if file.relative_to(SOURCE).parts[0] not in ("guidance", "recipe")
        for line in file.read_text().splitlines()
        if re.search(r"isinstance\([^)]*Request\b", line)
    ]
    assert not asked, "\n".join(asked)


def test_a_name_of_a_module_is_found_once() -> None:
    """But where the folder makes it plain: a method and the metric of the same formula, a demo of a packaged model."""
    counts = Counter(file.stem for file in SOURCE.rglob("*.py") if file.parent.name != "commands" and file.stem != "__init__")
    plain = {"digits", "cifar10", "mnist", "vendi"}
    assert {name for name, count in counts.items() if count > 1} <= plain


def test_the_formatter_is_not_fought() -> None:
    skipped = sum(file.read_text().count("# fmt: " + "skip") for file in (ROOT / "src").rglob("*.py"))
    assert skipped <= 40
