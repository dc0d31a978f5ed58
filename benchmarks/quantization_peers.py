r"""Calibrated quantizers beside ours, on one checkpoint, one calibration text, the same bits and the same machine.

    python benchmarks/quantization_peers.py CHECKPOINT --calibration c4.json --text wikitext2_valid.txt --out DIR \
        --bits 8 --groupsize -1

Every peer is installed into an environment of its own under DIR and run as its documentation says, one after the other;
ours is `gemma-deploy compile`, whose quantize stage counts with all that its process took before. The token table stays
as it is for everybody. What each gives is read back as float32 weights of the linears and put into transformers' class:
mean KL and top-1 against the unquantized model over 16 windows of 512 tokens, BOS in front. Load average is
of the minute before each run: a busy machine makes times incomparable. A peer that cannot be installed or run has its
last line in the table instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.calibration.pipeline import Request, make_windows
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.evaluation.models import open_model
from gemma_deploy.evaluation.texts import make_windows as text_windows
from gemma_deploy.evaluation.texts import read_text

ROOT = Path(__file__).resolve().parent.parent
# What pip installs.
PEERS = {"gptqmodel": ["gptqmodel"], "llmcompressor": ["llmcompressor"], "autoround": ["auto-round"]}
WINDOWS, SEQLEN, BLOCK = 16, 512, 128
Weights = Callable[[str], torch.Tensor | None]


def installed(name: str, out: Path) -> Path | str:
    """The interpreter of a peer's environment, or why there is none. torch comes first: it is pinned, without CUDA."""
    python = out / f"venv-{name}" / "bin" / "python"
    if (out / f"venv-{name}" / "installed").exists():
        return python
    constraints = ["-c", str(ROOT / "constraints.txt")]
    torch_pin = out / "torch.txt"
    torch_pin.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    steps = [
        [sys.executable, "-m", "venv", str(out / f"venv-{name}")],
        [str(python), "-m", "pip", "install", "-q", *constraints, "torch", "setuptools", "wheel", "ninja", "numpy"],
        [str(python), "-m", "pip", "install", "-q", "--no-build-isolation", "-c", str(torch_pin), *PEERS[name]],
    ]
    for step in steps:
        run = subprocess.run(
            step, env={**os.environ, "BUILD_CUDA_EXT": "0"}, capture_output=True, text=True, check=False
        )
        if run.returncode:
            return f"not installed: {last_line(run.stderr)}"
    (out / f"venv-{name}" / "installed").touch()
    return python


def run_peer(name: str, out: Path, checkpoint: Path, ids: Path, bits: int, groupsize: int) -> dict[str, Any]:
    """Quantize with a peer: seconds and peak_mib of its process, and the file of its weights."""
    python, load = installed(name, out), os.getloadavg()[0]
    if isinstance(python, str):
        return {"problem": python}
    file = out / f"{name}-{bits}-{groupsize}.safetensors"
    script = ROOT / "benchmarks" / "peers" / f"{name}_run.py"
    command = [python, script, checkpoint, ids, file, bits, groupsize]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=out)
    if run.returncode:
        return {"problem": last_line(run.stderr)}
    return {**json.loads(last_line(run.stdout)), "load": load, "file": str(file)}


