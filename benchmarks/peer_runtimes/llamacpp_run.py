"""llama.cpp through llama-cpp-python: a GGUF file. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import Llama
from protocol import LONG, Generated, Sizes, main


class LlamaCpp:
    """A model and its context, driven by `llama_decode` itself."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        room = {"n_ctx": sizes.room * sizes.together, "n_batch": LONG, "n_ubatch": LONG}
        threads = {"n_threads": sizes.threads, "n_threads_batch": sizes.threads}
        if sizes.together > 1:
            several(sizes.together)
        self.model = Llama(str(path), **room, **threads, verbose=False)

    def decode(self, tokens: list[int], position: int, every: bool = False) -> np.ndarray:
        """Float [1 or tokens, vocabulary]: logits of the last token, or of every one."""
        for at in range(0, len(tokens), LONG):
            part = tokens[at : at + LONG]
            last = len(part) - 1 if at + LONG >= len(tokens) else -1
            self.compute([(token, position + at + n, 0, every or n == last) for n, token in enumerate(part)])
        shape = (len(tokens) if every else 1, self.model.n_vocab())
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.model.ctx), shape=shape)

    def compute(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Tokens, their positions, their sequences, and whether logits are wanted."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, wanted
        code = llama_cpp.llama_decode(self.model.ctx, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    def together(self, prompts: list[list[int]], steps: int) -> float:
        """Greedy, a sequence for each prompt: seconds of the steps."""
        self.clear()
        shape, tokens = (len(prompts), self.model.n_vocab()), [prompt[-1] for prompt in prompts]
        for number, prompt in enumerate(prompts):
            self.compute([(token, at, number, False) for at, token in enumerate(prompt[:-1])])
        started = time.perf_counter()
        for step in range(steps):
            at = len(prompts[0]) - 1 + step
            self.compute([(token, at, number, True) for number, token in enumerate(tokens)])
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.model.ctx), shape=shape)
            tokens = [int(one) for one in logits.argmax(-1)]
        return time.perf_counter() - started

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


def several(count: int) -> None:
    """Let contexts have `count` sequences: `Llama` itself has no word for it."""
    default = llama_cpp.llama_context_default_params

    def changed() -> llama_cpp.llama_context_params:
        made = default()
        made.n_seq_max = count
        return made

    llama_cpp.llama_context_default_params = llama_cpp.llama_cpp.llama_context_default_params = changed


if __name__ == "__main__":
    main(LlamaCpp)
