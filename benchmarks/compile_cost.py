"""Peak memory and wall time of `compile`, beside what reading the checkpoint once and writing the artifact once cost.

usage: compile_cost.py CHECKPOINT DTYPE [--out DIR] [--shape P C] [--no-io] [-s KEY=VALUE]...

Runs `gemma-deploy compile --no-parity` in a process of its own and prints a table line and a JSON line. The limit for
int8 is 3 x (read + write), all three measured in this run, page cache dropped from the checkpoint before each read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 8 << 20


def drop(path: Path) -> None:
    """Forget a file's cached pages."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_once(files: list[Path]) -> float:
    """Seconds to read the files front to back."""
    buffer, started = bytearray(BLOCK), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - started


def write_once(folder: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes that are no zeros."""
    block, path = os.urandom(BLOCK), folder / "write.tmp"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as f:
        for offset in range(0, size, BLOCK):
            f.write(block[: min(BLOCK, size - offset)])
        os.fsync(f.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dtype", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--no-io", action="store_true", help="skip the read and write yardsticks")
    parser.add_argument("-s", dest="settings", action="append", default=[], help="as of compile")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp(prefix="compile-cost-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    p, c = args.shape
    recipe.write_text(
        f"name: cost-{args.dtype}\nfrontend: {{checkpoint: {args.checkpoint}, shape: {{input_ids: [[{p}], [{c}]]}}}}\n"
        f"backend: {{dtype: {args.dtype}}}\nworkspace: {{path: {folder}}}\n"
    )
    files = sorted(args.checkpoint.glob("*.safetensors"))
    result: dict[str, float | str] = {"checkpoint": args.checkpoint.name, "dtype": args.dtype}
    if not args.no_io:
        for file in files:
            drop(file)
        result["read_s"] = read_once(files)
        for file in files:
            drop(file)
    command = [sys.executable, "-m", "gemma_deploy.cli", "compile", str(recipe), "--no-parity", "--force"]
    command += [word for setting in args.settings for word in ("-s", setting)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    result["compile_s"] = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["cpu_s"] = used.ru_utime + used.ru_stime
    result["peak_rss_mib"] = used.ru_maxrss / 1024
    artifact = folder / f"cost-{args.dtype}"
    size = sum(file.stat().st_size for file in artifact.iterdir())
    result["artifact_mb"] = size / 1e6
    for stage in json.loads((artifact / "manifest.json").read_text())["stages"]:
        result[f"{stage['name']}_s"] = stage["seconds"]
    if not args.no_io:
        result["write_s"] = write_once(folder, size)
        result["ratio"] = float(result["compile_s"]) / (float(result["read_s"]) + float(result["write_s"]))
    rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in result.items()}
    print(" | ".join(f"{key} {value}" for key, value in rounded.items()))
    print("RESULT " + json.dumps(rounded))


if __name__ == "__main__":
    main()
