"""Where the program's own data lie: in a source checkout, an editable install, or an installed wheel.

A checkout keeps source_code/ and calib/ beside gemma_deploy/; a wheel carries them inside it (see setup.cfg,
package_dir), because top-level folders of that name would litter site-packages.
"""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.errors import DeployError

PACKAGE = Path(__file__).resolve().parent
# What lies beside the package in a checkout, and beside nothing else: site-packages may hold anybody's calib/.
LANDMARKS = ("calib/make_samples.py", "source_code/decoder_vacc.py")


def source_code_dir() -> Path:
    """The stand-alone modeling files that are copied beside the weights."""
    return _data_dir("source_code")


def calib_dir() -> Path:
    """The bundled calibration samples."""
    return _data_dir("calib")


def build_in_dir() -> Path:
    """The shipped recipes."""
    return _data_dir("build_in")


def demo_checkpoint_dir() -> Path:
    """The bundled mini checkpoint, `frontend.checkpoint: demo`."""
    return PACKAGE / "demo"


def _data_dir(name: str) -> Path:
    """The folder inside the package, else the one beside it where that is a checkout of this program.

    Raises:
        DeployError: there is neither.
    """
    inside, beside = PACKAGE / "_data" / name, PACKAGE.parent / name
    if inside.is_dir():
        return inside
    if beside.is_dir() and all((PACKAGE.parent / landmark).is_file() for landmark in LANDMARKS):
        return beside
    raise DeployError(
        f"the folder {name}/ that belongs to gemma-deploy is missing",
        expected=f"{inside}, or {beside} in a checkout",
        next_step="reinstall gemma-deploy",
    )
