"""Pages of tables that a prompt looked rows up in: they leave the process's memory behind it.

Tables are mapped, and ONNX Runtime reads rows where they lie. A page that is read brings many neighbours along (Linux
maps what its cache has around it), so that a prompt of 512 tokens makes hundreds of MiB resident.
"""

from __future__ import annotations

from pathlib import Path

from gemma_deploy.machine import leave_pages
from gemma_deploy.names import PARAMS

SHORT = 64  # tokens: a shorter prompt is not worth looking at the maps, which takes some milliseconds


def leave_tables(artifact: Path, tokens: int) -> None:
    """Behind a prompt of so many tokens."""
    if tokens >= SHORT:
        leave_pages(artifact / PARAMS)
