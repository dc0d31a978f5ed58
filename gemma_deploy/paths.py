"""Where the program's own data lie: in a source checkout, an editable install, or an installed wheel.

A checkout keeps source_code/ and calib/ beside gemma_deploy/; a wheel carries them inside it (see setup.cfg,
package_dir), because top-level folders of that name would litter site-packages.
"""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.errors import DeployError

PACKAGE = Path(__file__).resolve().parent


def source_code_dir() -> Path:
    """The stand-alone modeling files that are copied beside the weights."""
    return _data_dir("source_code", "modeling_gemma_vacc.py")


def calib_dir() -> Path:
    """The bundled calibration samples."""
    return _data_dir("calib", "README.md")


def build_in_dir() -> Path:
    """The shipped recipes."""
    return _data_dir("build_in", "hf_gemma_int8.yaml")


def demo_checkpoint_dir() -> Path:
    """The bundled mini checkpoint, `frontend.checkpoint: demo`."""
    return PACKAGE / "demo"


def _data_dir(name: str, landmark: str) -> Path:
    """The first candidate that holds `landmark`, so that a stranger's folder of the same name is not taken."""
    candidates = (PACKAGE.parent / name, PACKAGE / name, PACKAGE / "_data" / name)
    for candidate in candidates:
        if (candidate / landmark).is_file():
            return candidate
    raise DeployError(
        f"the folder {name}/ that belongs to gemma-deploy is missing",
        expected=" or ".join(str(candidate / landmark) for candidate in candidates),
        next_step="reinstall gemma-deploy",
    )
