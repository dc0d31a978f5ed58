"""(model_type, part) -> class. Every Gemma has the same three; a new family adds its own with `@register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gemma_deploy.architectures import model_types
from gemma_deploy.errors import NotBuiltError
from gemma_deploy.split.base import Part
from gemma_deploy.split.parts import Bottom, Top, Trunk

Class = TypeVar("Class", bound=type[Part])
REGISTRY: dict[tuple[str, str], type[Part]] = {
    (model_type, cls.kind): cls for model_type in model_types() for cls in (Bottom, Trunk, Top)
}


def register(model_type: str, part: str) -> Callable[[Class], Class]:
    """Make a class the `part` (`bottom`, `trunk`, `top`) of every model of this type.

    Raises:
        ValueError: the place is taken.
    """

    def add(cls: Class) -> Class:
        taken = REGISTRY.setdefault((model_type, part), cls)
        if taken is not cls:
            raise ValueError(f"{model_type} {part} is {taken.__name__} already")
        return cls

    return add


def part_class(model_type: str, part: str) -> type[Part]:
    """The class of a part of a model.

    Raises:
        NotBuiltError: none is registered.
    """
    if (model_type, part) not in REGISTRY:
        known = sorted({known for known, _ in REGISTRY})
        raise NotBuiltError(
            f"nothing is registered as {part} of model_type {model_type!r}",
            expected=f"one of {', '.join(known)}",
            next_step="register one: @gemma_deploy.split.register(model_type, part)",
        )
    return REGISTRY[model_type, part]
