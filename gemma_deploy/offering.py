"""Packages that offer names of their modules, each imported when it is first asked for.

Who needs one small thing of a package, as whoever runs an artifact does of most, does not wait for all of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def offering(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package (PEP 562).

    Args:
        package: its name; where: what it offers, and the module that has it.
    """

    def found(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)  # once: Python asks for what is not there alone
        return value

    return found