def run_ours(out: Path, checkpoint: Path, calibration: Path, windows: int, bits: int, groupsize: int) -> dict[str, Any]:
    """Compile: seconds of check and quantize stages, and the process's peak at the end of the latter."""
    kind, load = "w8a16_gptq" if bits == 8 else "w4a16_gptq", os.getloadavg()[0]
    artifact = out / f"ours-{bits}-{groupsize}"
    recipe = out / "recipe.yaml"
    recipe.write_text(
        f"name: ours\nfrontend:\n  checkpoint: {checkpoint}\n  shape: {{input_ids: [[512], [1024]]}}\n  quantize:\n"
        f"    type: {kind}\n    table: fp16\n    calib_args: {{groupsize: {groupsize}, sensitivity: false}}\n"
        f"dataset: {{name: 'c4:{windows}', path: 'c4={calibration}', seqlen: {SEQLEN}}}\nbackend: {{dtype: int8}}\n"
    )
    command = [sys.executable, "-m", "gemma_deploy.cli", "compile", recipe, "--out", artifact, "--no-parity", "--force"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
    if run.returncode:
        return {"problem": last_line(run.stderr)}
    stages = {stage.name: stage for stage in Artifact.open(artifact).manifest.stages}
    seconds = sum(stages[name].seconds for name in ("check", "quantize"))
    peak = stages["quantize"].peak_rss_bytes >> 20
    return {"seconds": seconds, "peak_mib": peak, "load": load, "artifact": str(artifact)}


def last_line(text: str) -> str:
    """Of what a process printed."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "ended without a word")


def weights_of(result: dict[str, Any], checkpoint: Checkpoint) -> Weights:
    """Linears, and of ours the norms that absorbed factors, as float32 by name; None for what is unchanged."""
    if "artifact" in result:
        artifact = Artifact.open(Path(result["artifact"]))
        stored = ArtifactWeights(checkpoint.config, artifact.path, artifact.manifest)

        def ours(name: str) -> torch.Tensor | None:
            inside = name.startswith("model.layers.") and name in stored.tensors
            return torch.from_numpy(stored.rows(name, 0, stored.tensors[name].shape[0])) if inside else None

        return ours

    def peers(name: str) -> torch.Tensor | None:
        with safe_open(result["file"], "pt") as opened:
            return opened.get_tensor(name) if name in opened.keys() else None  # noqa: SIM118

    return peers


@torch.inference_mode()
def distance(path: Path, weights: Weights, windows: list[tuple[int, ...]]) -> dict[str, float]:
    """Mean KL and top-1 agreement of the model with these weights against the model without them."""
    exact, changed = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32) for _ in range(2)
    )
    replaced = 0
    for name, parameter in changed.named_parameters():
        found = weights(name)
        if found is not None:
            parameter.data, replaced = found, replaced + name.endswith("_proj.weight")
    if replaced != 7 * exact.config.num_hidden_layers:
        raise ValueError(f"{replaced} linears were quantized, {7 * exact.config.num_hidden_layers} expected")
    total = same = count = 0.0
    for window in windows:
        ids = torch.tensor([window])
        hidden = [model.model(ids).last_hidden_state[0] for model in (exact, changed)]
        for start in range(0, len(window), BLOCK):
            a, b = (exact.lm_head(rows[start : start + BLOCK]).log_softmax(-1) for rows in hidden)
            total += float((a.exp() * (a - b)).sum(dtype=torch.float64))
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            count += len(a)
    return {"mean_kl": total / count, "top1": same / count}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| quantizer | mean KL | top-1 | seconds | peak RSS, MiB | load |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in results.items():
        figures = (
            f"{one['mean_kl']:.5f} | {100 * one['top1']:.2f} % | {one['seconds']:.0f} | {one['peak_mib']} | "
            f"{one['load']:.1f}"
            if "problem" not in one
            else f"{one['problem']} | | | |"
        )
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    parser.add_argument("--groupsize", type=int, default=-1)
    parser.add_argument("--windows", type=int, default=64, help="of calibration, 512 tokens each")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, calibration = Checkpoint.open(arguments.checkpoint), arguments.calibration.resolve()
    request = Request(f"c4:{arguments.windows}", f"c4={calibration}", arguments.windows, SEQLEN)
    ids = out / "ids.json"
    ids.write_text(json.dumps(make_windows(checkpoint, request).ids.tolist()))
    text, name = read_text(arguments.text)
    encode, bos = open_model(str(arguments.checkpoint)).encoder()
    windows = list(text_windows(text, encode, bos, count=WINDOWS, seqlen=SEQLEN, name=name).ids)
    bits, group, path = arguments.bits, arguments.groupsize, arguments.checkpoint.resolve()
    results = {"gemma-deploy": run_ours(out, path, calibration, arguments.windows, bits, group)}
    for peer in arguments.peers:
        results[peer] = run_peer(peer, out, path, ids, bits, group)
    for one in results.values():
        if "problem" not in one:
            one.update(distance(path, weights_of(one, checkpoint), windows))
    (out / f"peers-{bits}-{group}.json").write_text(json.dumps(results, indent=1))
    (out / f"peers-{bits}-{group}.md").write_text(table(results))
    print(table(results), end="")


if __name__ == "__main__":
    main()
