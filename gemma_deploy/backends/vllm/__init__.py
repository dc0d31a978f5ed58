"""Checkpoints in compressed-tensors form, which vLLM loads."""
