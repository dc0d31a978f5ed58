"""One generation a test in the default run: which one follows from the test's name, so that they take turns."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

GENERATIONS = ("gemma", "gemma2", "gemma3_text")
# Where a case takes an export, a calibration or a run of a model.
COSTLY = tuple(
    f"tests/{part}"
    for part in (
        *("graph/", "runtime/", "quantization/", "backends/", "parity/", "evaluation/", "split/"),
        *("test_quantized_artifact.py", "test_divided.py", "test_staging.py", "test_as_documented.py"),
    )
)


def left_out(cases: Iterable[tuple[str, Mapping[str, object]]]) -> set[int]:
    """Numbers of the cases that another generation stands for.

    Cases that differ in the generation alone are one group: one of them stays, chosen by the name of the test and by
    what else it is given.

    Args:
        cases: (name of the test, its parameters) of each.
    """
    groups: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, (name, parameters) in enumerate(cases):
        found = [key for key, value in parameters.items() if isinstance(value, str) and value in GENERATIONS]
        if len(found) == 1:
            others = sorted((key, repr(value)) for key, value in parameters.items() if key != found[0])
            groups[f"{name} {others}"].append((str(parameters[found[0]]), number))
    return {number for name, group in groups.items() for number in _others(name, group)}


def _others(name: str, group: Sequence[tuple[str, int]]) -> list[int]:
    chosen = sorted(group)[zlib.crc32(name.encode()) % len(group)]
    return [number for generation, number in group if (generation, number) != chosen]
