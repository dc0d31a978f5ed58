"""Loops for what is no product: threads take rows, vectors run along them."""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import dlight

from gemma_deploy.backends.tvm.kernels import CHUNK, OURS

VECTOR = 16
PARALLEL = 1 << 14  # numbers from which on threads share the work


@tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
class ScheduleRest:
    """All functions of loops that have no schedule yet."""

    def transform_module(self, mod: Any, _: Any) -> Any:
        """See TVM's `module_pass`."""
        for where, function in list(mod.functions_items()):
            if isinstance(function, tirx.PrimFunc) and OURS not in (function.attrs or {}):
                mod[where] = scheduled(function).with_attr(OURS, True)
        return mod


def scheduled(function: Any) -> Any:
    """The same with its loops in threads and vectors."""
    sch = s_tir.Schedule(function)
    infos = dlight.normalize_prim_func(sch)
    if infos is None:
        return function
    for info in dlight.base.try_inline(sch, infos):
        kinds, loops = info.dom_kind(), sch.get_loops(info.block_rv)
        spatial = len(kinds) - len(kinds.lstrip("S"))
        if not loops or not spatial or len(loops) != len(kinds):
            continue
        whole = [_size(sch, loop) for loop in loops]
        fused = sch.fuse(*loops[:spatial]) if spatial > 1 else loops[0]
        size = math.prod(whole[:spatial])
        if spatial == len(kinds):
            vector = math.gcd(size, VECTOR)
            fused, inner = sch.split(fused, [None, vector])
            sch.vectorize(inner)
            size //= vector
        if math.prod(whole) >= PARALLEL and size > 1:
            outer, _ = sch.split(fused, [None, max(1, math.gcd(size, CHUNK) if size > CHUNK else 1)])
            sch.parallel(outer)
    return sch.mod["main"]


def _size(sch: Any, loop: Any) -> int:
    return int(sch.get(loop).extent)


def pipeline(target: Any) -> Any:
    """Of passes: as TVM's own for a CPU, and these schedules behind the joining of operators."""
    from tvm.relax.backend.cpu_generic import pipeline as generic

    passes = [
        relax.transform.DeadCodeElimination(),
        *generic.library_dispatch_passes(target),
        *generic.legalize_passes(target),
        ScheduleRest(),
    ]
    return tvm.transform.Sequential([*passes, *generic.dataflow_lower_passes(target), *generic.finalize_passes(target)])
