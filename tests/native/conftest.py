"""The library of backend.type native, built from the sources of this checkout."""

import fcntl
import hashlib
import sys
from pathlib import Path

import pytest

from gemma_deploy.backends.native import library

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import build_native  # noqa: E402


def _sources_digest():
    files = sorted((ROOT / build_native.SOURCES).iterdir())
    text = b"".join(file.read_bytes() for file in [*files, Path(build_native.__file__)])
    return hashlib.sha256(text).hexdigest()


@pytest.fixture(scope="session")
def native_library():
    """Its path; tests that want it are left out where no compiler is installed."""
    if build_native.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    made, built = library.FOLDER / library.LIBRARY, ROOT / "build" / "native.sha256"
    built.parent.mkdir(exist_ok=True)
    with (ROOT / "build" / "native.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        digest = _sources_digest()
        if not (made.exists() and built.exists() and built.read_text() == digest):
            build_native.build(made)
            built.write_text(digest)
    return made
