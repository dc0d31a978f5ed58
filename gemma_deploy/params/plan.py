"""What the parameter file holds for a model and a scheme: names, shapes, dtypes, and where each value comes from.

Pure data, made from the config alone; the graphs name the same initializers. embed_scale is no parameter: it is a
constant inside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gemma_deploy.architectures import FULL, LayerSpec
from gemma_deploy.calibration.points import cache_factor_names, cache_scale_names
from gemma_deploy.checkpoint import ModelConfig, Rope, coefficients, expected_tensors
from gemma_deploy.dtypes import BY_NAME, StoredDtype
from gemma_deploy.names import COLUMN_FACTOR, COLUMN_SCALE, EMBEDDING_WEIGHT, PER_LAYER_TABLE
from gemma_deploy.params.panels import padded, padded_scales
from gemma_deploy.params.quantized import OutputError
from gemma_deploy.partition import ArtifactPart, whole
from gemma_deploy.partition.ranks import Blocks, is_stack, row_blocks, sharding
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import CodeForm, Form, Storage

Kind = Literal["cast", "int8_per_channel", "int4_per_group", "scale", "constant", "stored", "taken_over"]

# By bits, and by whether codes are unsigned: those have the zero point 2**(bits - 1).
CODE_DTYPES: dict[tuple[int, bool], StoredDtype] = {
    (8, False): "int8", (4, False): "int4", (8, True): "uint8", (4, True): "uint4",
}  # fmt: skip
# Norm weights are float32 everywhere: the norm computes in float32.
# Codes with their scales, by bits.
BLOCK_DTYPES: dict[int, StoredDtype] = {8: "q8_0", 4: "q4_0"}
MATRIX_DTYPE: dict[Form, StoredDtype] = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "w8a16": "int8", "w8a16_folded": "int8",
}  # fmt: skip
ROTARY_DTYPE: StoredDtype = "float32"


@dataclass(frozen=True)
class ParamSpec:
    """One tensor to write. `source` is the checkpoint's tensor; constants have a `rope` or a `value` instead.

    The kind `stored` is copied as it is, and so is `taken_over`, which is what arrived.

    Args:
        rows: blocks [start, stop) of the source's rows that are taken, in order; () for all of them.
        columns: [start, stop) of the source's columns. Scales are those of whole rows.
        transposed: the file has columns where the source has rows, of every matrix of a stack; `shape` is the file's.
        panels: the shape before padding, where the file has panels of 16 rows (panels.py); `shape` is the file's.
        planes: codes lie in two planes of their halves, or these are scales of such, which lie row by row.
        output_error: of a matrix that a calibrated quantizer made.
        added: to every number, before it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: StoredDtype
    kind: Kind
    source: str | None = None
    rope: Rope | None = None
    value: float | None = None
    rows: Blocks = ()
    columns: tuple[int, int] | None = None
    transposed: bool = False
    output_error: OutputError | None = None
    panels: tuple[int, ...] | None = None
    planes: bool = False
    added: float = 0.0

    @property
    def plain(self) -> tuple[int, ...]:
        """The shape before padding."""
        return self.panels or self.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return BY_NAME[self.dtype].nbytes(math.prod(self.shape))


