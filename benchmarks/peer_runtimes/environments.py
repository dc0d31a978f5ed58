"""Virtual environments of the peers, each made once."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

from peer_runtimes.processes import PeerError, run
from peer_runtimes.variants import ENVIRONMENTS, TORCH

INSTALLED = "installed"  # an empty file in an environment that is complete


def python_of(name: str, out: Path) -> Path:
    """The interpreter of an environment that was installed.

    Raises:
        PeerError: it was not.
    """
    if not (folder(name, out) / INSTALLED).exists():
        raise PeerError(f"the environment {name} is not installed")
    return folder(name, out) / "bin" / "python"


def folder(name: str, out: Path) -> Path:
    """Of an environment."""
    return out / f"venv-{name}"


def source_of(name: str, out: Path) -> Path:
    """Where the source of its sdist is unpacked."""
    return out / f"src-{name}"


def install(name: str, out: Path, torch_index: str | None) -> None:
    """Make an environment, unless it is complete.

    Raises:
        PeerError: pip failed.
    """
    venv, source, wanted = folder(name, out), source_of(name, out), ENVIRONMENTS[name]
    if (venv / INSTALLED).exists():
        return
    for old in (venv, source):
        shutil.rmtree(old, ignore_errors=True)
    held = out / "held.txt"
    held.write_text(f"{TORCH}\n")
    log, pip = out / f"install-{name}.log", [str(venv / "bin" / "python"), "-m", "pip"]
    index = ["--extra-index-url", torch_index] if torch_index else []
    run([sys.executable, "-m", "venv", str(venv)], log)
    for packages in wanted.packages:
        run([*pip, "install", "-q", "-c", str(held), *index, *packages], log)
    if wanted.sdist:
        run([*pip, "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(source), wanted.sdist], log)
        archive = next(source.glob("*.tar.gz"))
        with tarfile.open(archive) as opened:
            opened.extractall(source, filter="data")
        tree = source / archive.name.removesuffix(".tar.gz")
        for file, old, new in wanted.edits:
            edit(tree / file, old, new)
        if wanted.program:
            build(wanted.program, tree / "vendor" / "llama.cpp", venv, log)
        else:
            run([*pip, "install", "-q", "-c", str(held), str(tree)], log, wanted.environ)
    for package in wanted.remove:
        run([*pip, "uninstall", "-q", "-y", package], log)
    (venv / INSTALLED).touch()


def build(program: str, tree: Path, venv: Path, log: Path) -> None:
    """A program of llama.cpp for this CPU, into an environment.

    Raises:
        PeerError: the compiler failed.
    """
    words = ("GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "CMAKE_BUILD_TYPE=Release")
    without = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_USE_PREBUILT_UI")
    options = [f"-D{word}" for word in (*words, *(f"{one}=OFF" for one in without))]
    place = tree / "build"
    run(["cmake", "-S", str(tree), "-B", str(place), *options], log)
    run(["cmake", "--build", str(place), "--target", program, "-j", str(os.cpu_count())], log)
    shutil.copy2(place / "bin" / program, venv / "bin" / program)


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that is in a file once.

    Raises:
        PeerError: it is not.
    """
    text = file.read_text()
    if text.count(old) != 1:
        raise PeerError(f"{file.name} has {text.count(old)} times what is to be replaced, 1 expected")
    file.write_text(text.replace(old, new))
