"""The program's own data are its own: those inside the package, else those of the checkout, never a stranger's."""

from pathlib import Path

import pytest

from gemma_deploy import paths
from gemma_deploy.errors import DeployError

ROOT = Path(__file__).parent.parent
DIRECTORIES = {"source_code": paths.source_code_dir, "calib": paths.calib_dir, "build_in": paths.build_in_dir}


def test_a_checkout_has_them_beside_the_package():
    assert {name: find() for name, find in DIRECTORIES.items()} == {name: ROOT / name for name in DIRECTORIES}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package among strangers' folders of the same names, with files of the same names."""
    site = tmp_path / "site-packages"
    for name in DIRECTORIES:
        (site / name).mkdir(parents=True)
        (site / name / "README.md").write_text("somebody's")
    (site / "source_code" / "modeling_gemma_vacc.py").write_text("somebody's")
    (site / "source_code" / "decoder_vacc.py").write_text("somebody's")
    (site / "build_in" / "hf_gemma_int8.yaml").write_text("somebody's")
    monkeypatch.setattr(paths, "PACKAGE", site / "gemma_deploy")
    return site / "gemma_deploy"


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_installation_has_them_inside_whatever_lies_beside_it(package, name):
    (package / "_data" / name).mkdir(parents=True)
    assert DIRECTORIES[name]() == package / "_data" / name


@pytest.mark.parametrize("name", DIRECTORIES)
def test_an_incomplete_installation_does_not_take_a_strangers(package, name):
    with pytest.raises(DeployError, match=f"the folder {name}/ that belongs to gemma-deploy is missing") as caught:
        DIRECTORIES[name]()
    assert caught.value.next_step == "reinstall gemma-deploy"
    assert str(package / "_data" / name) in caught.value.expected
