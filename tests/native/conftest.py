"""The library of backend.type native, built from the sources of this checkout."""

import fcntl
import sys
from pathlib import Path

import pytest

from gemma_deploy.backends.native import library

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import build_native  # noqa: E402


def _newest_source():
    files = [*(ROOT / build_native.SOURCES).iterdir(), Path(build_native.__file__)]
    return max(file.stat().st_mtime for file in files)


@pytest.fixture(scope="session")
def native_library():
    """Its path; tests that want it are left out where no compiler is installed."""
    if build_native.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    made, folder = library.FOLDER / library.LIBRARY, ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made.exists() and made.stat().st_mtime >= _newest_source()):
            build_native.build(made)
    return made
