"""How files for llama.cpp are run: in the Python that has llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_deploy.backends.asked import AskedEngine
from gemma_deploy.backends.gguf.gates import STRICT
from gemma_deploy.backends.gguf.source import ENGINE, LLAMA, LlamaSource
from gemma_deploy.names import GGUF

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource

SHIPPED = "shipped"


class LlamaEngine(AskedEngine):
    """A file in llama.cpp."""

    runtime, program = LLAMA, ENGINE
    kernel_names: Sequence[str] = (SHIPPED, STRICT)

    def arguments(self) -> Sequence[str]:
        """See `AskedEngine`."""
        return (str((self.path / GGUF).resolve()), str(self.threads))

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`; `strict` is the file as this program reads it, in float32."""
        if kernels != STRICT:
            self.check_runtime()
            return LlamaSource(self.path / GGUF, threads=self.threads)
        from gemma_deploy.backends.gguf.proof import strict_source

        return strict_source(self.path / GGUF, self.manifest)
