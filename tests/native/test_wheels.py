"""scripts/build_wheels.py: the sdist, and wheels with the library of a platform."""

import ctypes
import platform
import sys
import tarfile
import zipfile

import pytest

from tests.native.conftest import ROOT, build_native

sys.path.insert(0, str(ROOT / "scripts"))
import build_wheels


def test_a_platform_without_a_compiler_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build_wheels, "source_archive", lambda work, out: out / "x.tar.gz")
    monkeypatch.setattr(build_wheels, "wheel", lambda sdist, work, out, name, cxx: out / f"{name}.whl")
    monkeypatch.setattr(build_wheels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build_native, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(build_wheels.shutil, "which", lambda name: None)
    assert build_wheels.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("linux_x86_64.whl")
    assert said.err == "linux_aarch64: left out, aarch64-linux-gnu-g++ is not installed\n"
    assert build_wheels.main(["--out", str(tmp_path), "--platform", "linux_aarch64"]) == 1


@pytest.mark.slow
def test_a_wheel_has_the_library_of_its_platform(tmp_path):
    name = f"linux_{platform.machine()}"
    if name not in build_wheels.PLATFORMS or build_wheels.compiler_for(name) is None:
        pytest.skip("no C++ compiler is installed, or none of these platforms is here")
    assert build_wheels.main(["--out", str(tmp_path), "--platform", name]) == 0
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{name}.whl")
    with tarfile.open(sdist) as archive:
        assert not [one for one in archive.getnames() if one.endswith(".so")]
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [one for one in archive.namelist() if one.endswith(".so")]
        archive.extract(library, tmp_path)
    levels = ctypes.CDLL(str(tmp_path / library)).gemma_levels
    levels.restype = ctypes.c_char_p
    assert levels().decode().split()[-1] == "plain"
