"""onnxruntime-genai: any directory with a genai_config.json, ours as well as its builder's. See protocol.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from protocol import Generated, Sizes, main


class Genai:
    """A model; every text gets a generator of its own."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.room, config = sizes.room, og.Config(str(path))
        options = {"intra_op_num_threads": sizes.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def start(self) -> og.Generator:
        """An empty cache; end of text is never chosen, as `min_length` forbids it."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.room, min_length=self.room, do_sample=False, batch_size=1)
        return og.Generator(self.model, params)

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy."""
        generator = self.start()
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        generator.generate_next_token()
        tokens = [int(generator.get_next_tokens()[0])]
        first = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return Generated(first - started, tokens, time.perf_counter() - first)

    def logits(self, window: list[int]) -> np.ndarray:
        """From one prefill where the graph gives all positions, else token by token, by the decode kernels."""
        generator = self.start()
        generator.append_tokens(np.array(window, np.int32))
        found = np.asarray(generator.get_output("logits"))[0]
        if len(found) == len(window):
            return found
        del generator
        generator = self.start()
        rows = np.empty((len(window), found.shape[-1]), np.float32)
        for at, token in enumerate(window):
            generator.append_tokens(np.array([token], np.int32))
            rows[at] = np.asarray(generator.get_output("logits"))[0, -1]
        return rows


if __name__ == "__main__":
    main(Genai)
