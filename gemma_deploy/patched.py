"""The files of source_code/ as Python modules, and the class of each generation. Imports them when asked."""

from __future__ import annotations

import importlib
import sys
import types

from gemma_deploy.errors import NotBuiltError
from gemma_deploy.paths import source_code_dir

PACKAGE = "gemma_deploy_source_code"
# model_type -> configuration file, its class, modeling file, decoder stack without a head, causal LM
MODELS = {
    "gemma": ("configuration_gemma_vacc", "GemmaConfig", "modeling_gemma_vacc", "GemmaModel", "GemmaForCausalLM"),
    "gemma2": ("configuration_gemma2_vacc", "Gemma2Config", "modeling_gemma2_vacc", "Gemma2Model", "Gemma2ForCausalLM"),
    "gemma3_text": (
        "configuration_gemma3_vacc",
        "Gemma3TextConfig",
        "modeling_gemma3_vacc",
        "Gemma3TextModel",
        "Gemma3ForCausalLM",
    ),
}


def patched_module(name: str) -> types.ModuleType:
    """Import one file of source_code/ under a package of its own, the way transformers would load it.

    Raises:
        ImportError: the file does not import with the installed transformers.
    """
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(source_code_dir())]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")


def stack_classes(model_type: str) -> tuple[type, type]:
    """Configuration class and decoder stack class of a generation.

    Raises:
        NotBuiltError: no patched model exists for it yet.
    """
    return _classes(model_type, 3)


def causal_classes(model_type: str) -> tuple[type, type]:
    """Configuration class and causal LM class of a generation.

    Raises:
        NotBuiltError: no patched model exists for it yet.
    """
    return _classes(model_type, 4)


def _classes(model_type: str, which: int) -> tuple[type, type]:
    if model_type not in MODELS:
        raise NotBuiltError(
            f"model_type {model_type!r} has no patched modeling file in this version",
            expected="one of " + ", ".join(MODELS),
            next_step="use a Gemma 1 or a Gemma 3 text checkpoint",
        )
    names = MODELS[model_type]
    return getattr(patched_module(names[0]), names[1]), getattr(patched_module(names[2]), names[which])
