"""What `gemma-deploy plan` predicts against `gemma-deploy bench`, of artifacts on this machine.

    gemma-deploy plan --measure here.yaml
    python benchmarks/plan_speed.py here.yaml ARTIFACT:PROMPT [ARTIFACT:PROMPT ...] --json result.json

Each artifact must be of one of the plan's precisions, and its checkpoint where it was. `bench` measures a prompt of
PROMPT tokens, steps behind 128 tokens (the static pair's behind its whole prompt), and the peak of a cold process; a
plan for the same is made with the rates of the device file. A line is marked where it is off by more than a quarter.
Nothing else may run: on a machine that does other work every figure of `bench` is too low.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.planning import PRECISIONS
from gemma_deploy.planning.choices import Choice, Wanted, open_choice
from gemma_deploy.planning.device import Device
from gemma_deploy.planning.sizes import sizes_of
from gemma_deploy.planning.speeds import speed_of

LIMIT = 0.25
BEHIND, STEPS = 128, 32


def precision_of(artifact: Artifact) -> str:
    """The plan's word for what an artifact is."""
    scheme = str(artifact.manifest.scheme)
    if scheme not in PRECISIONS:
        sys.exit(f"{artifact.path}: {scheme} is none of {', '.join(PRECISIONS)}")
    return scheme


def predicted(artifact: Artifact, device: Device, prompt: int) -> tuple[float, float, int]:
    """Tokens a second of a prompt, of steps where `bench` takes them, and bytes."""
    checkpoint = Checkpoint.open(Path(artifact.manifest.recipe.frontend.checkpoint))
    contract = artifact.manifest.contract
    choice = Choice(artifact.manifest.recipe.backend.type, precision_of(artifact))
    job = open_choice(checkpoint, choice, Wanted(contract.prefill, contract.context, 1))
    if isinstance(job, str):
        sys.exit(f"{artifact.path}: {job}")
    whole = choice.backend == "tvm_vacc"
    steps = Wanted(prompt, contract.context, 1) if whole else Wanted(BEHIND, BEHIND + STEPS, 1)
    of_prompt = speed_of(job, choice, Wanted(prompt, contract.context, 1), device=device)
    of_steps = speed_of(job, choice, steps, device=device)
    if of_prompt.prefill_tok_s is None or of_steps.decode_tok_s is None:
        sys.exit(f"{device.name}: a rate is null")
    held = sizes_of(job, choice, Wanted(prompt, contract.context, 1), kind=device.kind).total
    return of_prompt.prefill_tok_s, of_steps.decode_tok_s, held


def measured(artifact: Path, prompt: int) -> dict[str, Any]:
    """What `bench` says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "gemma_deploy.cli", "bench", str(artifact), "--contexts", "none"]
        command += ["--prompt-tokens", str(prompt), "--decode-tokens", str(STEPS), "--repeat", "3", "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Print a line for each; 1 where any is off by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", type=Path)
    parser.add_argument("artifact", nargs="+", metavar="ARTIFACT:PROMPT")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = Device.load(str(arguments.device))
    lines = []
    for one in arguments.artifact:
        path, _, prompt = one.rpartition(":")
        artifact = Artifact.open(Path(path))
        said, found = predicted(artifact, device, int(prompt)), measured(artifact.path, int(prompt))
        seen = (found["prefill_tok_s"], found["decode_tok_s"], found["peak_rss_bytes"])
        off = [guess / value - 1 for guess, value in zip(said, seen, strict=True)]
        line = {"artifact": artifact.manifest.name, "prompt": int(prompt), "bandwidth": found["bandwidth_bytes_s"]}
        for what, guess, value, by in zip(("prefill", "decode", "bytes"), said, seen, off, strict=True):
            line[what] = {"predicted": guess, "measured": value, "off": by}
        lines.append(line)
        mark = "  OVER" if any(abs(by) > LIMIT for by in off) else ""
        words = [f"{guess:.4g} {value:.4g} ({by:+.0%})" for guess, value, by in zip(said, seen, off, strict=True)]
        print(f"{artifact.manifest.name} {prompt}: prefill {words[0]}, decode {words[1]}, bytes {words[2]}{mark}")
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=2), encoding="utf-8")
    return int(any(abs(line[what]["off"]) > LIMIT for line in lines for what in ("prefill", "decode", "bytes")))


if __name__ == "__main__":
    sys.exit(main())
