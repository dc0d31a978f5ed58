"""Parts of the library in programs of their own: threads (pool.cpp), products with tiles in plain C++ (tiles.cpp)."""

import subprocess

import pytest

from gemma_deploy.backends.native import library
from tests.native.conftest import ROOT, build_native

SOURCES = ROOT / build_native.SOURCES


def ran(tmp_path, name, *more):
    """What tests/native/NAME.cpp prints, with these flags and files beside it."""
    compiler = build_native.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    made = tmp_path / name
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{SOURCES}")
    source = ROOT / "tests" / "native" / f"{name}.cpp"
    subprocess.run([compiler, *flags, str(source), *more, "-o", str(made)], check=True, capture_output=True)
    done = subprocess.run([str(made)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_pieces_are_done_once_and_helpers_rest_where_they_do_not_pay_off(tmp_path):
    assert "rests" in ran(tmp_path, "pool", str(SOURCES / "pool.cpp"))


def test_rows_have_with_tiles_the_bits_that_they_have_alone(tmp_path):
    """No processor or emulator here has tiles: these are plain C++, and so are vectors."""
    assert ran(tmp_path, "tiles") == "plain"


@pytest.mark.slow
def test_tiles_go_with_vectors_of_512_bits(native_library, tmp_path):
    if "avx512vnni" not in library.levels():
        pytest.skip("this processor has no AVX-512 VNNI")
    assert ran(tmp_path, "tiles", *build_native.AVX512) == "AVX-512"
