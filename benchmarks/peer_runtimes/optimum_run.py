"""optimum-onnx's class for ONNX Runtime: a directory that `optimum-cli export onnx` wrote. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from protocol import Generated, Sizes, main
from transformers.generation.streamers import BaseStreamer

QUANTIZED = "model_quantized.onnx"


class Clock(BaseStreamer):
    """When each token came; the first call hands over the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


class Optimum:
    """A model called by `generate`, which is how its documentation runs it."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        torch.set_num_threads(sizes.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = sizes.threads
        name = QUANTIZED if (path / QUANTIZED).exists() else "model.onnx"
        self.model = ORTModelForCausalLM.from_pretrained(
            path, file_name=name, session_options=options, use_io_binding=False
        )

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy."""
        ids, clock, tokens = torch.tensor([prompt]), Clock(), steps + 1
        started = time.perf_counter()
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        first = clock.times[1]
        return Generated(first - started, found[0, len(prompt) :].tolist(), clock.times[-1] - first)

    def logits(self, window: list[int]) -> np.ndarray:
        """Of one prefill."""
        ids = torch.tensor([window])
        positions = torch.arange(len(window))[None]
        return self.model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0].numpy()


if __name__ == "__main__":
    main(Optimum)
