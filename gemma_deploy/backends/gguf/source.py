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
ROOM = 2 << 30  # bytes of logits in files
ENGINE = Engine(
    name=LLAMA,
    backend="gguf",
    module="llama_cpp",
    package="llama-cpp-python==0.3.36",
    variable="GEMMA_DEPLOY_LLAMA",
    script=Path(__file__).parent / "apart" / "llama_reader.py",
)


class LlamaSource:
    """See the module. Logits lie in files, 1 MB for a token of 262,144: those of a few texts, others are made again.

    Args:
        file: for llama.cpp; threads: 0 for as many as there are cores; room: bytes of files there may be.
    """

    def __init__(self, file: Path, *, threads: int = 0, room: int = ROOM) -> None:
        self.name = LLAMA
        self.progress: Tick | None = None
        self.unit = "sequences"
        path = Path(file).resolve()
        self._child = Conversation(ENGINE, self.name, path, str(path), str(threads))
        self._texts: list[list[int]] = []
        self._files: dict[int, Path] = {}  # the oldest first
        self._room = room

    def run(self, cases: Sequence[Case]) -> Features:
        """Where the logits of every position of every row are: [prompt + steps, 2], number of a text and row in it."""
        total = sum(len(case.prompts) for case in cases)
        found: Features = []
        done = 0
        for case in cases:
            found.append([])
            for row in range(len(case.prompts)):
                ids = [int(token) for token in case.sequence(row)]
                number = len(self._texts)
                self._texts.append(ids)
                if self._held() <= self._room // 2:  # else when they are asked for, so that none is made twice
                    self._logits(number)
                found[-1].append(np.stack([np.full(len(ids), number), np.arange(len(ids))], axis=1))
                done += 1
                if self.progress is not None:
                    self.progress(done, total)
        return found

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, 2], as `run` gives them -> [n, V]."""
        files = {number: self._logits(number) for number in map(int, np.unique(features[:, 0]))}
        return np.stack([files[number][row] for number, row in features])

    def _logits(self, number: int) -> np.ndarray:
        """Of a text, [tokens, V]: they stay readable when their file makes room for others."""
        if number not in self._files:
            file = self._child.folder / f"{number}.npy"
            self._child.ask({"run": self._texts[number], "out": str(file)})
            self._files[number] = file
        while len(self._files) > 1 and self._held() > self._room:
            oldest = next(one for one in self._files if one != number)
            self._files.pop(oldest).unlink()
        found: np.ndarray = np.load(self._files[number], mmap_mode="r")
        return found

    def _held(self) -> int:
        return sum(file.stat().st_size for file in self._files.values())

    def close(self) -> None:
        """End what was started."""
        self._child.close()
