"""What a choice takes of each device, from the plan of the parameter file and the contract: bytes, and operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.backends.vllm.backend import VLLM_BYTES
from gemma_deploy.bench.memory import ROTARY, TABLE, bytes_read, experts_read
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.estimates import RUNTIME_BYTES
from gemma_deploy.job import Job
from gemma_deploy.names import MIB, PER_LAYER_TABLE
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.partition import ArtifactPart, parts_of
from gemma_deploy.planning.choices import Choice, Wanted
from gemma_deploy.planning.device import CPU
from gemma_deploy.preflight import widest_stream

FLOAT = 4  # bytes of a number that is computed with


@dataclass(frozen=True)
class Holding:
    """How a back end's runtime keeps what it works on.

    Args:
        page: positions that layers with a window give back together; None: they keep the whole context.
        step: tokens of a prompt that run together, at most; None: all.
        packed: bytes of memory for a byte of codes on a CPU, where kernels pack some of them anew.
        reads_all: every step reads the whole cache, however short the text is.
        own_bytes: of the process itself on a CPU, tokenizer included.
        repeats_prompt: layers that share keys and values run for every token of a prompt, not for its last.
        computes_masked: attention computes what masks and windows hide as well.
    """

    page: int | None = None
    step: int | None = None
    packed: float = 1.0
    reads_all: bool = False
    own_bytes: int = 0
    repeats_prompt: bool = False
    computes_masked: bool = False


# `own_bytes` of the first two: peaks of the 270M less the rest (`bench` 471 MB; README.md 466 MiB). Others: gates.
# llama.cpp: a process for the model and one for the tokenizer, 420 and 407 MiB of the 270M with 278 of codes.
# OpenVINO maps the file and packs all of it anew: `bench` of the 270M 810 MiB with 261 of codes.
# ONNX Runtime packs the codes of both graphs of a pair, one of them twice: 1,540 MiB with 261 of codes, 1,535 with 227.
HOLDINGS = {
    "native": Holding(page=128, step=256, own_bytes=160 * MIB),
    "onnxruntime": Holding(step=512, packed=1.15, own_bytes=160 * MIB, computes_masked=True),
    "tvm_vacc": Holding(packed=4.0, reads_all=True, own_bytes=RUNTIME_BYTES, computes_masked=True),
    "openvino": Holding(packed=2.0, own_bytes=280 * MIB, repeats_prompt=True, computes_masked=True),
    "gguf": Holding(step=512, own_bytes=500 * MIB, repeats_prompt=True, computes_masked=True),
    "tvm": Holding(reads_all=True, own_bytes=RUNTIME_BYTES, computes_masked=True),
    "vllm": Holding(step=2048, own_bytes=VLLM_BYTES, repeats_prompt=True),
}


@dataclass(frozen=True)
class Sizes:
    """Of the device that holds most, in bytes.

    Args:
        weights: parameters as the file has them; all_weights: those of all devices together; cache: keys and values of
            all sequences; activations: what a step works on; own: of the program, and what its kernels pack anew.
    """

    weights: int
    all_weights: int
    cache: int
    activations: int
    own: int

    @property
    def total(self) -> int:
        """What has to fit."""
        return self.weights + self.cache + self.activations + self.own


def part_plans(job: Job, choice: Choice) -> list[tuple[ArtifactPart, tuple[ParamSpec, ...]]]:
    """Every device's share: the artifact's parts, or those that the engine makes when it loads it."""
    parts = parts_of(job.config.num_hidden_layers, choice.points, choice.ranks)
    return [(part, job.plan_of(part)) for part in parts]


def sizes_of(job: Job, choice: Choice, wanted: Wanted, *, kind: str) -> Sizes:
    """What the fullest device holds.

    Args:
        kind: of device; the program's own memory counts on a CPU alone.
    """
    how = HOLDINGS[choice.backend]
    plans = part_plans(job, choice)
    held = [(sum(spec.nbytes for spec in plan), cache_bytes(job, part, wanted), plan) for part, plan in plans]
    weights, cache, plan = max(held, key=lambda one: one[0] + one[1])
    own = how.own_bytes + int((how.packed - 1) * code_bytes(plan)) if kind == CPU else 0
    return Sizes(weights, sum(one for one, _, _ in held), cache, activation_bytes(job, choice, wanted), own)


def code_bytes(plan: Sequence[ParamSpec]) -> int:
    """Of one device's parameters, those that are codes."""
    return sum(spec.nbytes for spec in plan if "int" in spec.dtype)


def positions_kept(layer: LayerSpec, context: int, page: int | None) -> int:
    """Positions of a layer's cache behind `context` tokens: a window, in whole pages, where the runtime lets go."""
    if page is None or layer.window is None:
        return context
    return min(context, (math.ceil(layer.window / page) + 1) * page)


