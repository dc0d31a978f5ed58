"""What a recipe may say about a checkpoint for vLLM, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_deploy.architectures import ROWS
from gemma_deploy.backends.spec import BuildSpec, Options

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

# Linears that vLLM keeps in one matrix, which has one form of codes.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class VllmOptions(Options):
    """`backend.compile` of a recipe: there are no keys yet."""


def contradictions(spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the form of codes means together with what vLLM keeps in one matrix."""
    if not spec.scheme.codes:
        return
    kept = spec.storage(0).kept_w8
    for fused in FUSED:
        if 0 < sum(kind in kept for kind in fused) < len(fused):
            yield (
                ("frontend", "quantize", "calib_args", "keep_w8"),
                f"vLLM keeps {', '.join(fused)} in one matrix with one form of codes: name all of them, or none",
            )
    if spec.table not in (None, "fp16"):
        yield (
            ("frontend", "quantize", "table"),
            f"{spec.table}: vLLM has no codes of a token table: write fp16, which keeps the checkpoint's bfloat16, or "
            "remove the key",
        )


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if spec.ranks > 1 or spec.split_points:
        yield (
            "split.points and model_kwargs.tp: vLLM divides a checkpoint when it loads it: remove them, and see "
            "gemma-deploy serve-command --help"
        )
    if spec.scheme.int8_cache:
        yield f"frontend.quantize.type: {spec.scheme}: scales of a cache are not built for vllm: remove +kv8"
    if spec.scheme.weights == "fp16":
        yield "backend.dtype: fp16 is not built for vllm, where Gemma's activations overflow: write bf16 or fp32"
    if spec.adapter_rank is not None:
        yield "adapters: vLLM loads LoRA adapters of PEFT itself: remove the section, and serve with --enable-lora"


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """Of a model that is not built, sentences that begin with the key."""
    if config.architecture.vllm:
        return []
    names = [row.name for row in ROWS if row.vllm]
    return [f"backend.type: vllm is not built for {config.architecture.name}: it is for {', '.join(names)}"]
