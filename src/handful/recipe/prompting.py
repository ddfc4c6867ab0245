"""Class names become prompts, by a template: "a photo of a {}", or "{object} in {region}" with the fields of a pattern."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from handful.errors import RequestError, first_line
from handful.recipe.schema import ModelRequest, did_you_mean


def prompt_for(prompts: str | Sequence[str], seed: int) -> str:
    """The prompt of an image: the class's only one, or one of several, drawn by the image's seed."""
    if isinstance(prompts, str):
        return prompts
    draw = hashlib.sha256(f"prompt {seed}".encode()).digest()  # not the seed itself, which the noise is drawn by
    return prompts[int.from_bytes(draw[:8], "big") % len(prompts)]


def all_prompts(prompts: Mapping[str, str | Sequence[str]]) -> list[str]:
    """Every prompt of every class, each once."""
    flat = [each for one in prompts.values() for each in ([one] if isinstance(one, str) else one)]
    return list(dict.fromkeys(flat))


def read_prompts(path: Path) -> dict[str, list[str]]:
    """Prompts by class from a file: CSV or JSONL with the columns class and prompt, or JSON {class: prompt or [prompts]}.

    Raises:
        RequestError: If it can't be read, or has not these columns.
    """
    prompts: dict[str, list[str]] = {}
    for name, prompt in _rows(path, "prompt", "--prompts"):
        prompts.setdefault(name, []).append(str(prompt))
    return prompts


def read_labels(path: Path) -> dict[str, int | str]:
    """Labels by class from a file: CSV or JSONL with the columns class and label, or JSON {class: label}.

    Raises:
        RequestError: If it can't be read, has not these columns, or names a class twice.
    """
    labels: dict[str, int | str] = {}
    for name, label in _rows(path, "label", "model.labels"):
        if labels.setdefault(name, label) != label:
            raise RequestError("model.labels", path, f"class {name!r} has two labels", "Give each class one.")
    return labels


def _rows(path: Path, column: str, field: str) -> list[tuple[str, str | int]]:
    """The classes of a file and what it says of each."""
    remedy = f"Write CSV or JSONL with the columns class and {column}, or JSON: {{class: {column}}}."
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            held = json.loads(text)
            rows = [(name, one) for name, given in held.items() for one in (given if isinstance(given, list) else [given])]
        else:
            lines = text.splitlines()
            jsonl = path.suffix.lower() == ".jsonl"
            found = [json.loads(line) for line in lines if line.strip()] if jsonl else list(csv.DictReader(lines))
            rows = [(row["class"], row[column]) for row in found]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        problem = f"it can't be read as {column}s ({type(error).__name__}: {first_line(error)})"
        raise RequestError(field, path, problem, remedy) from error
    for name, value in rows:
        right = (isinstance(value, str) and value.strip()) or (column == "label" and type(value) is int)
        if not isinstance(name, str) or not name or not right:
            raise RequestError(field, path, f"the {column} {value!r} of class {name!r} is not a {column}", remedy)
    if not rows:
        raise RequestError(field, path, f"it holds no {column}s", remedy)
    return rows


def prompts_of(classes: Iterable[str], asked: ModelRequest) -> dict[str, str | tuple[str, ...]]:
    """A prompt for each class, or several.

    In a class name underscores stand for spaces. A prompt in `asked.prompts` is taken unchanged; there may be more of them than
    is generated, as a run's recipe.yaml does where fewer classes are asked for.

    Raises:
        RequestError: If the template or the pattern can't be filled, or a prompt is for no class.
    """
    classes = list(classes)
    stray = [name for name in asked.prompts if name not in classes]
    if stray and not set(classes) <= set(asked.prompts):
        raise RequestError("model.prompts", stray[0], "there is no such class", did_you_mean(stray[0], classes, "Classes"))
    fields = _fields("model.template", asked.template)
    if not fields:
        problem = "it has no place for the class name"
        raise RequestError("model.template", asked.template, problem, 'Write {} where the name goes, as in "a photo of a {}".')
    pattern = None if asked.class_pattern is None else _pattern(asked.class_pattern)
    lacking = [] if pattern is None else [field for field in fields if field not in pattern.groupindex]
    if pattern is not None and lacking:
        problem = f"the class pattern has no field {{{lacking[0]}}}"
        raise RequestError("model.template", asked.template, problem, f"Its fields are: {', '.join(pattern.groupindex)}.")
    return {name: asked.prompts[name] if name in asked.prompts else _filled(asked, fields, pattern, name) for name in classes}


def _filled(asked: ModelRequest, fields: list[str], pattern: re.Pattern[str] | None, name: str) -> str:
    if pattern is None:
        if len(set(fields)) > 1:
            problem = f"it has {len(set(fields))} fields, and a class name such as '{name}' fills one"
            remedy = "Describe the class names with model.class_pattern, such as '{region}--{object}'."
            raise RequestError("model.template", asked.template, problem, remedy)
        values = dict.fromkeys(fields, name)
    else:
        match = pattern.fullmatch(name)
        if match is None:
            remedy = "Rename the class's folder, or give its prompt in model.prompts."
            raise RequestError("model.class_pattern", asked.class_pattern, f"the class '{name}' does not fit it", remedy)
        values = match.groupdict()
    return "".join(
        text + ("" if field is None else values[field].replace("_", " "))
        for text, field, _, _ in string.Formatter().parse(asked.template)
    )


def _fields(field: str, text: str) -> list[str]:
    """The names in braces; "" for bare ones. Formats and attributes are no part of this."""
    try:
        found = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise RequestError(field, text, f"it can't be read ({error})", "Write {{ for a literal brace.") from None
    if any(form or conversion or (name and not name.isidentifier()) for name, form, conversion in found):
        raise RequestError(field, text, "a field is a plain name in braces", "Write {} or {name}.")
    return [name for name, _, _ in found]


def _pattern(text: str) -> re.Pattern[str]:
    names = _fields("model.class_pattern", text)
    if not names or "" in names or len(set(names)) < len(names):
        raise RequestError(
            "model.class_pattern", text, "each field needs a name, and each name may occur once", "Write '{region}--{object}'."
        )
    parts = [
        re.escape(plain) + ("" if name is None else f"(?P<{name}>.+?)") for plain, name, _, _ in string.Formatter().parse(text)
    ]
    return re.compile("".join(parts))
