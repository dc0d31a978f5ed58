"""Builds the library of `backend.type: native` with a C++17 compiler: `python scripts/build_native.py`.

setup.py calls it when the package is built. One file is compiled for each level of CPU features, with flags of its own;
a level that the compiler or the processor's family does not know is left out, and the library says which it has.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path("gemma_deploy") / "backends" / "native" / "src"
LIBRARY = "libgemma_deploy.so"
COMPILERS = ("c++", "g++", "clang++")
# Sums are those that are written down: no product is joined with a sum but where the source says so.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
AMX = ("-mamx-tile", "-mamx-int8")
# gcc 12 warns of its own headers (bug 105593).
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
# With it gcc 12 keeps second copies of sums of products, in registers that are not there (generic_packed.h).
SUMS = ("-fno-tree-pre",)
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "level_amx": (*AVX512, *AMX, *QUIET),
        "level_avx2": AVX2,
        "level_avxvnni": (*AVX2, "-mavxvnni"),
        "level_avx512vnni": (*AVX512, *QUIET, *SUMS),
    },
    "aarch64": {"level_neondot": ("-march=armv8.2-a+dotprod",)},
}


def compiler() -> str | None:
    """The C++ compiler of $CXX, or the first that is installed; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next((found for name in COMPILERS if (found := shutil.which(name))), None)


def build(out: Path, *, extra: Sequence[str] = (), cxx: str | None = None, machine: str | None = None) -> Path:
    """Compile the library.

    Args:
        out: the file that is made; extra: flags for the compiler and the linker, as those of a sanitizer.
        cxx: the compiler, by default `compiler()`; machine: the processor's family, by default this one's.

    Raises:
        RuntimeError: there is no compiler, or it refuses a file.
    """
    cxx = needed(cxx)
    with tempfile.TemporaryDirectory() as work:
        partial, made = Path(work) / LIBRARY, objects(Path(work), extra=extra, cxx=cxx, machine=machine)
        link = ("-Wl,--no-undefined", f"-Wl,--version-script={ROOT / SOURCES / 'exports.map'}", "-lm", "-pthread")
        run([cxx, "-shared", *extra, "-o", str(partial), *map(str, made), *link])
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f"{out.name}.partial")
        shutil.copyfile(partial, beside)
        beside.replace(out)
    return out


def objects(
    folder: Path, *, extra: Sequence[str] = (), cxx: str | None = None, machine: str | None = None
) -> list[Path]:
    """Compile the files of the library, each with the flags of its level, into a folder; see `build`."""
    cxx, flags = needed(cxx), LEVELS.get(machine or platform.machine(), {})
    made = [folder / f"{source.stem}.o" for source in sources()]
    commands = [
        [cxx, *FLAGS, *flags.get(source.stem, ()), *extra, "-pthread", "-c", str(source), "-o", str(one)]
        for source, one in zip(sources(), made, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return made


def needed(cxx: str | None = None) -> str:
    """A compiler: this one, or `compiler()`.

    Raises:
        RuntimeError: there is none.
    """
    found = cxx or compiler()
    if found is None:
        raise RuntimeError(f"no C++ compiler: none of {', '.join(COMPILERS)} is installed, and $CXX names none")
    return found


def sources() -> list[Path]:
    """The files of the library, in the order of their names."""
    return sorted((ROOT / SOURCES).glob("*.cpp"))


def run(command: Sequence[str]) -> None:
    """Run a command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def main() -> int:
    """Build it into the package."""
    out = ROOT / SOURCES.parent / LIBRARY
    try:
        build(out)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(out.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
