"""What `pip install .` installs: the package, its data folders inside it, and nothing beside it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "gemma_deploy",
    "source_code",
    "calib",
    "build_in",
    "scripts",
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "LICENSE",
)
LOOK = """
import json
from gemma_deploy import paths
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.recipe import Recipe
found = [paths.source_code_dir(), paths.calib_dir(), paths.build_in_dir(), paths.demo_checkpoint_dir()]
files = [str(file.relative_to(paths.PACKAGE)) for folder in found for file in folder.rglob("*") if file.is_file()]
recipe = Recipe.load("hf_gemma_int8", env={})
print(json.dumps([str(paths.PACKAGE), files, Checkpoint.open(recipe.frontend.checkpoint).config.model_type]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked as an installer would."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = ROOT / name, folder / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "tree")]
    env = {**os.environ, "CXX": "/nowhere"}  # no compiler: tests/native builds the library
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *options], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_it_puts_one_package_into_site_packages(installed):
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"gemma_deploy"}
    assert (installed / "gemma_deploy" / "py.typed").exists()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "gemma_deploy").rglob("*.py")}
    assert modules <= {str(file.relative_to(installed)) for file in installed.rglob("*.py")}
    page = "gemma_deploy/serve/page"
    assert {file.name for file in (ROOT / page).iterdir()} == {file.name for file in (installed / page).iterdir()}


def test_the_installed_package_finds_its_own_data(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    package, files, model_type = json.loads(done.stdout)
    assert package == str(installed / "gemma_deploy")
    assert model_type == "gemma"
    for name in ("source_code", "calib", "build_in"):
        here = {
            f"_data/{name}/{file.relative_to(ROOT / name)}"
            for file in (ROOT / name).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert here <= set(files), here - set(files)
    assert {f"demo/{file.name}" for file in (ROOT / "gemma_deploy" / "demo").iterdir()} <= set(files)


def test_the_installed_program_lists_its_recipes_takes_their_names_and_has_its_pages(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "100"}

    def program(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "gemma_deploy.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "cpu-best-int8\n" in program("recipes")
    for name in ("cpu-int8", "hf_gemma_int8", "build_in/ort_gemma_int8.yaml"):
        assert "this machine can do it" in program("compile", name, "--checkpoint", "demo", "--dry-run")
    templates = {file.name for file in (ROOT / "gemma_deploy" / "artifact" / "templates").iterdir()}
    assert {"report.html.j2", "parity.html.j2"} <= templates
    assert templates == {file.name for file in (installed / "gemma_deploy" / "artifact" / "templates").iterdir()}
