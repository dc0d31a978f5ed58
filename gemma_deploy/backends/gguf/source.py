"""A file for llama.cpp as a source of logits: in llama.cpp, as a user runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_deploy.backends.apart import Conversation, Engine
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.sources import Features
from gemma_deploy.progress import Tick

LLAMA = "llama.cpp"
ENGINE = Engine(
    name=LLAMA,
    backend="gguf",
    module="llama_cpp",
    package="llama-cpp-python==0.3.36",
    variable="GEMMA_DEPLOY_LLAMA",
    script=Path(__file__).parent / "apart" / "llama_reader.py",
)


class LlamaSource:
    """See the module. Logits lie in files until they are compared: 1 MB for a token of 262,144.

    Args:
        file: for llama.cpp; longest: tokens of the longest sequence; threads: 0 for as many as there are cores.
    """

    def __init__(self, file: Path, *, longest: int, threads: int = 0) -> None:
        self.name = LLAMA
        self.progress: Tick | None = None
        self.unit = "sequences"
        path = Path(file).resolve()
        self._child = Conversation(ENGINE, self.name, path, str(path), str(longest), str(threads))
        self._files: list[Path] = []

    def run(self, cases: Sequence[Case]) -> Features:
        """Where the logits of every position of every row lie: [prompt + steps, 2], file and row in it."""
        total = sum(len(case.prompts) for case in cases)
        found: Features = []
        for case in cases:
            found.append([])
            for row in range(len(case.prompts)):
                ids = [int(token) for token in case.sequence(row)]
                number, file = len(self._files), self._child.folder / f"{len(self._files)}.npy"
                self._child.ask({"run": ids, "out": str(file)})
                self._files.append(file)
                found[-1].append(np.stack([np.full(len(ids), number), np.arange(len(ids))], axis=1))
                if self.progress is not None:
                    self.progress(number + 1, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, 2], as `run` gives them -> [n, V]."""
        files = {number: np.load(self._files[number], mmap_mode="r") for number in np.unique(features[:, 0])}
        return np.stack([files[number][row] for number, row in features])

    def close(self) -> None:
        """End what was started."""
        self._child.close()
