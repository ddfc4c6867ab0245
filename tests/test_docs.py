"""README and docs: short, linked, every command one that the tool takes, and README and quickstart run as they are written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from handful import cli, console
from handful.data.images import write_png
from handful.zoo.digits import load_digits_split

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def commands(page: Path) -> list[str]:
    """The commands of `handful` in indented blocks or a recipe's comments, joined; comments and redirections dropped."""
    text = page.read_text() if page.suffix == ".md" else re.sub(r"^# ?", "  ", page.read_text(), flags=re.M)
    text = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.startswith("    handful ")]
    return [re.sub(r"\s+(#|>|&&).*", "", line) for line in found]


def blocks(page: Path) -> list[str]:
    """The Python blocks."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def words_of(command: str) -> list[str]:
    return shlex.split(command)[1:]


def test_the_readme_is_short_and_begins_with_what_it_is():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert lines[2].startswith("Turn a handful of real images into a training set")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_tool_takes(page: Path):
    group: Any = typer.main.get_command(cli.app)
    assert page.suffix == ".md" or commands(page), "a recipe says how it is run"
    for command in commands(page):
        name, *words = words_of(command)
        if name == "COMMAND":
            continue
        known = group.commands.get(name)
        assert known is not None, command
        known.make_context(name, words)  # raises where an option is unknown or a value of the wrong type


def test_the_site_leads_to_every_page():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml may hold tags of its own."""

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def files(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [file for each in (part.values() if isinstance(part, dict) else part) for file in files(each)]

    assert sorted(files(nav)) == sorted(page.name for page in PAGES[1:])


def test_pictures_of_the_docs_are_small():
    large = [file.name for file in (ROOT / "docs" / "images").glob("*.png") if file.stat().st_size > 200_000]
    assert not large


def digits(root: Path, per_class: int) -> None:
    split = load_digits_split()
    for label in range(10):
        (root / str(label)).mkdir(parents=True)
        for place, image in enumerate(split.train_images[split.train_labels == label][:per_class]):
            write_png(root / str(label) / f"{place:03d}.png", image)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = console.answer(cli.app, words_of(command))
    shown = capsys.readouterr()
    assert code == 0, f"{command}\n{shown.err}"
    return shown.out


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quickstart.md"
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), {})
    told = ""
    for command in commands(page):
        few = " --steps 10" if " utility " in command else ""
        if "my-unet" not in command:  # a model of the reader's own
            told += run(command + few, capsys)
    assert (tmp_path / "out" / "report.html").is_file()
    assert "gain over plain" in told
    assert "of the test images" in told


def test_the_readme_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """MODEL and JUDGE are the reader's own: here the packaged ones, which the page names."""
    monkeypatch.chdir(tmp_path)
    digits(tmp_path / "photos", 20)
    page = ROOT / "README.md"
    for command in commands(page):
        few = " --per-class 8 --steps 4" if " generate " in command else ""
        run(command.replace("MODEL", "digits").replace("JUDGE", "digits-judge") + few, capsys)
    assert (tmp_path / "out" / "report.html").is_file()
    for block in blocks(page):
        found: dict[str, Any] = {}
        exec(compile(block, str(page), "exec"), found)
        assert found["images"].shape == (16, 1, 8, 8)


def test_the_python_page_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """But for its last block, which needs a pipeline of the reader's own."""
    monkeypatch.chdir(tmp_path)
    digits(tmp_path / "photos", 12)
    digits(tmp_path / "photos-held-out", 12)
    run("handful generate --model digits --exemplars photos --k 4 --per-class 8 --steps 4 --out out", capsys)
    page = ROOT / "docs" / "python.md"
    for block in blocks(page)[:-1]:
        exec(compile(block, str(page), "exec"), {})
    assert (tmp_path / "out-python" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_the_notebook_runs_and_holds_no_outputs(tmp_path: Path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
    for cell in notebook.cells:  # less of each
        cell.source = cell.source.replace('"per_class": 32', '"per_class": 8').replace("steps=50", "steps=10")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})]
    assert len(shown) == 3  # exemplars, the run, the utility
    assert (tmp_path / "out" / "report.html").is_file()
