"""Builds the sdist, and from it a wheel for each platform there is a compiler for: `python scripts/build_wheels.py`.

    python scripts/build_wheels.py [--out dist] [--platform linux_aarch64]

A wheel holds the library of `backend.type: native` and no other compiled code, so that one serves every Python 3 of
its platform: `py3-none-linux_x86_64`, `py3-none-linux_aarch64`. Of another processor's family the library is made by
a cross compiler (Debian: g++-aarch64-linux-gnu, g++-x86-64-linux-gnu); a platform without one is told and left out.
Exits with 1 where a platform that was named, or every one, was left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import build_native  # noqa: E402

# Platform -> the processor's family, its number in an ELF file, and the cross compiler.
PLATFORMS = {
    "linux_x86_64": ("x86_64", 62, "x86_64-linux-gnu-g++"),
    "linux_aarch64": ("aarch64", 183, "aarch64-linux-gnu-g++"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="[default: dist]")
    parser.add_argument("--platform", action="append", choices=sorted(PLATFORMS), help="[default: all]")
    given = parser.parse_args(arguments)
    out, made, left_out = given.out.resolve(), [], []
    with tempfile.TemporaryDirectory(prefix="gemma-deploy-wheels-") as folder:
        sdist = source_archive(Path(folder), out)
        print(sdist)
        for name in given.platform or PLATFORMS:
            cxx = compiler_for(name)
            if cxx is None:
                left_out.append(name)
                print(f"{name}: left out, {PLATFORMS[name][2]} is not installed", file=sys.stderr)
                continue
            made.append(wheel(sdist, Path(folder) / name, out, name=name, cxx=cxx))
            print(made[-1])
    return 1 if not made or (given.platform and left_out) else 0


def compiler_for(name: str) -> str | None:
    """The compiler for a platform; None where there is none."""
    machine, _, cross = PLATFORMS[name]
    return build_native.compiler() if machine == platform.machine() else shutil.which(cross)


def source_archive(work: Path, out: Path) -> Path:
    """The sdist, of a copy of what belongs to the package: setuptools leaves its folders beside what it packs."""
    tree = work / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "workspace", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, tree, ignore=ignored)
    setup(tree, "sdist", "--dist-dir", str(out))
    return newest(out, "*.tar.gz")


def wheel(sdist: Path, work: Path, out: Path, *, name: str, cxx: str) -> Path:
    """The wheel of one platform.

    Raises:
        RuntimeError: setuptools failed, or the library in the wheel is none of this platform.
    """
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    (tree,) = work.iterdir()
    setup(tree, "bdist_wheel", "--dist-dir", str(out), CXX=cxx, GEMMA_DEPLOY_PLATFORM=name)
    made = newest(out, f"*-py3-none-{name}.whl")
    with zipfile.ZipFile(made) as archive:
        (library,) = [one for one in archive.namelist() if one.endswith(".so")]
        machine = struct.unpack_from("<H", archive.read(library), 18)[0]
    if Path(library).name != build_native.LIBRARY or machine != PLATFORMS[name][1]:
        raise RuntimeError(f"{made}: {library} is for the processor {machine}, not for {name}")
    return made


def setup(tree: Path, *arguments: str, **environment: str) -> None:
    """Run setup.py in a tree."""
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last."""
    return max(folder.glob(pattern), key=lambda one: one.stat().st_mtime)


if __name__ == "__main__":
    sys.exit(main())
