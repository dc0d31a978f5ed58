"""gemma-deploy: one recipe and one command take a Gemma checkpoint to a verified accelerator artifact.

The names below are imported when they are first used, so that a program that serves an artifact loads neither torch nor
transformers:

    from gemma_deploy import Artifact, Recipe, compile_recipe, evaluate, fine_tune, merge
    from gemma_deploy import open_embedder, open_engine, prove
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_deploy.api import evaluate, fine_tune, prove
    from gemma_deploy.artifact.opened import Artifact
    from gemma_deploy.checkpoint.adapters.merging import AdapterRef
    from gemma_deploy.compile import compile_recipe
    from gemma_deploy.engine import open_embedder, open_engine
    from gemma_deploy.errors import DeployError
    from gemma_deploy.merging import merge
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.runtime.chat import Conversation
    from gemma_deploy.runtime.generate import GenerationStats
    from gemma_deploy.runtime.sampling import Sampling

    __version__: str

__all__ = [
    "AdapterRef",
    "Artifact",
    "Conversation",
    "DeployError",
    "GenerationStats",
    "Recipe",
    "Sampling",
    "compile_recipe",
    "evaluate",
    "fine_tune",
    "merge",
    "open_embedder",
    "open_engine",
    "prove",
]
_WHERE = {
    "AdapterRef": "checkpoint.adapters.merging",
    "Artifact": "artifact.opened",
    "Conversation": "runtime.chat",
    "DeployError": "errors",
    "GenerationStats": "runtime.generate",
    "Recipe": "recipe",
    "Sampling": "runtime.sampling",
    "compile_recipe": "compile",
    "evaluate": "api",
    "fine_tune": "api",
    "merge": "merging",
    "open_embedder": "engine",
    "open_engine": "engine",
    "prove": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("gemma-deploy")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
