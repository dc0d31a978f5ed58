"""llama.cpp through llama-cpp-python: a GGUF file. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama
from protocol import CAPACITY, LONG, Generated, main


class LlamaCpp:
    """A model with a context of one sequence, driven by `llama_decode` itself."""

    def __init__(self, path: Path, threads: int) -> None:
        sizes = {"n_ctx": CAPACITY, "n_batch": LONG, "n_ubatch": LONG}
        self.model = Llama(str(path), **sizes, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(self, tokens: list[int], position: int, every: bool = False) -> np.ndarray:
        """Float [1 or tokens, vocabulary]: logits of the last token, or of every one."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, position + at, 1, 0
            batch.logits[at] = every or at == len(tokens) - 1
        code = llama_cpp.llama_decode(self.model.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        shape = (len(tokens) if every else 1, self.model.n_vocab())
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.model.ctx), shape=shape)

    def clear(self) -> None:
        """Forget the text before."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.model.ctx), True)

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy."""
        self.clear()
        started = time.perf_counter()
        tokens = [int(self.decode(prompt, 0).argmax())]
        first = time.perf_counter()
        for step in range(steps):
            tokens.append(int(self.decode(tokens[-1:], len(prompt) + step).argmax()))
        return Generated(first - started, tokens, time.perf_counter() - first)

    def logits(self, window: list[int]) -> np.ndarray:
        """Of one prefill."""
        self.clear()
        return self.decode(window, 0, every=True)


if __name__ == "__main__":
    main(LlamaCpp)
