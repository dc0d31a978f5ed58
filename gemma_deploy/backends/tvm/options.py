"""What a recipe may say about a compiled pair, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from gemma_deploy.architectures import ROWS
from gemma_deploy.backends.spec import BuildSpec, Options

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

SCHEMES = ("fp32", "w8a16", "w8a16_gptq")
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=100)]


class TvmOptions(Options):
    """`backend.compile` of a recipe; what is not given, or null, is this machine's.

    Args:
        triple: of LLVM, of the machine that it is compiled for; cpu: LLVM's name of its processor.
    """

    triple: Word | None = None
    cpu: Word | None = None


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if spec.ranks > 1 or spec.split_points:
        yield "split.points and model_kwargs.tp: an artifact of backend.type tvm is not divided: remove them"
    if spec.dynamic:
        yield "frontend.shape.dynamic: loops are made for fixed sizes: remove the key, or write backend.type: tvm_vacc"
    if spec.adapter_rank is not None:
        yield "adapters: a compiled pair takes none at run time: remove the section, and merge with frontend.adapter"
    if spec.scheme.int8_cache:
        yield f"frontend.quantize.type: {spec.scheme}: a cache of codes is not built on tvm: remove +kv8"
    if spec.scheme.weights not in SCHEMES:
        yield (
            f"backend.dtype and frontend.quantize.type: {spec.scheme.weights} is not built on tvm: it is for "
            f"{', '.join(SCHEMES)}"
        )
    elif spec.groupsize not in (None, -1):
        yield "frontend.quantize.calib_args.groupsize: tvm multiplies codes with a scale for each row: remove the key"
    if spec.table not in (None, "int8"):
        yield f"frontend.quantize.table: {spec.table} is not built on tvm: write int8, or remove the key"


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """Of a model that is not built, sentences that begin with the key."""
    if config.architecture.tvm:
        return []
    names = [row.name for row in ROWS if row.tvm]
    return [f"backend.type: tvm is not built for {config.architecture.name}: it is for {', '.join(names)}"]
