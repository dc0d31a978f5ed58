"""What an artifact can be made for. A back end is a folder here and a row in `ROWS`; base.py says what it answers to.

Folders are imported when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from gemma_deploy.artifact.manifest import Manifest
    from gemma_deploy.backends.base import Backend

# `backend.type` of a recipe -> the folder, whose module `backend` holds BACKEND.
ROWS = ("tvm_vacc", "onnxruntime", "native", "vllm", "gguf", "openvino", "tvm")
DEFAULT = "tvm_vacc"


def backend(name: str) -> Backend:
    """The back end of that name.

    Raises:
        KeyError: there is none.
    """
    if name not in ROWS:
        raise KeyError(name)
    return cast("Backend", importlib.import_module(f"gemma_deploy.backends.{name}.backend").BACKEND)


def backend_of(manifest: Manifest) -> Backend:
    """The back end an artifact was made for."""
    return backend(manifest.recipe.backend.type)
