"""Recipes as YAML files, and the command line's options, which override them.

Relative paths in a recipe are relative to the recipe's own file, so that a folder with a recipe and its exemplars can be
moved; those given on the command line are relative to the working directory, as everywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from handful.data.sources import absolute_source
from handful.errors import RequestError, did_you_mean
from handful.guidance import METHODS, request_of
from handful.guidance.method import EXTRACTOR, FILE
from handful.recipe.prompting import read_labels
from handful.recipe.schema import Recipe, classes_counted, recipe_from
from handful.zoo import EXEMPLARS, ZOO

PROVENANCE = "provenance"  # what a run directory's recipe.yaml says beyond the request; not part of a request


_TEXTS = ("model.template", "model.class_pattern", "model.negative_prompt")


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice (YAML itself takes the last without a word)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 4e-1 as a text; everyone means a number.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_yaml(text: str, field: str, name: object) -> Any:
    """Reads YAML safely.

    Raises:
        RequestError: It is no YAML, or gives a key twice; with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(field, name, f"{problem}{where}", "Correct that line.") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a recipe's YAML as plain data, unchecked; its relative paths become absolute, a run's provenance is dropped.

    Raises:
        RequestError: The file is missing or no mapping.
    """
    path = Path(path).expanduser()
    remedy = "Give a recipe's YAML file, or describe the run by options (handful generate --help)."
    data = plain_mapping(path, "recipe", remedy, "Begin with `model:` and its `name:`.")
    return anchored(data, path.absolute().parent)


def plain_mapping(path: Path, field: str, remedy: str, begin: str) -> dict[str, Any]:
    """Reads a mapping from a YAML file; a run's provenance is dropped.

    Args:
        remedy: Where it can't be read.
        begin: The remedy where it is no mapping.

    Raises:
        RequestError: The file is missing, unreadable or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(field, path, "there is no such file", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(field, path, f"it can't be read ({error})", remedy) from None
    data = parse_yaml(text, field, path)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RequestError(field, path, "it is not a mapping of keys to values", begin)
    data.pop(PROVENANCE, None)
    return data


def read_recipe(path: str | Path) -> Recipe:
    """Reads and checks a recipe's YAML file; a run directory's recipe.yaml too.

    Raises:
        RequestError: As `read_mapping` and `recipe_from`.
    """
    return recipe_from(read_mapping(path))


def recipe_yaml(recipe: Recipe, provenance: Mapping[str, Any] | None = None) -> str:
    """The recipe as YAML, always the same text for the same recipe."""
    data: dict[str, Any] = recipe.as_dict()
    if provenance is not None:
        data[PROVENANCE] = dict(provenance)
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def anchored(data: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Makes the paths of unchecked recipe data absolute: those that are relative are relative to base."""
    data = deepcopy(dict(data))
    model, exemplars = data.get("model"), data.get("exemplars")
    if isinstance(model, dict) and isinstance(model.get("name"), str) and model["name"] not in ZOO:
        path, colon, function = model["name"].rpartition(":")  # FILE.py:FUNCTION
        if path.endswith(".py"):
            model["name"] = _absolute(path, base) + colon + function
        else:
            model["name"] = _absolute(model["name"], base, only_existing=True)
    for one in model.get("lora") or () if isinstance(model, dict) else ():
        if isinstance(one, dict) and isinstance(one.get("path"), str):
            one["path"] = _absolute(one["path"], base)
    if isinstance(model, dict) and isinstance(words := model.get("embeddings"), dict):
        model["embeddings"] = {word: _absolute(file, base) for word, file in words.items() if isinstance(file, str)}
    if isinstance(model, dict) and isinstance(model.get("labels"), str):  # a file: what it says is the recipe's
        model["labels"] = read_labels(Path(_absolute(model["labels"], base)))
    for key in ("config", "preview_decoder", "vae", "scheduler"):
        if isinstance(model, dict) and isinstance(model.get(key), str):
            model[key] = _absolute(model[key], base, only_existing=True)
    if isinstance(exemplars, dict) and isinstance(exemplars.get("path"), str) and exemplars["path"]:
        path = exemplars["path"]
        exemplars["path"] = _absolute(path, base, True) if path in EXEMPLARS else absolute_source(path, base)
    mix = data.get("mix")
    settings = [data, *(each for each in (mix if isinstance(mix, list) else []) if isinstance(each, dict))]
    for term in [term for each in settings for term in each.get("guidance") or () if isinstance(each["guidance"], list)]:
        for key, field in _fields(term).items():
            if isinstance(term.get(key), str) and EXTRACTOR in field.metadata:
                term[key] = anchored_extractor(term[key], base)
            elif isinstance(term.get(key), str) and FILE in field.metadata:
                term[key] = _absolute(term[key], base)
    return data


def _fields(term: object) -> Mapping[str, FieldInfo]:
    """The fields of an unchecked term; none of what is no term."""
    method = term.get("method") if isinstance(term, dict) else None
    return request_of(method).model_fields if method in METHODS else {}


def anchored_extractor(name: str, base: Path) -> str:
    """An extractor's name with its path, if it has one, made absolute: FILE.py:FUNCTION, a folder, NAME@SIDE."""
    path, colon, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _absolute(path, base) + colon + attribute
    # a known name or the hub's, unless there is such a folder; NAME@SIDE is fed another size
    plain, at, side = name.rpartition("@")
    plain, suffix = (plain, at + side) if plain and side.isdecimal() else (name, "")
    return _absolute(plain, base, only_existing=True) + suffix


def _absolute(text: str, base: Path, only_existing: bool = False) -> str:
    path = os.path.abspath(base / Path(text).expanduser())
    is_path = text.startswith((".", "/", "~"))
    return text if not text or (only_existing and not is_path and not os.path.exists(path)) else path


def overridden(
    data: Mapping[str, Any],
    flags: Mapping[str, Any],
    *,
    guidance: Sequence[str] | None = None,
    scale: float | None = None,
    features: str | None = None,
    classifier: str | None = None,
    embeddings: str | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Overrides unchecked recipe data by the command line's options.

    Args:
        flags: Dotted field -> value; None leaves the field alone. Paths are relative to the working directory.
        guidance: Methods that replace the recipe's terms; a method that the recipe has keeps its settings there.
            ["none"] means no guidance.
        scale, features, classifier, embeddings: Of the one term they can mean.
        settings: `dotted.key=value` texts, the value in YAML; `guidance.0.scale` or `guidance.chamfer.scale` reach a term.

    Raises:
        RequestError: A setting is malformed, or does not say which term it means.
    """
    result = deepcopy(dict(data))
    for field, value in flags.items():
        if value is not None:
            _put(result, field.split("."), value, field)
    if guidance:
        result["guidance"] = _terms(result.get("guidance"), guidance)
    for name, value in (("scale", scale), ("features", features), ("classifier", classifier), ("embeddings", embeddings)):
        if value is not None:
            _term_for(result, name, value)[name] = value
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise RequestError(
                "--set", setting, "this is not of the form KEY=VALUE", "Write for instance --set sampler.steps=20."
            )
        _put(result, key.split("."), _setting(key, text, setting), setting)
    return anchored(result, Path.cwd())


def _setting(key: str, text: str, setting: str) -> Any:
    """The value of a setting; texts need no YAML quotes, though they may have them: "{region}--{object}" is one."""
    if key not in _TEXTS and not key.startswith("model.prompts."):
        return parse_yaml(text, "--set", setting)
    try:
        value = parse_yaml(text, "--set", setting)
    except RequestError:
        return text
    return value if isinstance(value, str | list) or text == "null" else text  # a list is no text: it is refused as such


def _terms(present: object, methods: Sequence[str]) -> list[dict[str, Any]]:
    if "none" in methods:
        if len(methods) > 1:
            problem = "none can't be combined with other methods"
            raise RequestError("--guidance", list(methods), problem, "Give either none or the other methods.")
        return []
    terms = [term for term in present if isinstance(term, dict)] if isinstance(present, list) else []
    had = {term.get("method"): term for term in terms}
    for method in methods:
        if method not in METHODS:
            remedy = did_you_mean(method, [*METHODS, "none"], "Methods")
            raise RequestError("--guidance", method, "there is no such guidance", remedy)
    return [had.get(method, {"method": method}) for method in methods]


def _term_for(data: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    """The one term that has a field of this name."""
    terms = data.get("guidance")
    if terms is None and isinstance(data.get("exemplars"), dict) and data["exemplars"].get("path"):
        terms = data["guidance"] = [{"method": "chamfer"}]  # what guidance becomes where there are exemplars
    terms = terms if isinstance(terms, list) else []
    fitting = [term for term in terms if name in _fields(term)]
    if len(fitting) != 1:
        problem = "there is no guidance that has this setting" if not fitting else "several guidance terms have this setting"
        raise RequestError(f"--{name}", value, problem, f"Say which term is meant: --set guidance.0.{name}={value}.")
    return fitting[0]


def _put(data: dict[str, Any], keys: list[str], value: object, setting: str) -> None:
    """Sets a nested value, making the mappings on the way; a list is entered by number, or by a term's method."""
    if keys == ["per_class"]:
        return _put_counts(data, value)
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            found = [
                i for i, item in enumerate(here) if str(i) == key or (isinstance(item, dict) and item.get("method") == key)
            ]
            if len(found) != 1:
                remedy = f"It has {len(here)}, counted from 0; add a term by --guidance {key}."
                raise RequestError("--set", setting, f"{'.'.join(keys[:depth])} has no item {key}", remedy)
            if last:
                here[found[0]] = value
            else:
                here = here[found[0]]
        elif isinstance(here, dict):
            if last:
                here[key] = value
            elif key == "guidance" and here.get(key) is None:
                here[key] = [{"method": keys[depth + 1] if keys[depth + 1] in METHODS else "chamfer"}]
                here = here[key]
            else:
                here[key] = here.get(key) if here.get(key) is not None else {}
                here = here[key]
        else:
            raise RequestError("--set", setting, f"{'.'.join(keys[:depth])} is a single value", "Leave out the keys after it.")


def _put_counts(data: dict[str, Any], value: object) -> None:
    """Images of each class: one number replaces all counts; a mapping only those of the classes that it names."""
    present = data.pop("counts", None) or {}
    if isinstance(data.get("per_class"), dict):
        present = data.pop("per_class")
    if isinstance(value, dict):
        data["counts"] = {**present, **value}
        data["classes"] = classes_counted(value, data.get("classes") or list(data["counts"]))
    else:
        data["per_class"] = value
