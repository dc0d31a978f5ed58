"""What a recipe may say about a file for llama.cpp, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_deploy.architectures import ROWS
from gemma_deploy.backends.spec import BuildSpec, Options
from gemma_deploy.dtypes import BLOCK

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

TABLE = f"int8_g{BLOCK}"


class GgufOptions(Options):
    """`backend.compile` of a recipe: there are no keys yet."""


def contradictions(spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with blocks of 32 codes and a scale."""
    if not spec.scheme.codes:
        return
    if spec.groupsize not in (None, BLOCK):
        yield (
            ("frontend", "quantize", "calib_args", "groupsize"),
            f"{spec.groupsize}: blocks of llama.cpp have {BLOCK} codes and a scale: write {BLOCK}, or remove the key",
        )
    if spec.table not in (None, TABLE, "fp16"):
        yield (
            ("frontend", "quantize", "table"),
            f"{spec.table}: blocks of llama.cpp have {BLOCK} codes and a scale: write {TABLE} or fp16, or remove it",
        )


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if spec.ranks > 1 or spec.split_points:
        yield "split.points and model_kwargs.tp: llama.cpp divides a file when it loads it: remove them"
    if spec.scheme.int8_cache:
        yield (
            f"frontend.quantize.type: {spec.scheme}: llama.cpp rounds its cache itself, -ctk q8_0 -ctv q8_0 of "
            "llama-server: remove +kv8"
        )
    if spec.scheme.rounds_activations:
        yield (
            f"frontend.quantize.type: {spec.scheme}: llama.cpp rounds activations in its own way with any codes: write "
            "w8a16_gptq"
        )
    if spec.adapter_rank is not None:
        yield "adapters: llama.cpp loads LoRA adapters of its own form: remove the section"
    if spec.embed_scale != "exact":
        yield f"model_kwargs.embed_scale: {spec.embed_scale}: llama.cpp has the exact one: remove the key"


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """Of a model that is not built, or that metadata cannot say, sentences that begin with the key."""
    from gemma_deploy.backends.gguf.metadata import differences

    row = config.architecture
    if row.gguf is None or not row.gguf.written:
        names = [one.name for one in ROWS if one.gguf is not None and one.gguf.written]
        return [f"backend.type: gguf is not built for {row.name}: it is for {', '.join(names)}"]
    problems = [f"backend.type: gguf: {one}" for one in differences(config)]
    more = {"experts": "experts", "per_layer": "per-layer vectors"}
    for part, name in more.items():
        if spec.scheme.codes and any(getattr(layer, part) is not None for layer in config.layers):
            problems.append(f"backend.type: gguf: a model with {name} is not built in codes: set backend.dtype: bf16")
    if not config.tie_word_embeddings and not row.gguf.with_head:
        problems.append(f"backend.type: gguf: llama.cpp reads no LM head beside the token table of a {row.name}")
    return problems
