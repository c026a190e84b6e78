"""Sections of a configuration: validated dataclasses whose errors are one line, and which may choose components.

A component is one entry of a dict: a function whose keyword-only parameters are its settings (an optimizer, a sampler),
or a section of its own (a data source, a network). A setting of one component given to another is refused by name.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffusion.errors import UsageError, check_name, check_options, options_of, prefixed

T = TypeVar("T")
SCHEMA = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


def _checked_path(path: str) -> str:
    if not path or not path.isprintable():
        raise UsageError(f"is {path!r}; it must name a file or folder")
    return path


Natural = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
ImageSize = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=1, le=4)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PathText = Annotated[str, AfterValidator(_checked_path)]


class Section:
    """What sections share. `choices` are the components that each of its fields chooses from."""

    choices: ClassVar[Mapping[str, Mapping[str, Callable[..., Any]]]] = {}
    options: Any
    """the settings of the chosen components, in a section that chooses any"""

    def component(self, field: str) -> Callable[..., Any]:
        """The component that a field chooses, with its settings."""
        function = self.choices[field][getattr(self, field)]
        return functools.partial(function, **{name: self.options[name] for name in options_of(function)})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator for the section `name` of a configuration: a frozen dataclass that validates.

    The constructor, and so `dataclasses.replace`, raises UsageError with the field "name.field", its value, and what
    would be right. The docstring under a field is its help text. In a `Section` with `choices`, the settings of the
    chosen components are further keywords, kept in `options`; `replace` drops those of what is no longer chosen.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, config=SCHEMA)(cls)
        validated = made.__init__

        @functools.wraps(validated)
        def init(self: Any, **values: Any) -> None:
            values = _with_options(made, name, values) if getattr(made, "choices", {}) else values
            try:
                validated(self, **values)
            except ValidationError as error:
                raise UsageError(_message(error, values, name, made)) from None

        made.__init__ = init
        return made

    return decorate


def _with_options(cls: Any, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section's own fields, and as `options` the settings of the components that they choose."""
    own = {f.name: values.get(f.name, f.default) for f in dataclasses.fields(cls)}
    given = {name: value for name, value in values.items() if name not in own}
    set_here, defaults = values.get("options", {}) | given, dict[str, Any]()
    for field, components in cls.choices.items():
        check_name(f"{section}.{field}", shown(own[field]), components)
        component = components[own[field]]
        options = options_of(component)
        defaults |= options
        with prefixed(f"{section}."):
            check_options(component, {name: value for name, value in set_here.items() if name in options})
    for name in given:
        if name not in defaults:
            if not (owners := owners_of(cls, name)):
                raise UsageError(f"unknown key {section}.{name}")
            field = owners[0].split()[0]
            raise UsageError(f"{section}.{name} belongs to {', '.join(owners)}, and {section}.{field} is {own[field]}")
    kept = {name: value for name, value in set_here.items() if name in defaults}
    return {name: value for name, value in values.items() if name in own} | {"options": defaults | kept}


def options_by_owner(cls: Any) -> dict[str, dict[str, Any]]:
    """The options of each component of a section, with their defaults, by a name such as "sampler ddim"."""
    choices = getattr(cls, "choices", {}).items()
    return {f"{field} {name}": options_of(one) for field, components in choices for name, one in components.items()}


def owners_of(cls: Any, option: str) -> list[str]:
    """The components that have an option."""
    return [owner for owner, options in options_by_owner(cls).items() if option in options]


def has_field(cls: Any, name: str) -> bool:
    """Whether a section has a setting: a field, or an option of any of its components."""
    return name in {f.name for f in dataclasses.fields(cls)} - {"options"} or bool(owners_of(cls, name))


def settings_of(section: Any) -> dict[str, Any]:
    """The settings of a section as plain values, with those of its components."""
    values = dataclasses.asdict(section)
    options = values.pop("options", {})
    return values | options


json_schema = functools.cache(lambda cls: TypeAdapter(cls).json_schema())
"""The JSON schema of a section."""


@functools.cache
def help_texts(cls: type[Any]) -> dict[str, str]:
    """The docstring under each field of a section."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]  # a schema describes its own
    entries = [item for base in bases for item in json_schema(base)["properties"].items()]
    return {name: " ".join(entry["description"].split()) for name, entry in entries if "description" in entry}


def types_of(cls: Any, name: str) -> dict[str, list[str]]:
    """The JSON types that a field takes, each with the words that it is limited to, if any."""
    if name in getattr(cls, "choices", {}):
        return {"string": list(cls.choices[name])}
    types: dict[str, list[str]] = {}
    entry = json_schema(cls)["properties"][name]
    for option in entry.get("anyOf", [entry]):
        words = option.get("enum", [option["const"]] if "const" in option else [])
        types.setdefault(option.get("type", "string"), []).extend(words)
    return types


def described(cls: Any) -> Iterator[tuple[str, str, Any, dict[str, list[str]]]]:
    """Each setting of a section, with those of all its components: name, help text, default and `types_of`."""
    for name, default in dataclasses.asdict(cls()).items():
        if name != "options":
            yield name, help_texts(cls)[name], default, types_of(cls, name)
    for options in options_by_owner(cls).values():
        for option, default in options.items():
            yield option, f"setting of {', '.join(owners_of(cls, option))}", default, {"number": []}


def shown(value: object) -> str:
    """A value in a message, as it is written in a file; cut after 80 characters."""
    text = str(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return (text if len(text) <= 80 else text[:77] + "...") or "empty"


def _message(error: ValidationError, values: Mapping[str, Any], section: str, cls: Any) -> str:
    """The first thing that is wrong with a section's values."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    key = f"{section}.{name}".strip(".")
    if first["type"] == "value_error":
        return f"{key} {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if not section:
        return f"{key} must be a section of keys"
    if not has_field(cls, name):
        return f"unknown key {key}"
    value, types = values[name], types_of(cls, name)
    if words := [word for words in types.values() for word in words]:
        check_name(key, shown(value), words)
    right = first["msg"].split(" should ")[-1]
    if "array" in types and isinstance(value, int | float):
        right = f"be a list: [{shown(value)}]"
    elif first["type"].endswith(("_type", "_parsing", "_from_float", "literal_error")):
        right = "be of type " + " or ".join(types)
    return f"{key} is {shown(value)}; it must {right}"
