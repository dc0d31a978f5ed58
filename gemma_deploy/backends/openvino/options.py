"""What a recipe may say about a model for OpenVINO, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from gemma_deploy.architectures import ROWS
from gemma_deploy.backends.spec import BuildSpec, Options

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

Cache = Literal["f32", "f16", "u8"]
CACHE: Cache = "f16"
INPUT_GROUP = 32  # inputs of a product that share a scale where they are rounded


class OpenVinoOptions(Options):
    """`backend.compile` of a recipe; what is not given, or null, is chosen.

    Args:
        cache: what keys and values are kept as.
        round_inputs: round the inputs of products with codes to 8 bits, as OpenVINO does unless it is told not to.
    """

    cache: Cache | None = None
    round_inputs: bool | None = None


def runtime_options(spec: BuildSpec) -> dict[str, object]:
    """What the model tells OpenVINO, which whoever compiles it may say otherwise."""
    given = spec.options
    assert isinstance(given, OpenVinoOptions)
    return {
        "ACTIVATIONS_SCALE_FACTOR": 8.0,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": INPUT_GROUP if given.round_inputs else 0,
        "KV_CACHE_PRECISION": given.cache or CACHE,
    }


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if spec.ranks > 1 or spec.split_points:
        yield "split.points and model_kwargs.tp: an artifact of backend.type openvino is not divided: remove them"
    if spec.scheme.int8_cache:
        yield (
            f"frontend.quantize.type: {spec.scheme}: OpenVINO rounds its cache itself: remove +kv8, and set "
            "backend.compile.cache: u8"
        )
    if spec.scheme.rounds_activations:
        yield (
            f"frontend.quantize.type: {spec.scheme}: OpenVINO rounds activations in its own way with any codes: write "
            "w8a16_gptq, and backend.compile.round_inputs: true"
        )
    if spec.adapter_rank is not None:
        yield "adapters: loading them into OpenVINO is not built: remove the section, and merge with frontend.adapter"


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """Of a model that is not built, sentences that begin with the key."""
    if config.architecture.openvino:
        return []
    names = [row.name for row in ROWS if row.openvino]
    return [f"backend.type: openvino is not built for {config.architecture.name}: it is for {', '.join(names)}"]
