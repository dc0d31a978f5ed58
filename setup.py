"""What setup.cfg cannot say: the folders beside the package travel inside it, as paths.py expects them."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = {f"gemma_deploy._data.{name}": name for name in ("source_code", "calib", "build_in") if Path(name).is_dir()}

setup(
    packages=[*find_packages(include=["gemma_deploy*"]), *DATA],
    package_dir=DATA,
    package_data={"gemma_deploy": ["py.typed", "demo/*", "**/*.html", "**/*.j2"], **{name: ["**/*"] for name in DATA}},
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
)
