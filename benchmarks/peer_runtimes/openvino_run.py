"""OpenVINO GenAI: a directory that `optimum-cli export openvino` wrote. See protocol.py."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from protocol import Generated, Sizes, main


class OpenVino:
    """The LLM pipeline for text; its model without the pipeline for logits, compiled when they are asked for."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.path, self.threads, self.request = path, sizes.threads, None
        self.pipeline = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=sizes.threads)

    def generate(self, prompt: list[int], steps: int) -> Generated:
        """Greedy; seconds of the steps are the pipeline's own time between tokens."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = steps + 1, True, False
        ids = np.array([prompt], np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        result = self.pipeline.generate(inputs, config)
        wall = time.perf_counter() - started
        decode = steps * result.perf_metrics.get_tpot().mean / 1000 if steps else 0.0
        return Generated(wall - decode, list(result.tokens[0]), decode)

    def logits(self, window: list[int]) -> np.ndarray:
        """Of one prefill."""
        if self.request is None:
            model = str(self.path / "openvino_model.xml")
            options = {"INFERENCE_NUM_THREADS": self.threads}
            self.request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
        self.request.reset_state()
        ids = np.array([window], np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(window))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for one in self.request.get_compiled_model().inputs for name in one.names}
        return self.request.infer({name: feeds[name] for name in names})["logits"][0]


if __name__ == "__main__":
    main(OpenVino)
