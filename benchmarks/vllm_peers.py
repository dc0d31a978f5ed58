r"""4 bits in vLLM: ours beside llm-compressor's GPTQ, calibrated on the same windows, with groups of the same size.

    GEMMA_DEPLOY_VLLM=~/vllm/bin/python python benchmarks/vllm_peers.py CHECKPOINT --text wikitext2_valid.txt --out DIR

Ours is the recipe `vllm-int4`; llm-compressor is installed into an environment of its own under DIR and gets the ids of
the recipe's windows. Both are loaded by vLLM with activations in bfloat16, and read as our gate reads: what leaves the
final norm, and what vLLM's head makes of it. Mean KL and top-1 are against transformers in float32; beside them those
of the weights alone, as transformers and compressed-tensors read them, and how far vLLM is from these. `--floats`
adds an artifact of the model in bfloat16, with activations in float32 too, which vLLM's kernel of 4 bits does not take.
What is made already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantization_peers import installed, last_line
from transformers import AutoModelForCausalLM

from gemma_deploy.backends.vllm.source import SHIPPED, STRICT, VllmSource
from gemma_deploy.calibration.pipeline import Request, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.evaluation.models import open_model
from gemma_deploy.evaluation.texts import make_windows as text_windows
from gemma_deploy.evaluation.texts import read_text
from gemma_deploy.parity.cases import Case

ROOT = Path(__file__).resolve().parent.parent
SEQLEN, BLOCK, GROUP = 512, 128, 32
Rows = list[np.ndarray]


def make_ours(checkpoint: Path, dataset: str, out: Path) -> Path:
    """Compile the recipe."""
    artifact = out / "ours"
    if not artifact.exists():
        environment = os.environ | {"GEMMA_CHECKPOINT": str(checkpoint), "CALIB_DATASET": dataset}
        words = [
            sys.executable,
            "-m",
            "gemma_deploy.cli",
            "compile",
            "vllm-int4",
            "--out",
            str(artifact),
            "--no-parity",
        ]
        subprocess.run(words, env=environment, cwd=ROOT, check=True)
    return artifact


def make_peer(checkpoint: Path, dataset: str, out: Path) -> Path:
    """Quantize with llm-compressor.

    Raises:
        SystemExit: it is not installed, or it failed.
    """
    made = out / "llm-compressor"
    if made.exists():
        return made
    python = installed("llmcompressor", out)
    if isinstance(python, str):
        raise SystemExit(f"error: llm-compressor: {python}")
    count = sum(int(part.partition(":")[2]) for part in dataset.split(","))
    ids = out / "ids.json"
    ids.write_text(
        json.dumps(make_windows(Checkpoint.open(checkpoint), Request(dataset, None, count, SEQLEN)).ids.tolist())
    )
    script = ROOT / "benchmarks" / "peers" / "llmcompressor_save.py"
    words = [python, script, checkpoint, ids, made, GROUP]
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=out)
    if run.returncode:
        raise SystemExit(f"error: llm-compressor: {last_line(run.stderr)}")
    return made


class Reference:
    """Transformers in float32."""

    def __init__(self, checkpoint: Path, windows: list[tuple[int, ...]]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32)
        with torch.inference_mode():
            self.rows: Rows = [self.model.model(torch.tensor([one])).last_hidden_state[0].numpy() for one in windows]

    def head(self, rows: np.ndarray) -> np.ndarray:
        """[n, H] -> [n, V]."""
        with torch.inference_mode():
            made: np.ndarray = self.model.lm_head(torch.from_numpy(rows)).numpy()
        return made


def blocks(head: Any, rows: Rows) -> Iterator[torch.Tensor]:
    """Log-probabilities, a block of positions at a time."""
    for window in rows:
        for start in range(0, len(window), BLOCK):
            yield torch.from_numpy(np.array(head(window[start : start + BLOCK]))).log_softmax(-1)


def distance(exact: Iterator[torch.Tensor], other: Iterator[torch.Tensor]) -> dict[str, float]:
    """Mean KL, nats, and the share of positions with the same best token."""
    total, same, count = 0.0, 0, 0
    for a, b in zip(exact, other, strict=True):
        total += float((a.exp() * (a - b)).sum(dtype=torch.float64))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    return {"mean_kl": total / count, "top1": same / count, "positions": count}


def measured(path: Path, dtype: str, reference: Reference, windows: list[tuple[int, ...]]) -> dict[str, Any]:
    """A checkpoint in vLLM, against the reference and against itself as transformers reads it in float32."""
    cases = [Case("text", tuple(windows), ((),) * len(windows))]
    with closing(VllmSource(path, SHIPPED, dtype=dtype, longest=SEQLEN)) as shipped:
        rows = shipped.run(cases)[0]
        found = distance(blocks(reference.head, reference.rows), blocks(shipped.head, rows))
        with closing(VllmSource(path, STRICT, dtype="float32", longest=SEQLEN)) as strict:
            own = strict.run(cases)[0]
            found["to_its_weights"] = distance(blocks(strict.head, own), blocks(shipped.head, rows))["mean_kl"]
            found["weights"] = distance(blocks(reference.head, reference.rows), blocks(strict.head, own))["mean_kl"]
    return found


def main() -> None:
    """Make both, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "gemma_deploy" / "demo" / "heldout.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", default="c4:48,alpaca:4,ceval:12", help="windows of each, of the bundled samples")
    parser.add_argument("--windows", type=int, default=8, help="of the text, 512 tokens each")
    parser.add_argument("--floats", type=Path, help="an artifact of the model in bfloat16, measured as well")
    arguments = parser.parse_args()
    out, checkpoint = arguments.out.resolve(), arguments.checkpoint.resolve()
    out.mkdir(parents=True, exist_ok=True)
    made = [
        ("this tool", "bfloat16", make_ours(checkpoint, arguments.dataset, out)),
        ("llm-compressor", "bfloat16", make_peer(checkpoint, arguments.dataset, out)),
    ]
    if arguments.floats:
        made += [("bfloat16 weights", dtype, arguments.floats) for dtype in ("bfloat16", "float32")]
    text, name = read_text(arguments.text)
    encode, bos = open_model(str(checkpoint)).encoder()
    windows = list(text_windows(text, encode, bos, count=arguments.windows, seqlen=SEQLEN, name=name).ids)
    reference, done = Reference(checkpoint, windows), out / "measured.json"
    results = json.loads(done.read_text()) if done.exists() else {}
    print("| weights, activations | KL to float32 | top-1 | KL of the weights alone | KL to these weights in float32 |")
    print("| --- | --- | --- | --- | --- |")
    for label, dtype, path in made:
        row = f"{label}, {dtype}"
        if row not in results:
            results[row] = measured(path, dtype, reference, windows)
            done.write_text(json.dumps(results, indent=1))
        one = results[row]
        figures = (
            f"{one['mean_kl']:.5f} | {100 * one['top1']:.2f} % | {one['weights']:.5f} | {one['to_its_weights']:.2g}"
        )
        print(f"| {row} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
