"""The run times: static artifacts on ONNX Runtime, those of one graph in onnxruntime-genai. Imports no torch."""

from gemma_deploy.runtime.genai import GenaiModel, GenaiSession
from gemma_deploy.runtime.runner import StaticRunner
from gemma_deploy.runtime.sampling import Sampler, Sampling
from gemma_deploy.runtime.session import open_session
from gemma_deploy.runtime.tokenizer import Tokenizer

__all__ = ["GenaiModel", "GenaiSession", "Sampler", "Sampling", "StaticRunner", "Tokenizer", "open_session"]
