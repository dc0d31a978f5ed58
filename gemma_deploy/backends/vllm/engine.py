"""How checkpoints for vLLM are run: in the Python that has vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_deploy.backends.asked import AskedEngine
from gemma_deploy.backends.vllm.gates import unfit_for_this_machine
from gemma_deploy.backends.vllm.source import ENGINE, SHIPPED, STRICT, VllmSource, dtype_of
from gemma_deploy.errors import UsageError

if TYPE_CHECKING:
    from gemma_deploy.parity.sources import LogitSource


class VllmEngine(AskedEngine):
    """A checkpoint in vLLM."""

    runtime, program = SHIPPED, ENGINE
    kernel_names: Sequence[str] = (SHIPPED, STRICT)

    def arguments(self) -> Sequence[str]:
        """See `AskedEngine`."""
        context = self.manifest.contract.context
        return ("steps", str(self.path.resolve()), dtype_of(self.manifest.scheme), str(context))

    def check_runtime(self) -> None:
        """See `Engine`.

        Raises:
            UsageError: there is no vLLM, or no kernel in it for such codes.
        """
        unfit = unfit_for_this_machine(self.manifest)
        if unfit is not None:
            raise UsageError(
                f"vLLM does not run it here: {unfit}",
                where=str(self.path),
                next_step=f"gemma-deploy serve-command {self.path}, for a machine with GPUs; or compile it with "
                "frontend.quantize.type w8a8 or w4a16_gptq",
            )
        super().check_runtime()

    def source(self, kernels: str | None = None, adapter: str | None = None) -> LogitSource:
        """See `Engine`; `strict` is what transformers makes of it in float32."""
        longest = self.manifest.contract.context
        if kernels == STRICT:
            self.program.python()
            return VllmSource(self.path, STRICT, dtype="float32", longest=longest)
        self.check_runtime()
        return VllmSource(self.path, SHIPPED, dtype=dtype_of(self.manifest.scheme), longest=longest)
