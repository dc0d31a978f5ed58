"""Memory and time of `gemma-deploy merge`, beside reading and writing the same bytes once, and peft's own merge.

usage: merge.py CHECKPOINT [--rank 32] [--repeats 3] [--peft] [--folder DIR]

Makes a random LoRA on the seven linears of every layer. Every run is a process of its own, with the checkpoint's files
out of the page cache; what is written is synced. The least of the repeats counts for time, the largest for memory.
`read + write` reads every byte of the checkpoint and writes as many, 8 MiB at a time. Exit 1 where merge takes more
than 0.6 GiB, or more than 1.5 times `read + write`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GIB = 1 << 30
BLOCK = 8 << 20
MOST_BYTES, MOST_TIMES = 0.6 * GIB, 1.5
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What children do.
COPY = """
import os, sys
block = bytearray({block})
with open(sys.argv[-1], "wb", buffering=0) as out:
    for name in sys.argv[1:-1]:
        with open(name, "rb", buffering=0) as file:
            while count := file.readinto(block):
                out.write(memoryview(block)[:count])
    os.fsync(out.fileno())
"""
MERGE = """
import sys
from gemma_deploy import merge
merge(*sys.argv[1:])
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def write_adapter(checkpoint: Path, out: Path, rank: int) -> int:
    """A random LoRA on the seven linears, as peft names it; its bytes."""
    from safetensors.numpy import save_file

    from gemma_deploy.checkpoint import Checkpoint

    rng = np.random.default_rng(0)
    tensors = {}
    for name, info in Checkpoint.open(checkpoint).tensors.items():
        if name.removesuffix(".weight").endswith(LINEARS):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = info.shape
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, columns), np.float32) / columns**0.5
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank), np.float32) * 0.02
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": list(LINEARS), "base_model_name_or_path": checkpoint.name}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in out.iterdir())


def drop(files: list[Path]) -> None:
    """Take files out of the page cache."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(code: str, words: list[str], out: Path, files: list[Path]) -> tuple[float, int]:
    """Seconds and peak bytes of a child, to the moment when all it wrote is on the disk."""
    drop(files)
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", code, *words])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    if child.returncode:
        raise SystemExit(f"a child ended with {child.returncode}")
    return seconds, usage.ru_maxrss << 10


def main() -> None:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="peft's merge_and_unload too; holds the model about twice")
    parser.add_argument("--folder", type=Path, help="where to write; needs room for the model twice")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        folder = Path(scratch)
        size = write_adapter(asked.checkpoint, folder / "adapter", asked.rank)
        files = sorted(asked.checkpoint.glob("*.safetensors"))
        copy, out = folder / "copy", folder / "out"
        both = [str(asked.checkpoint), str(folder / "adapter"), str(out)]
        ways = {
            "read + write": (COPY.format(block=BLOCK), [*map(str, files), str(copy)], copy),
            "merge": (MERGE, both, out),
            **({"peft merge_and_unload": (PEFT, both, out)} if asked.peft else {}),
        }
        found: dict[str, tuple[float, int]] = {}
        for name, (code, words, made) in ways.items():
            count = 1 if name.startswith("peft") else asked.repeats
            runs = [run(code, words, made, files) for _ in range(count)]
            found[name] = min(seconds for seconds, _ in runs), max(peak for _, peak in runs)
            print(f"{name:<24}{found[name][0]:8.1f} s   peak {found[name][1] / GIB:6.2f} GiB", flush=True)
    weights = sum(file.stat().st_size for file in files)
    times = found["merge"][0] / found["read + write"][0]
    print(f"{weights / GIB:.2f} GiB of weights, adapter {size / GIB:.3f} GiB; merge is {times:.2f} x read + write")
    print(json.dumps({"weights": weights, "rank": asked.rank, "times": times, "found": found}))
    if times > MOST_TIMES or found["merge"][1] > MOST_BYTES:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
