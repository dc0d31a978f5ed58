"""Quantize with GPTQModel, in its own environment: CHECKPOINT IDS.json OUT.safetensors BITS GROUPSIZE.

OUT gets the linears as float32 [out, in], what their codes and scales stand for; the last line printed is JSON.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

started = time.perf_counter()
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader wants two, and gives half of the cores by default

import torch  # noqa: E402
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main() -> None:
    """Quantize, report, and write what came out."""
    checkpoint, ids, out, bits, group = sys.argv[1:4] + [int(value) for value in sys.argv[4:]]
    windows = json.loads(Path(ids).read_text())
    config = QuantizeConfig(bits=bits, group_size=group, sym=True, desc_act=True, act_group_aware=False)
    model = GPTQModel.load(checkpoint, config, device="cpu")
    model.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows], batch_size=1)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        tensors = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name.endswith(".qweight"):
                        module = name.removesuffix(".qweight")
                        parts = [opened.get_tensor(f"{module}.{part}") for part in ("qweight", "scales", "g_idx")]
                        tensors[f"{module}.weight"] = dequantized(*parts, bits).contiguous()
    save_file(tensors, out)
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def dequantized(packed: torch.Tensor, scales: torch.Tensor, group: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [in / (32 / bits), out], float [groups, out], [in] -> float32 [out, in]; symmetric codes."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)
    codes = codes.reshape(-1, packed.shape[1]) - (1 << (bits - 1))
    return (codes.float() * scales.float()[group.long()]).T


if __name__ == "__main__":
    main()
