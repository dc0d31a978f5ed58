"""What a recipe may say about the graph, and which kernels follow from it and from what calibration kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from gemma_deploy.backends.spec import BuildSpec, Options

MODEL = "model"
GRAPH = f"{MODEL}.onnx"
LAST, ALL = "last", "all"  # backend.compile.logits
CANDIDATES = 256  # of a screened head, unless its table has fewer rows
COMPILE = ("backend", "compile")  # where the options stand in a recipe


class OrtOptions(Options):
    """`backend.compile` of a recipe; what is not given, or null, is chosen.

    Args:
        prefill: `fast`, integer products of whole rows, where the weights have 8 bits and one scale per row; `lean`,
            products of blocks of input channels.
        head: `whole` rows of the table, or `screened` by half of every code.
        cache: `full`, or `window`, where layers with a sliding window keep that alone.
        block: input channels that share a scale of the activations in block products.
        logits: of the `last` token of every row, or of `all` new ones.
    """

    prefill: Literal["fast", "lean"] | None = None
    head: Literal["whole", "screened"] | None = None
    cache: Literal["full", "window"] | None = None
    block: Literal[16, 32, 64, 128, 256] | None = None
    logits: Literal["last", "all"] | None = None


def options_of(spec: BuildSpec) -> OrtOptions:
    """The options of a spec for this back end, what is not given filled in."""
    given = spec.options
    assert isinstance(given, OrtOptions)
    prefill: Literal["fast", "lean"] = given.prefill or ("fast" if spec.whole_rows else "lean")
    return OrtOptions(
        prefill=prefill,
        head=given.head or "whole",
        cache=given.cache or "full",
        block=given.block or 128,
        logits=given.logits or "last",
    )


def contradictions(spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the options mean together with the scheme."""
    chosen = options_of(spec)
    if chosen.prefill == "fast" and not spec.whole_rows:
        yield (
            (*COMPILE, "prefill"),
            "fast means integer products, which need int8 weights with one scale per row (frontend.quantize.type w8a8, "
            f"w8a16_gptq or w8a16, groupsize -1), not {spec.scheme} as it is here: set one of them, or prefill: lean",
        )
    if chosen.head == "screened" and not (spec.scheme.codes and spec.storage(0).table):
        yield (
            (*COMPILE, "head"),
            "screened needs a token table of 8-bit codes (frontend.quantize.table int8)",
        )
    if chosen.cache == "window" and spec.scheme.weights == "bf16":
        yield (
            (*COMPILE, "cache"),
            "window is for CPUs, and a bf16 graph for GPUs: write full, or backend.dtype fp32",
        )


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if spec.scheme.weights == "fp16" and not spec.scheme.int8_cache:
        yield (
            "backend.dtype: fp16 for ONNX Runtime is not built yet; set bf16, which Gemma was trained in and a GPU "
            "computes as fast, fp32 or int8 for a CPU, or backend.type: tvm_vacc"
        )
    if spec.scheme.int8_cache and not spec.scheme.codes:
        yield (
            f"frontend.quantize.type: an int8 cache beside {spec.scheme.weights} weights for ONNX Runtime is not built "
            "yet; set backend.dtype: int8 and w8a16+kv8 or another type with +kv8, or remove frontend.quantize and set "
            "backend.dtype: int8, bf16 or fp32, or, for a model that generates text, set backend.type: tvm_vacc"
        )
    if spec.ranks > 1 or spec.split_points:
        yield (
            "split.points and model_kwargs.tp: ONNX Runtime's graph is not divided; "
            "remove them, or set backend.type: tvm_vacc"
        )


def encoder_problems(spec: BuildSpec) -> Iterator[str]:
    """Options that mean nothing to an encoder, a sentence for each."""
    whys = {
        ("head", "screened"): "it has no LM head",
        ("cache", "window"): "it has no cache",
        ("logits", "all"): "it gives no logits",
    }
    return _meaningless(spec, "an encoder", whys)


def drafter_problems(spec: BuildSpec) -> Iterator[str]:
    """Options that mean nothing to a drafter, a sentence for each."""
    whys = {
        ("head", "screened"): "whose guesses another model judges",
        ("cache", "window"): "it has no cache of its own",
        ("logits", "all"): "it takes one token",
    }
    return _meaningless(spec, "a drafter", whys)


def _meaningless(spec: BuildSpec, what: str, whys: Mapping[tuple[str, str], str]) -> Iterator[str]:
    given = spec.options
    assert isinstance(given, OrtOptions)
    for (key, value), why in whys.items():
        if getattr(given, key) == value:
            yield f"backend.compile.{key}: {value} means nothing to {what}, {why}: remove the key"


@dataclass(frozen=True)
class Kernels:
    """How the linears of an int8 graph are computed.

    Args:
        block: input channels that share a scale of the activations in MatMulNBits, where the weights have one scale per
            row; grouped weights have their groups.
        integer: linears are integer products, with a scale for each token and one for each row of the weights.
        in_14_bits: linears (module paths) whose activations are rounded to 14 bits there, in two halves; and matrices
            of experts, whose products are always integer.
        windowed: layers with a sliding window keep the window alone (window.py).
        logits: `last`, of each row's last token, or `all`, of every new token.
        candidates: of a screened head (head.py), tokens whose rows are multiplied whole; 0 for a head of whole rows.
    """

    block: int = 128
    integer: bool = False
    in_14_bits: Collection[str] = field(default_factory=frozenset)
    candidates: int = 0
    windowed: bool = False
    logits: str = LAST
