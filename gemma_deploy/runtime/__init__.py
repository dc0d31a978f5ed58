"""What all runtimes share: sessions of ONNX Runtime, sampling, the tokenizer, the loop that makes text. No torch."""

from gemma_deploy.runtime.sampling import Sampler, Sampling
from gemma_deploy.text import Tokenizer

__all__ = ["Sampler", "Sampling", "Tokenizer"]
