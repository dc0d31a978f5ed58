"""What setup.cfg cannot say: folders that travel inside the package, and the library of backend.type native."""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "scripts"))
from build_native import LIBRARY, build, sources  # noqa: E402

DATA = {f"gemma_deploy._data.{name}": name for name in ("source_code", "calib", "build_in") if Path(name).is_dir()}
KINDS = ("html", "j2", "js", "css", "svg", "cpp", "h", "map", "yaml")
NATIVE = "gemma_deploy.backends.native.library"
# `linux_aarch64`, say, where the library is made for another platform (scripts/build_wheels.py).
PLATFORM = os.environ.get("GEMMA_DEPLOY_PLATFORM")


class BuildLibrary(build_ext):
    """Compiles the library with flags for each file; where that fails, the package goes without it and says so."""

    def get_ext_filename(self, fullname: str) -> str:
        """It is no module of Python: it has one name on every version."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        """Compile it to where setuptools wants it."""
        try:
            build(Path(self.get_ext_fullpath(ext.name)), machine=PLATFORM and PLATFORM.partition("_")[2])
        except RuntimeError as error:
            print(f"warning: backend.type native is left out: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was made."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: where it was made."""
        if Path(self.build_lib, self.get_ext_filename(NATIVE)).exists():
            super().copy_extensions_to_source()


class AnyPython(bdist_wheel):
    """A wheel with the library is for every Python of its platform, one without it for every platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag."""
        if not any(Path(self.bdist_dir).rglob(LIBRARY)) and not any(Path("build").rglob(LIBRARY)):
            return "py3", "none", "any"
        return "py3", "none", PLATFORM or super().get_tag()[2]


setup(
    packages=[*find_packages(include=["gemma_deploy*"]), *DATA],
    package_dir=DATA,
    package_data={
        "gemma_deploy": ["py.typed", "demo/*", *(f"**/*.{kind}" for kind in KINDS)],
        **{name: ["**/*"] for name in DATA},
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    ext_modules=[Extension(NATIVE, [str(path.relative_to(HERE)) for path in sources()])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
