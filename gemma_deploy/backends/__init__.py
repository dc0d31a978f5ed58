"""What a target wants. `BACKENDS`: `backend.type` of a recipe -> who writes graphs and files for it."""

from collections.abc import Mapping

from gemma_deploy.backends.ort.target import OnnxRuntime
from gemma_deploy.backends.static import StaticPair
from gemma_deploy.backends.target import PARAMS, Backend, Job, backend_of

BACKENDS: Mapping[str, Backend] = {"tvm_vacc": StaticPair(), "onnxruntime": OnnxRuntime()}

__all__ = ["BACKENDS", "PARAMS", "Backend", "Job", "backend_of"]
