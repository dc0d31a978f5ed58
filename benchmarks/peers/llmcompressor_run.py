"""Quantize with llm-compressor, in its own environment: CHECKPOINT IDS.json OUT.safetensors BITS GROUPSIZE.

OUT gets the linears as float32 [out, in], what their codes and scales stand for; the last line printed is JSON.
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
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main() -> None:
    """Quantize, report, and write what came out."""
    checkpoint, ids, out, bits, group = sys.argv[1:4] + [int(value) for value in sys.argv[4:]]
    windows = json.loads(Path(ids).read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    whole = group == -1
    form = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="channel" if whole else "group",
        group_size=None if whole else group,
    )  # fmt: skip
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
    state = model.state_dict()
    tensors = {name: on_grid(state[name], state[f"{name}_scale"]) for name in state if f"{name}_scale" in state}
    save_file(tensors, out)
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def on_grid(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[out, in], [out, groups] -> the codes next to the weights, times their scales."""
    grouped = weight.float().reshape(*scale.shape, -1)
    scale = scale.float()[..., None]
    return ((grouped / scale).round() * scale).reshape(weight.shape).contiguous()


if __name__ == "__main__":
    main()
