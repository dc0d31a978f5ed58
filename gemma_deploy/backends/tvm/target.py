"""The machine that loops are compiled for, in LLVM's words, told without LLVM.

Of this machine's processor the level counts that the x86-64 ABI defines (v2, v3, v4), not its name: a library then runs
on every processor of that level. https://gitlab.com/x86-psABIs/x86-64-ABI
"""

from __future__ import annotations

import difflib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.errors import UsageError
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


def is_levelled(cpu: str) -> bool:
    """Whether `flags` tell if a processor is one of these."""
    return cpu in {"generic", *(name for name, _ in LEVELS)}


def file_of(triple: str) -> str:
    """What is made: a library, or object files for a linker that is not here."""
    return TVM_LIBRARY if is_own(triple) else TVM_OBJECTS


def require_known(triple: str, cpu: str) -> None:
    """See that LLVM knows a machine.

    Asked to compile, TVM crashes for a triple that LLVM cannot read, and takes the least processor for an unknown one.

    Raises:
        UsageError: it does not.
    """
    if is_own(triple) and is_levelled(cpu) and cpu in ("generic", own_cpu()):
        return
    import tvm
    from tvm.target import codegen

    known = [str(name) for name in codegen.llvm_get_targets()]
    machine = triple.partition("-")[0]
    if machine not in known:
        raise UsageError(
            f"backend.compile.triple: LLVM has no machine {machine}",
            expected=", ".join(sorted(known)),
            next_step="write one of them and its system, as aarch64-linux-gnu",
        )
    of_machine = tvm.target.Target(llvm_target(triple, "generic"))
    processors = [str(name) for name in codegen.llvm_get_cpu_archlist(of_machine)]
    if cpu not in processors:
        near = difflib.get_close_matches(cpu, processors, n=5) or sorted(processors)
        raise UsageError(
            f"backend.compile.cpu: LLVM has no processor {cpu} of {triple}",
            expected=", ".join(near),
            next_step="write one of them, or remove the key",
        )


def runs_here(triple: str, cpu: str) -> bool:
    """Whether this machine is known to have all that a library may use."""
    if not is_own(triple) or missing_level(cpu):
        return False
    if is_levelled(cpu):
        return True
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu()) == cpu


def llvm_target(triple: str, cpu: str) -> dict[str, Any]:
    """As `tvm.target.Target` takes it."""
    return {"kind": "llvm", "mtriple": triple, "mcpu": cpu}
