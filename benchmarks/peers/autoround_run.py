"""Quantize with auto-round, in its own environment: CHECKPOINT IDS.json OUT.safetensors BITS GROUPSIZE.

Its defaults, tuning with 200 steps of 8 windows in bfloat16, without torch.compile. OUT gets the linears as float32
[out, in], what their codes and scales stand for; the last line printed is JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

started = time.perf_counter()

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main() -> None:
    """Quantize, report, and write what came out."""
    checkpoint, ids, out, bits, group = sys.argv[1:4] + [int(value) for value in sys.argv[4:]]
    windows = json.loads(Path(ids).read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(checkpoint),
        bits=bits,
        group_size=group,
        sym=True,
        iters=200,
        dataset=[torch.tensor([window]) for window in windows],
        nsamples=len(windows),
        seqlen=len(windows[0]),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    found, _ = rounding.quantize()
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    state = found.state_dict()
    tensors = {
        name: value.float().contiguous() for name, value in state.items() if name.endswith("_proj.weight")
    }  # rounded in place: the weights are what the codes stand for
    save_file(tensors, out)
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