def position_bytes(job: Job, layer: LayerSpec, ranks: int = 1) -> int:
    """Keys and values of one position of a layer on one of `ranks` devices; 0 of a layer that reads another's."""
    if layer.cache_from is not None:
        return 0
    heads = math.lcm(layer.kv_heads, ranks) // ranks
    codes = job.scheme.int8_cache
    number = 1 if codes else BY_NAME[job.contract.cache_dtype].itemsize
    # Steps beside codes: float32 in the library, float16 in a static pair, none for each position in ONNX Runtime.
    step = {"native": 4, "tvm_vacc": 2}.get(job.spec.backend, 0) if codes else 0
    return 2 * heads * (layer.head_dim * number + step)


def cache_bytes(job: Job, part: ArtifactPart, wanted: Wanted) -> int:
    """Of all sequences, in one part, as long as the context."""
    page = HOLDINGS[job.spec.backend].page
    layers = job.config.layers[part.span.start : part.span.stop]
    kept = sum(position_bytes(job, one, part.ranks) * positions_kept(one, wanted.context, page) for one in layers)
    return wanted.batch * kept


def cache_read(job: Job, part: ArtifactPart, wanted: Wanted, *, after: int) -> int:
    """Bytes of keys and values that a step of all sequences reads behind `after` tokens; shared ones once a reader."""
    how, read = HOLDINGS[job.spec.backend], 0
    for layer in job.config.layers[part.span.start : part.span.stop]:
        source = job.config.layers[layer.keys_of]
        seen = wanted.context if how.reads_all else min(after, layer.window or after)
        read += position_bytes(job, source, part.ranks) * seen
    return wanted.batch * read


def activation_bytes(job: Job, choice: Choice, wanted: Wanted) -> int:
    """What a step of a prompt works on, and logits: as preflight counts them for the gate."""
    how, config = HOLDINGS[choice.backend], job.config
    tokens = min(how.step or wanted.prompt, wanted.prompt) * (wanted.batch if how.step is None else 1)
    scores = 0 if how.page else 2 * config.num_attention_heads * wanted.prompt  # a page at a time where there are pages
    return FLOAT * (tokens * max(3 * widest_stream(config), scores) // choice.ranks + wanted.batch * config.vocab_size)


def step_bytes(job: Job, part: ArtifactPart, plan: Sequence[ParamSpec], *, wanted: Wanted, after: int) -> int:
    """What a step of decoding reads on one device: its weights once, and keys and values."""
    candidates = getattr(job.contract, "candidates", None)
    table = bytes_read(plan, job.config, rows=wanted.batch, candidates=candidates)
    if not part.span.heads and job.config.tie_word_embeddings:  # a first stage looks rows up in its table
        table -= sum(spec.nbytes for spec in plan if spec.name.startswith(TABLE))
    return table + cache_read(job, part, wanted, after=after)


@dataclass(frozen=True)
class Work:
    """Operations on one device; a product and its sum are two.

    Args:
        products: with matrices of the layers; head: with the LM head; attention: scores and sums of values.
        channels: not operations: what these matrices read and make, in numbers.
    """

    products: float
    head: float
    attention: float
    channels: float


def work_of(job: Job, part: ArtifactPart, plan: Sequence[ParamSpec], *, tokens: int, after: int) -> Work:
    """What `tokens` new tokens of one sequence behind `after` others take."""
    config, given, how = job.config, experts_read(job.config, 1), HOLDINGS[job.spec.backend]
    every = how.repeats_prompt
    products = head = attention = channels = 0.0
    for spec in plan:
        shape = spec.plain
        if len(shape) < 2 or spec.name.endswith(".scale") or spec.name.startswith((ROTARY, PER_LAYER_TABLE)):
            continue
        if spec.name == config.head_weight:
            head = 2.0 * math.prod(shape) if part.span.heads else 0.0
        elif not spec.name.startswith(TABLE):
            chosen, count = given.get(spec.name, (1, 1))
            layer = config.layer_of(spec.name)
            runs = tokens if every or layer is None or layer.cache_from is None else 1
            products += 2.0 * math.prod(shape) * chosen / count * runs
            channels += (shape[-2] + shape[-1]) * (chosen if len(shape) == 3 else 1) * runs
    for layer in config.layers[part.span.start : part.span.stop]:
        first = after + tokens - 1 if layer.cache_from is not None and not every else after
        if how.computes_masked:
            seen = sum_of_chunks(first, after + tokens, how.step or tokens)
        else:
            seen = sum_of_spans(first, after + tokens, layer.window)
        attention += 4.0 * layer.heads * layer.head_dim * seen / part.ranks
    return Work(products, head, attention, channels)


def sum_of_spans(first: int, last: int, window: int | None) -> int:
    """Positions that the tokens first .. last - 1 see together, each itself included, of `window` at most."""
    most = window if window is not None else last
    rising = range(first + 1, min(last, most) + 1)
    whole = max(0, last - max(first, most)) * most
    return whole + (sum((rising[0], rising[-1])) * len(rising) // 2 if rising else 0)


def sum_of_chunks(first: int, last: int, step: int) -> int:
    """Positions that the tokens first .. last - 1 see where each sees all up to the end of its chunk of `step`."""
    return sum((min(last, begin + step) - begin) * min(last, begin + step) for begin in range(first, last, step))
