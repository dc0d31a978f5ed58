"""What a recipe may say about an artifact of `backend.type: native`, and what is not built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from gemma_deploy.backends.native.library import FOLDER, INSTALL, LIBRARY
from gemma_deploy.backends.spec import BuildSpec, Options
from gemma_deploy.bounds import Size

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

HIDDEN_OF, HEAD_OF = 16, 32  # of which hidden_size and head_dim are multiples
LARGEST_HEAD = 512
MOST_STREAMS = 8


CANDIDATES = 8192  # of a screened head, unless the recipe says another number
COMPILE = ("backend", "compile")  # where the options stand in a recipe


class NativeOptions(Options):
    """`backend.compile` of a recipe; what is not given, or null, is chosen.

    Args:
        head: `whole` rows of the table, or `screened`: by half of every code first, then whole rows of the likeliest.
        candidates: of a screened head, rows that are read whole for a token.
    """

    head: Literal["whole", "screened"] | None = None
    candidates: Size | None = None


def candidates_of(spec: BuildSpec) -> int | None:
    """Rows of the table that are read whole for a token; None for a head of whole rows."""
    given = spec.options
    assert isinstance(given, NativeOptions)
    return (given.candidates or CANDIDATES) if given.head == "screened" else None


def contradictions(spec: BuildSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the options mean together with the scheme."""
    given = spec.options
    assert isinstance(given, NativeOptions)
    if given.head == "screened" and not (spec.scheme.codes and spec.storage(0).table):
        yield (*COMPILE, "head"), "screened needs a token table of 8-bit codes (frontend.quantize.table int8)"
    if given.candidates is not None and given.head != "screened":
        yield (*COMPILE, "candidates"), "means nothing to a head of whole rows: set head: screened, or remove the key"


def not_built(spec: BuildSpec) -> Iterator[str]:
    """What a recipe may ask for and this version does not do, a sentence for each key."""
    if not (FOLDER / LIBRARY).is_file():
        yield f"backend.type: the library of native was not built with this package: {INSTALL}"
    if spec.ranks > 1 or spec.split_points:
        yield "split.points and model_kwargs.tp: an artifact of backend.type native is not divided: remove them"


def model_problems(spec: BuildSpec, config: ModelConfig) -> list[str]:
    """Of a model that it does not compute, sentences that begin with the key."""
    problems = []
    if config.altup is not None and spec.scheme.rounds_activations:
        problems.append(
            f"frontend.quantize.type: {spec.scheme} is not built for a model of several streams (Gemma 3n): write "
            "w8a16_gptq or w4a16_gptq"
        )
    if config.architecture.encoder:
        problems.append("backend.type: native is not built for encoders: write onnxruntime")
    vectors = config.per_layer
    if vectors is not None and vectors.rows % HIDDEN_OF:
        problems.append(
            f"backend.type: native wants a vocab_size_per_layer_input that is a multiple of {HIDDEN_OF}, "
            f"got {vectors.rows}"
        )
    if vectors is not None and vectors.size % HIDDEN_OF:
        problems.append(
            f"backend.type: native wants a hidden_size_per_layer_input that is a multiple of {HIDDEN_OF}, "
            f"got {vectors.size}"
        )
    streams = config.altup.streams if config.altup is not None else 1
    if streams > MOST_STREAMS:
        problems.append(f"backend.type: native wants an altup_num_inputs of at most {MOST_STREAMS}, got {streams}")
    widths = sorted({layer.experts.width for layer in config.layers if layer.experts is not None})
    if any(width % HIDDEN_OF for width in widths):
        problems.append(
            f"backend.type: native wants a moe_intermediate_size that is a multiple of {HIDDEN_OF}, "
            f"got {', '.join(map(str, widths))}"
        )
    if config.hidden_size % HIDDEN_OF:
        problems.append(
            f"backend.type: native wants a hidden_size that is a multiple of {HIDDEN_OF}, got {config.hidden_size}"
        )
    sizes = sorted(
        {layer.head_dim for layer in config.layers if layer.head_dim % HEAD_OF or layer.head_dim > LARGEST_HEAD}
    )
    if sizes:
        problems.append(
            f"backend.type: native wants heads of a multiple of {HEAD_OF} channels, up to {LARGEST_HEAD}, got "
            + ", ".join(map(str, sizes))
        )
    return problems
