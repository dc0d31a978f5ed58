"""This tool as one more row: how it is compiled and run, both in one place."""

from __future__ import annotations

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
    """A run: the artifact in onnxruntime-genai as released, by the runner that the builder's models have too.

    Args:
        options: of protocol.py, the ids first.
    """
    return [str(python_of("genai", out)), str(HERE / "genai_run.py"), str(artifact), *options]
