"""The reference run time: static artifacts on ONNX Runtime. Imports no torch."""

from gemma_deploy.runtime.runner import StaticRunner
from gemma_deploy.runtime.sampling import Sampler
from gemma_deploy.runtime.session import open_session
from gemma_deploy.runtime.tokenizer import Tokenizer

__all__ = ["Sampler", "StaticRunner", "Tokenizer", "open_session"]
