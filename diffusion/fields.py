"""Types of configuration fields, each with its range."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from diffusion.errors import UsageError

SCHEMA = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


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
