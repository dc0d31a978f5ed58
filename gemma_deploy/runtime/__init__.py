"""What all runtimes share: sessions of ONNX Runtime, sampling, the tokenizer, the loop that makes text. No torch."""

from typing import TYPE_CHECKING

from gemma_deploy.offering import offering

if TYPE_CHECKING:
    from gemma_deploy.runtime.sampling import Sampler, Sampling
    from gemma_deploy.text import Tokenizer

__all__ = ["Sampler", "Sampling", "Tokenizer"]
__getattr__ = offering(
    __name__,
    {
        "Sampler": "gemma_deploy.runtime.sampling",
        "Sampling": "gemma_deploy.runtime.sampling",
        "Tokenizer": "gemma_deploy.text.tokenizer",
    },
)
