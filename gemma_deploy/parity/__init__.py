"""Proof that an artifact computes the model: compare sources, judge, and name the first layer that differs."""

from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.prove import run_parity

__all__ = ["ParityResult", "run_parity"]