def build_plan(
    config: ModelConfig,
    scheme: Form,
    context_length: int,
    *,
    rescaling: Rescaling | None = None,
    part: ArtifactPart | None = None,
    quantized: Mapping[str, OutputError] | None = None,
    storage: Storage | None = None,
    int8_cache: bool = False,
    form: CodeForm | None = None,
    factors: bool = False,
    taken: Collection[str] = (),
) -> tuple[ParamSpec, ...]:
    """Every parameter of the model in model order, then the rotary tables.

    Args:
        config: the model; a tied table appears once, under model.embed_tokens.
        scheme: w8a16 stores each matrix as int8 `X.weight` and float32 `X.scale`; fp16 has the eps of every norm and
            the scale factor of every attention as parameters, [1] each, because rescaling makes them differ by layer;
            in panels it has none, because activations are float32 there.
            w8a16_folded is w8a16 with one more scale, of each column that the embedding gives, where the table is the
            LM head's matrix as well and has one scale per row. Dense layers behind an encoder are float16 where others
            are codes: 2 % of EmbeddingGemma, and everything passes through them. So is what joins a drafter to its
            model. Routers of experts are float32 in all schemes: 0.2 % of a 26B-A4B in int8, and a rounded one chooses
            other experts.
        context_length: positions the rotary half tables [context_length, head_dim / 2] cover.
        rescaling: of the source, which eps and scale factors take into account.
        part: only what this part of a divided artifact holds. Names are the whole model's.
        quantized: matrices whose codes and scales the source holds already (`QuantizedCheckpoint.output_errors`).
        storage: bits and groups of the int8 schemes' codes; int8 per row by default.
        int8_cache: factors or steps of the channels of keys and values, which the source holds as well.
        form: how codes lie in the file; signed by default.
        factors: of w8a16_folded, by what the columns of linears were multiplied, for what is added to them later.
        taken: matrices whose codes and scales the source has in the artifact's form (taken_over.py).
    """
    storage, form = storage or Storage(), form or CodeForm()
    rescaling, part = rescaling or Rescaling(), part or ArtifactPart(whole(config.num_hidden_layers))
    span, behind = part.span, config.sentence.tensors() if config.sentence else {}
    if config.drafting is not None:
        behind = config.drafting.tensors(config.hidden_size, config.vocab_size)
    layers = config.layers[span.start : span.stop]
    rescaled = scheme == "fp16" and not form.panels and form.naming == "own"
    specs: list[ParamSpec] = []
    small = coefficients(config)
    for name, shape in expected_tensors(config).items():
        if not span.holds(name, config.tie_word_embeddings):
            continue
        module = name.removesuffix(".weight")
        if len(shape) == 1 or name in small:
            gain = form.blocks and name.endswith("norm.weight")
            added = config.architecture.norm_offset if gain else 0.0
            specs.append(ParamSpec(name, shape, "float32", "cast", name, added=added))
            if rescaled and len(shape) == 1 and name != module:
                eps = config.rms_norm_eps * 4.0 ** -rescaling.of(f"{module}.in")
                specs.append(ParamSpec(f"{module}.eps", (1,), "float32", "constant", value=eps))
        elif MATRIX_DTYPE[scheme] == "int8" and name not in behind and (codes := storage.of(module)):
            made = quantized.get(name) if quantized else None
            nearest: Kind = "int8_per_channel" if codes.bits == 8 else "int4_per_group"
            kinds: tuple[Kind, Kind] = ("stored", "stored") if made else (nearest, "scale")
            if name in taken:
                kinds = "taken_over", "taken_over"
            if form.blocks:
                dtype = BLOCK_DTYPES[codes.bits]
                specs.append(ParamSpec(name, shape, dtype, kinds[0], name, output_error=made))
                continue
            scales = f"{module}.scale"
            stack = len(shape) == 3
            transposed = form.experts_transposed if stack else form.transposed and ".layers." in name
            dtype, lies = (
                CODE_DTYPES[codes.bits, form.unsigned and not (transposed and codes.bits == 8)],
                turned(shape) if transposed else shape,
            )
            planes = form.planes and name == config.head_weight
            specs.append(
                ParamSpec(name, lies, dtype, kinds[0], name, transposed=transposed, output_error=made, planes=planes)
            )
            source = scales if made or name in taken else name
            of_scales, turns = codes.scale_shape(shape), stack and transposed and codes.groupsize is not None
            lies = turned(of_scales) if turns else of_scales
            kind = "cast" if kinds[1] != "scale" and codes.scales != "float32" else kinds[1]
            specs.append(ParamSpec(scales, lies, codes.scales, kind, source, transposed=turns))
            folded = scheme == "w8a16_folded" and codes.groupsize is None and config.head_reads_table
            if folded and name == EMBEDDING_WEIGHT and span.start == 0:
                specs.append(ParamSpec(COLUMN_SCALE, shape[1:], "float32", "stored", COLUMN_SCALE))
        elif MATRIX_DTYPE[scheme] == "int8":
            specs.append(ParamSpec(name, shape, form.floats, "cast", name))
        else:
            specs.append(ParamSpec(name, shape, MATRIX_DTYPE[scheme], "cast", name))
    if rescaled:
        specs += [_attention_scale(layer, config.layers, rescaling) for layer in layers]
        bare = [f"{layer.prefix}{layer.value_norm}" for layer in layers if layer.value_norm]
        bare += [f"{layer.prefix}{layer.experts.router_norm}" for layer in layers if layer.experts is not None]
        specs += [_eps(norm, rescaling, config.rms_norm_eps) for norm in bare]
    if int8_cache:
        for layer in layers:
            channels = (layer.kv_heads * layer.head_dim,)
            names = (cache_scale_names if form.cache_scales else cache_factor_names)(layer).values()
            specs += [ParamSpec(name, channels, "float32", "stored", name) for name in names]
    widths = {layer.kind: layer.head_dim // 2 for layer in layers}
    if form.blocks and config.architecture.gguf is not None:
        for name in config.architecture.gguf.said:
            specs.append(ParamSpec(name, (widths[FULL],), ROTARY_DTYPE, "constant", rope=config.rope[FULL]))
    for layer_type, rope in ((kind, rope) for kind, rope in config.rope.items() if kind in widths and form.rotary):
        if form.panels:
            name = f"model.rotary_emb.{layer_type}.inv_freq"
            specs.append(ParamSpec(name, (widths[layer_type],), ROTARY_DTYPE, "constant", rope=rope))
            continue
        for table in ("cos", "sin"):
            name, half = f"model.rotary_emb.{layer_type}.{table}", (context_length, widths[layer_type])
            specs.append(ParamSpec(name, half, ROTARY_DTYPE, "constant", rope=rope))
    if factors and scheme == "w8a16_folded":
        specs += [spec for layer in layers for spec in _factors(layer)]
    if form.panels:
        return tuple(_in_panels(specs))
    return tuple(specs) if part.ranks == 1 else tuple(_of_rank(spec, config, part) for spec in specs)


def _in_panels(specs: Sequence[ParamSpec]) -> Iterator[ParamSpec]:
    """Tensors as the file has them in panels; the table of per-layer vectors is read by row and stays as it is."""
    coded = {f"{spec.name.removesuffix('.weight')}.scale": spec for spec in specs if "int" in spec.dtype}
    for spec in specs:
        if spec.name.startswith(PER_LAYER_TABLE):
            yield spec
        elif matrix := coded.get(spec.name):
            lies = padded_scales(spec.shape, matrix.shape, matrix.dtype, planes=matrix.planes)
            yield replace(spec, shape=lies, panels=spec.shape, planes=matrix.planes)
        else:
            yield replace(spec, shape=padded(spec.shape, spec.dtype, planes=spec.planes), panels=spec.shape)


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a matrix, or of several, in the place of each other."""
    return (*shape[:-2], shape[-1], shape[-2])


def _of_rank(spec: ParamSpec, config: ModelConfig, part: ArtifactPart) -> ParamSpec:
    """What one rank holds of a tensor."""
    axis = None if spec.source is None else sharding(spec.name, len(spec.shape))
    if is_stack(spec.name):
        count, rows = spec.shape[0] // part.ranks, spec.shape[1]  # the source has the rows of all experts in a row
        blocks: Blocks = ((part.rank * count * rows, (part.rank + 1) * count * rows),)
        return replace(spec, shape=(count, *spec.shape[1:]), rows=blocks)
    if axis == "rows":
        layer = config.layer_of(spec.name)
        blocks = row_blocks(spec.name, spec.shape[0], layer, rank=part.rank, ranks=part.ranks)
        count = sum(stop - start for start, stop in blocks)
        return replace(spec, shape=(count, *spec.shape[1:]), rows=blocks)
    if axis == "columns":
        rows, columns = spec.shape
        span = (part.rank * columns // part.ranks, (part.rank + 1) * columns // part.ranks)
        return replace(spec, shape=(rows, span[1] - span[0]), columns=span)
    return spec


def _factors(layer: LayerSpec) -> Iterator[ParamSpec]:
    """One vector for each input group of a layer."""
    for group in layer.groups:
        name = f"{layer.prefix}{group.observed}.{COLUMN_FACTOR}"
        yield ParamSpec(name, (layer.linear(group.observed).in_features,), "float32", "stored", name)


def _eps(name: str, rescaling: Rescaling, eps: float) -> ParamSpec:
    """Of a norm, by its path, that has no weight beside which it would stand."""
    return ParamSpec(f"{name}.eps", (1,), "float32", "constant", value=eps * 4.0 ** -rescaling.of(f"{name}.in"))


def _attention_scale(layer: LayerSpec, layers: Sequence[LayerSpec], rescaling: Rescaling) -> ParamSpec:
    keys = layer if layer.cache_from is None else layers[layer.cache_from]
    scored = f"{layer.prefix}{layer.scored[0]}", f"{keys.prefix}{keys.scored[1]}"
    shift = sum(rescaling.of(f"{name}.out") for name in scored)
    scale = layer.attention_scale * 2.0**shift
    return ParamSpec(f"{layer.prefix}{layer.branches[0].module}.scaling", (1,), "float32", "constant", value=scale)
