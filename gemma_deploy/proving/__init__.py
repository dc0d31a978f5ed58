"""Proof that an artifact computes the model, and comparisons of any two: what `compile` and `parity` run."""

from gemma_deploy.proving.prove import run_parity

__all__ = ["run_parity"]
