"""What every part of a request is: data that is checked in one place, whether it comes from Python or from a file.

An error is worded by us: the field's dotted name, its value, the problem and a remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from handful.errors import RequestError, did_you_mean
from handful.guidance import METHODS, request_of

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Part = TypeVar("Part", bound="Request")


class Request(BaseModel):
    """Part of a request. A misspelt key is refused, never ignored; no number is infinite or NaN.

    Values may be given in the order of the fields, too. A validator raises a `RequestError` that names the field.

    Raises:
        RequestError: If a value is out of its range, or values contradict each other.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    def __init__(self, *values: Any, **named: Any) -> None:
        try:
            super().__init__(**dict(zip(type(self).model_fields, values, strict=False)), **named)
        except ValidationError as error:
            raise refusal(error, type(self)) from None

    # pydantic calls a model's own __init__ for each part of a whole; a fault must reach the whole, which knows its place
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]


def checked(kind: type[Part], data: Mapping[str, Any], field: str) -> Part:
    """Makes a request of plain data, such as YAML gives. No type is guessed: `steps: "18"` is refused.

    Raises:
        RequestError: Naming the dotted field, its value and what to do; several errors are reported together.
    """
    try:
        # Through JSON: pydantic's strict mode then takes lists for tuples, and whole numbers for floats.
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise refusal(error, kind) from None
    except TypeError as error:  # a date, a set: YAML knows more types than a request does
        problem = f"it holds a value of a type that no field takes ({error})"
        raise RequestError(field, dict(data), problem, "Put quotes around dates and other special values.") from None


def refusal(error: ValidationError, whole: type[BaseModel]) -> RequestError:
    """pydantic's errors as one: the first, then the others."""
    faults = error.errors(include_url=False)
    inside = {each["loc"][:depth] for each in faults for depth in range(1, len(each["loc"]))}
    # pydantic counts the faultless parts of a list alone: one with a fault inside is not too short
    first, *others = [_said(each, whole) for each in faults if each["type"] != "too_short" or each["loc"] not in inside]
    also = "".join(f" Also {str(RequestError(*other[:3], '')).strip()}" for other in others[:5])
    more = f" And {len(others) - 5} more." if len(others) > 5 else ""
    return RequestError(first[0], first[1], first[2], first[3] + also + more)


def dotted(place: Iterable[str | int]) -> str:
    """("guidance", 0, "scale") -> "guidance[0].scale"."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "recipe"


def _said(fault: ErrorDetails, whole: type[BaseModel]) -> tuple[str, object, str, str]:
    """Field, value, problem, remedy."""
    loc = fault["loc"]
    # behind a term's place stands its method, which is no key of the recipe
    place = [part for i, part in enumerate(loc) if not (part in METHODS and i and isinstance(loc[i - 1], int))]
    field, value, kind = dotted(place), fault["input"], fault["type"]
    inner = fault.get("ctx", {}).get("error")
    if isinstance(inner, RequestError):
        return dotted([*place, inner.field]), inner.value, inner.problem, inner.remedy
    part, name = _part(whole, loc[:-1]), str(place[-1]) if place else ""
    keys = _keys(part)
    about = keys.get(name)
    own = about.json_schema_extra if about and isinstance(about.json_schema_extra, Mapping) else {}
    if kind == "extra_forbidden":
        return field, value, "there is no such key", did_you_mean(name, keys, "Keys here")
    if kind == "missing":
        return field, None, "it is missing", str(own.get("missing", "Add it."))
    if kind.startswith("union_tag"):
        given = value.get("method") if isinstance(value, Mapping) else value
        return f"{field}.method", given, "there is no such guidance method", did_you_mean(str(given), METHODS, "Methods")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        inside = ", ".join(_keys(_part(whole, loc)))
        return field, value, "this takes several keys, not one value", f"Write its keys below it{inside and f': {inside}'}."
    if kind == "literal_error" and about:
        choices = [str(choice) for choice in _literals(about.annotation)]
        return field, value, "there is no such choice", did_you_mean(str(value), choices, "Choices")
    problem = fault["msg"]
    for theirs, ours in (
        ("Value error, ", ""),
        ("Input should", "it should"),
        ("valid array", "list"),
        ("valid string", "text"),
    ):
        problem = problem.replace(theirs, ours)
    remedy = "Correct this value."
    if isinstance(value, str) and ("_type" in kind or "_parsing" in kind):
        remedy = "Write a plain number, without quotes." if kind.startswith(("int", "float")) else "Write it without quotes."
    elif kind == "finite_number":
        problem, remedy = "it is not finite", "Write null for no limit."
    elif kind == "string_type":
        remedy = "Put quotes around it."
    elif kind == "string_pattern_mismatch":
        problem, remedy = str(own.get("problem", problem)), str(own.get("remedy", remedy))
    elif kind in ("too_short", "too_long"):
        least = kind == "too_short"
        number = fault.get("ctx", {})["min_length" if least else "max_length"]
        problem = f"it takes at {'least' if least else 'most'} {number} {'entry' if number == 1 else 'entries'}"
        remedy = "Add some." if least else "Remove some."
    elif kind.startswith(("greater_than", "less_than")):
        remedy = "Choose a number in this range."
    elif kind in ("int_type", "float_type", "bool_type", "tuple_type", "list_type"):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a list", "list": "a list"}
        remedy = f"Give {wanted[kind.partition('_')[0]]}."
    return field, value, problem, remedy


def _part(whole: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel] | None:
    """The model that a place lies in."""
    here: type[BaseModel] | None = whole
    keyed = False
    for i, step in enumerate(loc):
        if isinstance(step, int) or keyed:
            keyed = False
        elif i and isinstance(loc[i - 1], int) and step in METHODS:
            here = request_of(step)
        else:
            found = _keys(here).get(step)
            annotation = found.annotation if found else None
            keyed, here = get_origin(annotation) is dict, _model(annotation)
    return here


def _keys(part: type[BaseModel] | None) -> dict[str, FieldInfo]:
    """The fields of a model by their names in a file."""
    return {info.alias or name: info for name, info in part.model_fields.items()} if part else {}


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model(each))), None)


def _literals(annotation: Any) -> list[Any]:
    """The choices of a Literal, also of one that may be None."""
    return [each for part in get_args(annotation) for each in (_literals(part) if get_args(part) else [part])]
