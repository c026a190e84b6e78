"""Sections of a configuration: classes whose fields carry their ranges, and whose errors are one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffusion.errors import UsageError, one_of

T = TypeVar("T")
SCHEMA = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
LIMITS = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt"),
          "less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}  # fmt: skip
TYPES = {"object": "mapping", "integer": "int", "number": "float", "boolean": "bool", "string": "str", "array": "list"}


def _checked_path(path: str) -> str:
    if not path:
        raise UsageError("is empty: name a file or folder, or leave it out")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise UsageError("has characters that no file name can have") from None
    if "\0" in path:
        raise UsageError("has a NUL character, which no file name can have")
    return path


Natural = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
ImageSize = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=1, le=4)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PathText = Annotated[
    str,
    BeforeValidator(lambda path: os.fsdecode(path) if isinstance(path, bytes) else path),  # YAML's !!binary
    AfterValidator(_checked_path),
]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator for the section `name` of a configuration: a frozen dataclass that validates.

    The constructor, and so `dataclasses.replace`, raises UsageError with the field "name.field", its value, and what
    would be right. The docstring under a field is its help text.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, config=SCHEMA)(cls)
        validated = made.__init__

        @functools.wraps(validated)
        def init(self: Any, **values: Any) -> None:
            try:
                validated(self, **values)
            except ValidationError as error:
                raise UsageError(_message(error, values, name, made)) from None

        made.__init__ = init
        return made

    return decorate


def describe(kind: Any, name: str) -> tuple[str, dict[str, list[str]]]:
    """The help text of a section's field, and the JSON types that it takes, each with the words that it is limited to,
    if any."""
    fields = [base.__pydantic_fields__ for base in kind.__mro__ if name in getattr(base, "__pydantic_fields__", ())]
    text = next(found[name].description for found in fields if found[name].description)
    types: dict[str, list[str]] = {}
    entry = json_schema(kind)["properties"][name]
    for option in entry.get("anyOf", [entry]):
        words = option.get("enum", [option["const"]] if "const" in option else [])
        types.setdefault(option.get("type", "string"), []).extend(words)
    return " ".join(text.split()), types


@functools.cache
def json_schema(kind: Any) -> dict[str, Any]:
    """The JSON schema of a section or configuration."""
    return TypeAdapter(kind).json_schema()


def has_field(kind: Any, name: str) -> bool:
    """Whether a section has a field."""
    return any(f.name == name for f in dataclasses.fields(kind))


def plain(value: object) -> str:
    """A setting as it is written in a file."""
    return value if isinstance(value, str) else json.dumps(value)


def shown(value: Any) -> str:
    """A value in a message."""
    if value == "" or value is None:
        return "empty" if value == "" else "null"
    try:
        text = str(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    except TypeError:  # keys of other types
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _message(error: ValidationError, values: Mapping[str, Any], section: str, cls: Any) -> str:
    """The first thing that is wrong with a section's values."""
    first = error.errors(include_url=False)[0]
    name, kind = str(first["loc"][0]) if first["loc"] else "", first["type"]
    key = f"{section}.{name}".strip(".")
    if kind == "value_error":
        return f"{key} {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if not has_field(cls, name) or not section:
        return f"unknown key {key}" if section else f"{key} must be a section of keys"
    value, types = values[name], describe(cls, name)[1]
    options = next((words for words in types.values() if words), [])
    if kind in LIMITS:
        right = f"{LIMITS[kind][0]} {first['ctx'][LIMITS[kind][1]]:g}"
    elif kind == "string_pattern_mismatch":
        right = f"text that matches {first['ctx']['pattern']}"
    elif kind.endswith(("too_short", "too_long")) or kind == "multiple_of":
        right = first["msg"].split(" should ")[1].removeprefix("be ").removeprefix("have ")
    elif kind == "finite_number":
        right = "a finite number"
    elif options:
        right = one_of(str(value), options)
    elif "array" in types and isinstance(value, int | float):
        right = f"a list: [{shown(value)}]"
    else:
        right = "of type " + " or ".join(TYPES.get(option, option) for option in types)
    return f"{key} is {shown(value)}; it must be {right}"
