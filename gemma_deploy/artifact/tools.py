"""Versions of this program and of the libraries that an artifact depends on, for its manifest."""

from __future__ import annotations

from gemma_deploy.provenance import version_of

# Whose versions decide what a graph looks like or how weights are rounded.
TOOLS = ("gemma-deploy", "torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime")


def tool_versions() -> dict[str, str]:
    """Versions of this program and of the libraries an artifact depends on."""
    return {tool: version_of(tool) for tool in TOOLS}
