"""The machine that loops are compiled for, in LLVM's words, told without LLVM.

Of this machine's processor the level counts that the x86-64 ABI defines (v2, v3, v4), not its name: a library then runs
on every processor of that level. https://gitlab.com/x86-psABIs/x86-64-ABI
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.names import TVM_LIBRARY, TVM_OBJECTS

if TYPE_CHECKING:
    from gemma_deploy.backends.tvm.options import TvmOptions

CPUINFO = Path("/proc/cpuinfo")
# Highest first: LLVM's name, and flags of /proc/cpuinfo that tell the level from the one below.
LEVELS: tuple[tuple[str, set[str]], ...] = (
    ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("x86-64-v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    ("x86-64-v2", {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    ("x86-64", set()),
)


def flags() -> set[str]:
    """Of this machine's first processor, as Linux lists them; none where it does not."""
    if not CPUINFO.exists():
        return set()
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def own_triple() -> str:
    """Of this machine."""
    return f"{platform.machine()}-{'apple-darwin' if platform.system() == 'Darwin' else 'linux-gnu'}"


def own_cpu() -> str:
    """The level of this machine's processor; `generic` of one that has none."""
    found = flags()
    if platform.machine() != "x86_64":
        return "generic"
    levels = [name for index, (name, _) in enumerate(LEVELS) if all(needed <= found for _, needed in LEVELS[index:])]
    return levels[0]


def triple_of(options: TvmOptions) -> str:
    """What a recipe asks for."""
    return options.triple or own_triple()


def cpu_of(options: TvmOptions) -> str:
    """What a recipe asks for."""
    return options.cpu or (own_cpu() if triple_of(options) == own_triple() else "generic")


def is_own(triple: str) -> bool:
    """Whether a library for a machine of that triple is one for this machine."""
    return triple == own_triple()


def missing_level(cpu: str) -> set[str]:
    """What a processor of one of `LEVELS` has and this machine's has not; nothing of one that is none of them."""
    names = [name for name, _ in LEVELS]
    if cpu not in names:
        return set()
    return set().union(*(needed for _, needed in LEVELS[names.index(cpu) :])) - flags()


def file_of(triple: str) -> str:
    """What is made: a library, or object files for a linker that is not here."""
    return TVM_LIBRARY if is_own(triple) else TVM_OBJECTS


def llvm_target(triple: str, cpu: str) -> dict[str, Any]:
    """As `tvm.target.Target` takes it."""
    return {"kind": "llvm", "mtriple": triple, "mcpu": cpu}
