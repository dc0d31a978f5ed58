"""Types of what is read from files that may come from anywhere: JSON of artifacts and of results.

What passes here neither raises in whoever reads it nor leads outside an artifact, and no number in it lets a loop or an
array grow without measure.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gemma_deploy.names import LAYERS

LARGEST_EXPONENT = 64  # of a power of two that float16 tensors are divided by; the real ones are below 8
_LAYER_POINT = re.compile(r"model\.layers\.[0-9]{1,4}\..+")


def inside(name: str) -> str:
    """A path of a file in an artifact, as a manifest has it.

    Raises:
        ValueError: it is absolute, or leads out of the artifact.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("not the path of a file in the artifact")
    return name


def _point(name: str) -> str:
    if name.startswith(LAYERS) and not _LAYER_POINT.fullmatch(name):
        raise ValueError("is no point of a layer")
    return name


Point = Annotated[str, AfterValidator(_point)]
Inside = Annotated[str, AfterValidator(inside)]
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Index = Annotated[int, Field(ge=0, le=1024)]
Exponent = Annotated[int, Field(ge=-LARGEST_EXPONENT, le=LARGEST_EXPONENT)]
# JSON that is shown as it is, and no deeper than this.
Plain = str | int | float | bool | None


class Part(BaseModel):
    """An object in a JSON file: no value becomes one of another type; keys that are not named here are let be."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


def problems_of(kind: type[BaseModel], value: object) -> list[str]:
    """What is wrong with parsed JSON, a line for each key."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return lines_of(error)
    return []


def lines_of(error: ValidationError) -> list[str]:
    """A line for each key, of the first twenty."""
    found = []
    for one in error.errors(include_url=False, include_input=False, include_context=False)[:20]:
        key = ".".join(str(part)[:80] for part in one["loc"]) or "the file"
        found.append(f"{key}: {one['msg'].lower().removeprefix('value error, ')}")
    return found
