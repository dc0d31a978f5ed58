"""gemma-deploy: one recipe and one command take a Gemma checkpoint to a verified accelerator artifact.

The names below are imported when they are first used, so that a program that serves an artifact loads neither torch nor
transformers:

    from gemma_deploy import Artifact, Recipe, compile_recipe, evaluate, fine_tune, merge
    from gemma_deploy import open_embedder, open_engine, prove
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_deploy.offering import offering

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
_offered = offering(
    __name__,
    {
        "AdapterRef": "gemma_deploy.checkpoint.adapters.merging",
        "Artifact": "gemma_deploy.artifact.opened",
        "Conversation": "gemma_deploy.runtime.chat",
        "DeployError": "gemma_deploy.errors",
        "GenerationStats": "gemma_deploy.runtime.generate",
        "Recipe": "gemma_deploy.recipe",
        "Sampling": "gemma_deploy.runtime.sampling",
        "compile_recipe": "gemma_deploy.compile",
        "evaluate": "gemma_deploy.api",
        "fine_tune": "gemma_deploy.api",
        "merge": "gemma_deploy.merging",
        "open_embedder": "gemma_deploy.engine",
        "open_engine": "gemma_deploy.engine",
        "prove": "gemma_deploy.api",
    },
)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _offered(name)
    from importlib.metadata import version

    return version("gemma-deploy")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
