"""Quantize with llm-compressor's GPTQ, in its own environment: CHECKPOINT IDS.json OUT GROUPSIZE.

OUT is a checkpoint in compressed-tensors form, W4A16 with groups of so many; the last line printed is JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

started = time.perf_counter()

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    """Quantize, write, and report."""
    checkpoint, ids, out, group = *sys.argv[1:4], int(sys.argv[4])
    windows = json.loads(Path(ids).read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    form = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=form)
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    model.to(torch.bfloat16).save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
