"""This tool as one more row: how it is compiled and run, both in one place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peer_runtimes.environments import python_of
from peer_runtimes.variants import HERE, Command

NAME = "gemma-deploy"


def compile_ours(recipe: Path, checkpoint: Path, out: Path) -> Command:
    """The conversion, proofs left out as peers have none."""
    program = [sys.executable, "-m", "gemma_deploy.cli", "compile", str(recipe)]
    return [*program, "--checkpoint", str(checkpoint), "--out", str(out), "--no-parity", "--force"]


def run_ours(artifact: Path, out: Path, options: Command) -> Command:
    """A run: in our library, or in onnxruntime-genai as released, by the runner that the builder's models have too.

    Args:
        options: of protocol.py, the ids first.
    """
    if json.loads((artifact / "manifest.json").read_text())["recipe"]["backend"]["type"] == "native":
        return [sys.executable, str(HERE / "native_run.py"), str(artifact), *options]
    return [str(python_of("genai", out)), str(HERE / "genai_run.py"), str(artifact), *options]
