"""Reads keys of a config.json, remembers every problem, and leaves it to the caller to raise once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = object()  # for a key without a default


class ConfigKeys:
    """The keys of one config.json.

    Args:
        raw: the parsed file; where: its path, for messages.

    Attributes:
        problems: sentences about keys that are wrong; warnings: about those that may be.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Remember a sentence that stops nothing."""
        self.warnings.append(f"{self.where}: {text}")

    def problem(self, key: str, got: object, expected: str) -> None:
        """Remember that a key is wrong, once."""
        text = (
            f"{key}: got {str(got)[:80]!r}, expected {expected}"
            if isinstance(got, str)
            else (f"{key}: got {str(got)[:80]}, expected {expected}")
        )
        if text not in self.problems:
            self.problems.append(text)

    def integer(self, key: str, default: Any = MISSING, most: int = 2**31) -> int:
        """A whole number from 1 on; 1 where it is none."""
        value = self.raw.get(key, default)
        if value is MISSING:
            self.problems.append(f"{key} is missing")
        elif type(value) is not int or not 0 < value <= most:
            self.problem(key, value, f"a whole number from 1 to {most}")
        else:
            return value
        return 1

    def number(self, key: str, default: float) -> float:
        """A positive number; 1 where it is none."""
        return self.positive(key, self.raw.get(key, default))

    def positive(self, key: str, value: object) -> float:
        """`value` as a positive number, `key` being its name."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30 and math.isfinite(value):
            return float(value)
        self.problem(key, value, "a positive number")
        return 1.0

    def cap(self, key: str, default: float | None) -> float | None:
        """A positive number or null."""
        value = self.raw.get(key, default)
        return None if value is None else self.positive(key, value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, value, "true or false")
        return bool(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty where it is missing, null or none."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            self.problem(key, value, "an object")
        return value if isinstance(value, dict) else {}
