"""How fast this machine multiplies, in a process of its own: `python -m gemma_deploy.planning.rates THREADS`.

Prints one JSON object, operations a second (a product and its sum are two): `fp32` of NumPy's products of matrices,
`fp16` and `int8` of the products of the library of `backend.type: native`, of bfloat16 and of 8-bit codes with
activations of 8 bits. Those of a library that was not built are null.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gemma_deploy.backends.native import library
from gemma_deploy.errors import UsageError
from gemma_deploy.params.panels import ROWS as PANEL

TOKENS, COLUMNS, ROWS = 256, 2048, 4096  # of the products that are timed
GROUP = 128  # inputs that share a scale where activations have 8 bits, as in artifacts of w8a8
TIMES, SECONDS = 12, 1.5  # of one kind of product: at most so often, and about so long
BFLOAT16, CODES = 2, 3  # forms of src/layout.h


class Matrix(ctypes.Structure):
    """Matrix of src/layout.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("form", ctypes.c_int32),
        ("scale_form", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("input_group", ctypes.c_int32),
    )


def best_rate(once: Callable[[], object]) -> float:
    """Operations a second of the fastest of some products of [TOKENS, COLUMNS] and [COLUMNS, ROWS]."""
    once()
    best, begun = float("inf"), time.perf_counter()
    for _ in range(TIMES):
        started = time.perf_counter()
        once()
        now = time.perf_counter()
        best = min(best, now - started)
        if now - begun > SECONDS:
            break
    return 2.0 * TOKENS * COLUMNS * ROWS / best


def float32_rate() -> float:
    """Of NumPy, with the threads that its library takes."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((TOKENS, COLUMNS), np.float32), rng.standard_normal((COLUMNS, ROWS), np.float32)
    into = np.empty((TOKENS, ROWS), np.float32)
    return best_rate(lambda: np.matmul(x, w, out=into))


def library_rate(form: int, pool: ThreadPoolExecutor, threads: int) -> float:
    """Of the library's products, panels shared out among threads.

    Raises:
        UsageError: the library was not built.
    """
    functions, level = ctypes.CDLL(str(library.library_path())), library.level_here().encode()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 60, ROWS * COLUMNS * (2 if form == BFLOAT16 else 1), np.uint8)  # small and finite floats
    scales, x = np.ones(ROWS, np.float32), rng.standard_normal((TOKENS, COLUMNS), np.float32)
    into = np.empty((TOKENS, ROWS), np.float32)
    inputs = GROUP if form == CODES else 0
    matrix = Matrix(codes.ctypes.data, scales.ctypes.data, form, 0, ROWS, COLUMNS, 0, inputs)
    edges = [round(part * (ROWS // PANEL) / threads) for part in range(threads + 1)]

    def panels(part: int) -> None:
        where = ctypes.c_void_p(x.ctypes.data), TOKENS, ctypes.c_void_p(into.ctypes.data)
        span = edges[part], edges[part + 1], 0, 1
        if functions.gemma_op_product(level, ctypes.byref(matrix), *where, *span):
            raise UsageError("the library refuses a product", next_step=library.INSTALL)

    return best_rate(lambda: list(pool.map(panels, range(threads))))


def main(threads: int) -> None:
    """Measure and print."""
    found: dict[str, float | None] = {"fp32": float32_rate(), "fp16": None, "int8": None}
    with ThreadPoolExecutor(threads) as pool:
        for name, form in (("fp16", BFLOAT16), ("int8", CODES)):
            try:
                found[name] = library_rate(form, pool, threads)
            except UsageError:  # it was not built
                continue
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
