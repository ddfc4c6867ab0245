"""Messages name only options and commands that exist: a remedy has to work when it is followed."""

import ast
import re
from pathlib import Path

import typer

import handful
from handful.cli import app

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
