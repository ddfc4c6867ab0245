"""Messages name only options and commands that exist: a remedy has to work when it is followed."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import typer

import handful
from handful.cli import app
from handful.errors import counted

OTHERS = {"--head", "--upgrade"}  # of ray start and of pip


def texts(file: Path) -> list[tuple[int, str]]:
    """Every text of a file, its line first; values put into it stand as {}."""
    found, parts = [], set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            found.append((node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append((node.lineno, node.value))
    return found


def test_options_and_commands_named_in_messages_exist():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {"--help", *(text for each in command.params for text in (*each.opts, *each.secondary_opts))}
        for name, command in commands.items()
    }
    known = set().union(*options.values(), OTHERS, {"--version"})
    wrong, seen = [], 0
    for file in Path(handful.__file__).parent.rglob("*.py"):
        for line, text in texts(file):
            named = re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)
            asked = re.findall(r"\bhandful ([a-z]+)((?: [^\n:;.,()]*)?)", text)
            seen += len(named) + len(asked)
            wrong += [f"{file.name}:{line}: {option}" for option in named if option not in known]
            for command, rest in asked:
                if command in commands:
                    of = re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", rest)
                    wrong += [f"{file.name}:{line}: {command} {option}" for option in of if option not in options[command]]
    assert wrong == []
    assert seen > 300, "the messages are no longer found"


NOUNS = "image|class|exemplar|file|run|cohort|set|step|seed|row|label|folder|feature|target|channel|neighbour|candidate|process"
COUNTED = re.compile(rf" (?:(?:more|real|generated|new|better|other) )*(?:{NOUNS})(?:s|es)\b")
# Texts ("the real images"), what is always more than one, and rates, which are hardly ever whole numbers.
NOT_ONE = {"role", "extractor.name", "channels", "told.channels", "2 * FEWEST", "GROUPS", "len(mix)", "size", "k", "n", "count"}
NOT_ONE |= {"theirs.images", "takes", "first[1]", "unet['in_channels']", "len(first.rows)", "len(real.contents)"}
NOT_ONE |= {"summary.images_per_second", "self.rate"}


def test_a_number_and_its_noun_agree():
    """`1 images` is read twice: `errors.counted` puts a number before its noun."""
    wrong, seen = [], 0
    for file in Path(handful.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for value, after in pairwise(node.values) if isinstance(node, ast.JoinedStr) else ():
                if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                    number = ast.unparse(value.value)
                    seen += number.startswith("counted(")
                    if COUNTED.match(str(after.value)) and number not in NOT_ONE:
                        wrong.append(f"{file.name}:{value.lineno}: {{{number}}}{after.value}")
    assert wrong == []
    assert (counted(1, "class"), counted(2, "copy"), counted(1200, "more class")) == (
        "1 class",
        "2 copies",
        "1,200 more classes",
    )
    assert seen > 60
