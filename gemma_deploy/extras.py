"""What `pip install gemma-deploy` leaves to extras, and how it is told that one is missing.

The package alone opens, runs, checks and shows artifacts. setup.cfg says what each extra installs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from gemma_deploy.errors import UsageError

# Extra -> modules that it brings, and that something here imports.
MODULES = {
    "build": ("torch", "transformers", "accelerate", "onnxscript", "onnxsim", "huggingface_hub"),
    "calibrate": ("datasets", "matplotlib"),
    "plots": ("matplotlib",),
    "gguf": ("gguf",),
    "genai": ("onnxruntime_genai",),
    "tvm": ("tvm",),
    "openvino": ("openvino", "openvino_tokenizers"),
    "ray": ("ray",),
    "adapters": ("peft",),
    "finetune": ("peft", "trl", "datasets", "accelerate"),
    "bitsandbytes": ("bitsandbytes",),
    "client": ("anyio", "httpx2"),
    "serve": ("llguidance", "starlette", "uvicorn"),
}


def installed(extra: str) -> bool:
    """Whether everything that an extra brings is there; nothing is imported."""
    return not _missing(extra)


def require(*extras: str, what: str) -> None:
    """Refuse what needs extras that are not installed, before any of it is done.

    Args:
        what: the subject of the sentence, such as "`gemma-deploy compile`".

    Raises:
        UsageError: with all modules that are missing, and the line that installs them.
    """
    lacking = {extra: _missing(extra) for extra in extras}
    modules = list(dict.fromkeys(module for found in lacking.values() for module in found))
    if modules:
        raise missing([extra for extra, found in lacking.items() if found], modules, what)


def missing(extras: Iterable[str], modules: Iterable[str], what: str) -> UsageError:
    """The error that says so."""
    return UsageError(
        f"{what} needs {', '.join(modules)}, not installed here",
        next_step=f'pip install "gemma-deploy[{",".join(extras)}]"',
    )


def extra_of(module: str) -> str | None:
    """The first extra that brings a module; None where none does."""
    return next((extra for extra, modules in MODULES.items() if module.partition(".")[0] in modules), None)


def _missing(extra: str) -> list[str]:
    return [module for module in MODULES[extra] if importlib.util.find_spec(module) is None]
