"""What the keys of a recipe must mean together: every contradiction, found at once, before any work.

A rule names the keys it reads; it is skipped when one of them is wrong already, so one mistake gives one sentence.
`check_against_model` holds the rules that need the checkpoint's config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from gemma_deploy.backends import backend
from gemma_deploy.calibration.mix import read_mix
from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe.document import Path
from gemma_deploy.recipe.sections import RecipeSections
from gemma_deploy.recipe.spec import spec_of
from gemma_deploy.schemes import FLOAT_KV8, Scheme

LENGTH_MULTIPLE = 16

Found = Iterator[tuple[Path, str]]
Rule = Callable[[RecipeSections], Found]

RULES: list[tuple[tuple[Path, ...], Rule]] = []


def rule(*reads: str) -> Callable[[Rule], Rule]:
    """Register a rule with the dotted keys it reads."""

    def add(function: Rule) -> Rule:
        RULES.append((tuple(tuple(key.split(".")) for key in reads), function))
        return function

    return add


def contradictions(recipe: RecipeSections, bad: set[Path]) -> list[tuple[Path, str]]:
    """All broken rules of `recipe`, leaving out those that read a key in `bad`."""

    def unusable(key: Path) -> bool:
        return any(key[: len(wrong)] == wrong or wrong[: len(key)] == key for wrong in bad)

    found: list[tuple[Path, str]] = []
    for reads, function in RULES:
        if not any(unusable(key) for key in reads):
            found.extend(function(recipe))
    return found


_DTYPE = "backend.dtype"
_QUANTIZE = "frontend.quantize"
_INPUT_IDS: Path = ("frontend", "shape", "input_ids")
_SHAPE = ".".join(str(part) for part in _INPUT_IDS)


@rule("name")
def name_is_a_directory_name(recipe: RecipeSections) -> Found:
    """The artifact lies in `workspace/NAME`."""
    name = recipe.name
    if (
        name != name.strip()
        or name.startswith((".", "-"))
        or name.endswith(".partial")
        or len(name.encode(errors="replace")) > 200
        or any(letter in "/\\" or ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in name)
    ):
        yield (
            ("name",),
            f"got '{name}', expected a plain directory name: "
            "no slash, no leading dot or dash, no '.partial' at the end",
        )


@rule("frontend.checkpoint", "frontend.type")
def gguf_is_a_gguf_file(recipe: RecipeSections) -> Found:
    """`frontend.type` says what the file name says."""
    path, kind = recipe.frontend.checkpoint, recipe.frontend.type
    if (kind == "gguf") != path.lower().endswith(".gguf"):
        right = "huggingface" if kind == "gguf" else "gguf"
        yield ("frontend", "type"), f"{kind} contradicts frontend.checkpoint '{path}': set frontend.type: {right}"


@rule(_DTYPE, _QUANTIZE)
def dtype_agrees_with_quantize(recipe: RecipeSections) -> Found:
    """Int8 and int4 weights need dtype int8; an 8-bit cache needs 16-bit weights or less."""
    dtype, quantize = recipe.backend.dtype, recipe.frontend.quantize
    if quantize is None or dtype == "int8" or (quantize.type == FLOAT_KV8 and dtype != "fp32"):
        return
    if quantize.type == FLOAT_KV8:
        yield (
            ("backend", "dtype"),
            "fp32 contradicts frontend.quantize.type w16kv8 (16-bit weights): set backend.dtype: fp16",
        )
        return
    bits = "4-bit" if _bits(recipe) == 4 else "int8"
    yield (
        ("backend", "dtype"),
        f"{dtype} contradicts frontend.quantize.type {quantize.type} ({bits} weights): "
        "set backend.dtype: int8, or remove frontend.quantize",
    )


@rule(_QUANTIZE)
def wbits_agrees_with_type(recipe: RecipeSections) -> Found:
    """`calib_args.wbits` repeats what `type` says."""
    quantize = recipe.frontend.quantize
    if quantize is None or quantize.calib_args.wbits is None:
        return
    bits = _bits(recipe)
    if quantize.calib_args.wbits != bits:
        yield (
            ("frontend", "quantize", "calib_args", "wbits"),
            f"{quantize.calib_args.wbits} contradicts frontend.quantize.type {quantize.type}: "
            f"write {bits}, or remove it",
        )


@rule(_QUANTIZE)
def activation_settings_agree_with_type(recipe: RecipeSections) -> Found:
    """`keep_a16` speaks of w8a8, whose integer products have one scale per row of the weights; `keep_w8` of w4a16."""
    quantize = recipe.frontend.quantize
    if quantize is None:
        return
    given, here = quantize.calib_args, ("frontend", "quantize", "calib_args")
    rounds = Scheme.parse("int8", quantize.type).rounds_activations
    if given.keep_a16 is not None and not rounds:
        yield (*here, "keep_a16"), f"{quantize.type} rounds no activations: remove it, or set type: w8a8"
    if given.keep_w8 is not None and _bits(recipe) != 4:
        yield (*here, "keep_w8"), f"{quantize.type} has no linears of 4 bits: remove it, or set type: w4a16_gptq"
    if rounds and given.groupsize not in (None, -1):
        yield (
            (*here, "groupsize"),
            f"{given.groupsize} contradicts {quantize.type}, whose integer products have one scale per row: "
            "write -1, or remove it",
        )


def _bits(recipe: RecipeSections) -> int:
    """Of a weight, by the quantize type alone; 16 where that speaks of the cache alone."""
    quantize = recipe.frontend.quantize
    quantizer = None if quantize is None else Scheme.parse("int8", quantize.type).quantizer
    return 16 if quantizer is None else quantizer.bits


def _are_two(lengths: Sequence[Sequence[int]]) -> bool:
    """Whether lengths have the form `[[P], [C]]`."""
    return len(lengths) == 2 and all(len(one) == 1 for one in lengths)


@rule(_SHAPE)
def lengths_fit_the_graphs(recipe: RecipeSections) -> Found:
    """`[[P], [C]]`, both multiples of 16, P <= C."""
    lengths = recipe.frontend.shape.input_ids
    if not _are_two(lengths):
        yield _INPUT_IDS, f"got {lengths}, expected [[prefill length], [context length]], such as [[1024], [2048]]"
        return
    for index, (what, (length,)) in enumerate(zip(("prefill", "context"), lengths, strict=True)):
        if length % LENGTH_MULTIPLE:
            below = length // LENGTH_MULTIPLE * LENGTH_MULTIPLE
            near = f"{below} or {below + LENGTH_MULTIPLE}" if below else str(LENGTH_MULTIPLE)
            yield (
                (*_INPUT_IDS, index),
                f"{what} length {length} is not a multiple of {LENGTH_MULTIPLE}; nearest: {near}",
            )
    (prefill,), (context,) = lengths
    if context < prefill:
        yield (
            _INPUT_IDS,
            f"context length {context} is shorter than prefill length {prefill}: "
            "the cache must hold the prompt, so write [[prefill], [context]] with context >= prefill",
        )


@rule(_SHAPE, "parity")
def parity_fits_the_graphs(recipe: RecipeSections) -> Found:
    """The compared prompt fits P; its decode steps fill the slots from P to C."""
    lengths = recipe.frontend.shape.input_ids
    if not _are_two(lengths) or lengths[1] < lengths[0]:
        return
    (prefill,), (context,) = lengths
    prompt, decode = recipe.parity.prompt_tokens, recipe.parity.decode_tokens
    if prompt > prefill:
        yield (
            ("parity", "prompt_tokens"),
            f"{prompt} tokens do not fit the prefill length {prefill}: write at most {prefill}",
        )
    if prefill + decode > context:
        yield (
            ("parity", "decode_tokens"),
            f"{decode} steps do not fit: prefill fills {prefill} of {context} cache slots, "
            f"so write at most {context - prefill}",
        )


@rule("dataset.name", "dataset.path", "dataset.nsamples")
def dataset_is_understood(recipe: RecipeSections) -> Found:
    """Known data sets, windows that add up to nsamples, and places of data sets that are in the mix."""
    asked = recipe.dataset
    for key, text in read_mix(asked.name, asked.path, asked.nsamples).problems:
        yield ("dataset", key), text


@rule("backend", _QUANTIZE, _SHAPE, "frontend.model_kwargs", "split")
def back_end_can_do_it(recipe: RecipeSections) -> Found:
    """What the keys mean to the back end, together; it is not asked about lengths that are none."""
    if not _are_two(recipe.frontend.shape.input_ids):
        return
    yield from backend(recipe.backend.type).contradictions(spec_of(recipe))


@rule("workspace.cluster")
def cluster_is_an_address(recipe: RecipeSections) -> Found:
    """`auto`, `HOST:PORT` or `ray://HOST:PORT`."""
    address = recipe.workspace.cluster
    if address is not None and not re.fullmatch(r"auto|(ray://)?[^\s/:]+:\d{1,5}", address):
        yield ("workspace", "cluster"), f"got '{address}', expected auto, HOST:PORT or ray://HOST:PORT"


def check_against_model(recipe: RecipeSections, max_position_embeddings: int, also: Sequence[str] = ()) -> None:
    """Refuse a recipe the model cannot follow.

    Args:
        max_position_embeddings: longest context the model was made for.
        also: problems found elsewhere (`partition.division_problems`), told together with these.

    Raises:
        RecipeError: lists every key that contradicts the checkpoint's config.
    """
    problems = list(also)
    if recipe.context_length > max_position_embeddings:
        problems.append(
            f"frontend.shape.input_ids: context length {recipe.context_length} is longer than the model's "
            f"max_position_embeddings {max_position_embeddings}"
        )
    if problems:
        raise RecipeError(
            f"the recipe does not fit the model ({_count(len(problems))})",
            where=f"recipe {recipe.name}",
            problems=problems,
            next_step="change the keys above, or point frontend.checkpoint at another model",
        )


def _count(number: int) -> str:
    return f"{number} problem{'s' if number != 1 else ''}"
