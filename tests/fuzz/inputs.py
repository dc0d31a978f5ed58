"""Sound inputs that several surfaces mutate, each made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.runtime.make import compile_tiny, write_tokenizer

STATIC, GENAI = {"type": "tvm_vacc", "dtype": "int8"}, {"type": "onnxruntime", "dtype": "int8"}


class Inputs:
    """Directories by name, read only.

    Args:
        once: (name, function that fills an empty directory) -> the directory.
    """

    def __init__(self, once: Callable[[str, Callable[[Path], object]], Path]) -> None:
        self._once = once

    def checkpoint(self, model_type: str = "gemma3_text") -> Path:
        """A tiny checkpoint with tokenizer, chat template and generation config."""

        def make(folder: Path) -> None:
            from gemma_deploy.testing import write_tiny_checkpoint

            write_tiny_checkpoint(folder, model_type)
            write_tokenizer(folder)
            (folder / "generation_config.json").write_text('{"eos_token_id": [1, 5], "bos_token_id": 2}')

        return self._once(f"fuzz-checkpoint-{model_type}", make)

    def artifact(self, kind: str) -> Path:
        """`static` or `genai`: a compiled tiny model."""
        backend = {"static": STATIC, "genai": GENAI}[kind]
        root = self._once(f"fuzz-artifact-{kind}", lambda root: compile_tiny(root, "gemma3_text", backend))
        return root / "workspace" / "tiny"


def in_folder(base: Path) -> Inputs:
    """Inputs that are made under a folder."""

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = base / name
        if not (base / f"{name}.done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            (base / f"{name}.done").touch()
        return folder

    return Inputs(once)


def copy(source: Path, target: Path) -> Path:
    """A copy to break."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)
