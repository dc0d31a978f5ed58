"""The text that tells the library what a model is and where its parameters lie: `model.plan` of an artifact.

src/plan.h has the form. Names are those of the parameter file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.calibration.points import cache_factor_names
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.names import (
    CACHE_FACTOR,
    COLUMN_SCALE,
    EMBEDDING_WEIGHT,
    LAYERS,
    NORM,
    PER_LAYER_TABLE,
    STREAM_PROJECTION,
    STREAM_UNEMBED,
)
from gemma_deploy.params.layout import Place

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

VERSION = 1
INPUT_GROUP = 128  # inputs that share a scale where they are rounded to 8 bits
FORMS = {"uint8": "int8", "uint4": "int4", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def plan_of(
    config: ModelConfig,
    places: Iterable[Place],
    *,
    context: int,
    embed_scale: float,
    vector_scale: float,
    unrounded: Collection[str] | None = None,
    candidates: int | None = None,
) -> str:
    """The plan of a model.

    Args:
        places: tensors of the parameter file, in panels; context: positions there are.
        embed_scale: by which rows of the table are multiplied; vector_scale: those of the table of per-layer vectors.
        unrounded: linears whose inputs have 15 bits where those of the others of all layers have 8; None: all have 15.
        candidates: of a head in two planes, rows that are read whole for a token; None: it has none.
    """
    found = {place.name: place for place in places}
    lines = [_model(config, context=context, embed_scale=embed_scale)]
    codes = any(name.endswith(f".{CACHE_FACTOR}") for name in found)
    if codes:
        lines[0] += " cache=int8"
    if candidates is not None:
        lines[0] += f" candidates={candidates}"
    if COLUMN_SCALE in found:
        lines[0] += f" columns={COLUMN_SCALE}"
    lines += _tensors(found, unrounded, planes=config.head_weight if candidates is not None else "")
    lines += [*_vectors(config, vector_scale), *_streams(config)]
    for layer in config.layers:
        lines += [_layer(config, layer, codes=codes), *_beside(config, layer)]
    missing = [name for name in _named("\n".join(lines)) if name not in found]
    assert not missing, f"not in the parameter file: {missing}"
    return "\n".join(lines) + "\n"


def _named(text: str) -> Iterator[str]:
    """Names of tensors in a plan."""
    return (value for part in text.split() if (value := part.partition("=")[2]).startswith(("model.", "lm_head.")))


def _line(word: str, values: Mapping[str, object]) -> str:
    return " ".join([word, *(f"{key}={_text(value)}" for key, value in values.items())])


def _text(value: object) -> str:
    """Numbers as float32 has them, all their digits."""
    return repr(float(np.float32(value))) if isinstance(value, float) else str(value)


def _model(config: ModelConfig, *, context: int, embed_scale: float) -> str:
    return _line(
        "model",
        {
            "version": VERSION,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context": context,
            "layers": config.num_hidden_layers,
            "activation": config.hidden_activation,
            "eps": float(config.rms_norm_eps),
            "embed": float(embed_scale),
            "cap": float(config.final_logit_softcapping or 0),
            "offset": float(config.architecture.norm_offset),
            "table": EMBEDDING_WEIGHT,
            "head": config.head_weight,
            "norm": f"{NORM}.weight",
        },
    )


def _tensors(found: Mapping[str, Place], unrounded: Collection[str] | None, *, planes: str) -> Iterator[str]:
    """A line for every matrix and every vector; `planes`: the matrix that lies in two planes."""
    scales = {f"{name.removesuffix('.weight')}.scale" for name, place in found.items() if "int" in place.dtype}
    for name, place in found.items():
        if name in scales:
            continue
        if len(place.shape) == 1:
            yield _line("vector", {"name": name, "size": place.shape[0], "at": place.offset})
            continue
        rows, columns = place.shape
        form = "planes" if name == planes else FORMS[place.dtype]
        values = {"name": name, "form": form, "rows": rows, "columns": columns, "at": place.offset}
        if name == f"{PER_LAYER_TABLE}.weight":
            if BY_NAME[place.dtype].bits <= 8:
                scale = found[f"{PER_LAYER_TABLE}.scale"]
                values |= {"group": columns // scale.shape[1], "scales_at": scale.offset}
            yield _line("table", values)
            continue
        if BY_NAME[place.dtype].bits <= 8:
            scale = found[f"{name.removesuffix('.weight')}.scale"]
            groups = scale.shape[1]
            values |= {
                "group": 0 if groups == 1 else columns // groups,
                "scales": FORMS[scale.dtype],
                "scales_at": scale.offset,
            }
            if unrounded is not None and name.startswith(LAYERS) and name.removesuffix(".weight") not in unrounded:
                values["input_group"] = INPUT_GROUP
        yield _line("matrix", values)


def _vectors(config: ModelConfig, scale: float) -> Iterator[str]:
    """What layers share of the vectors that they add; nothing where they add none."""
    table = config.per_layer
    if table is not None:
        yield _line(
            "vectors",
            {
                "size": table.size,
                "table": f"{PER_LAYER_TABLE}.weight",
                "projection": f"{table.projection}.weight",
                "norm": f"{table.norm}.weight",
                "table_factor": scale,
                "projection_factor": config.hidden_size**-0.5,
                "factor": math.sqrt(0.5),
            },
        )


def _streams(config: ModelConfig) -> Iterator[str]:
    """What layers share of the streams that they carry along; nothing where there is one."""
    if (altup := config.altup) is not None:
        values: dict[str, object] = {"count": altup.streams, "active": altup.active}
        for index in range(altup.streams - 1):
            values[f"enter{index + 1}"] = f"{STREAM_PROJECTION}.{index}.weight"
            values[f"leave{index + 1}"] = f"{STREAM_UNEMBED}.{index}.weight"
        yield _line("streams", values)


def _beside(config: ModelConfig, layer: LayerSpec) -> Iterator[str]:
    """Lines of what a layer has beside attention and MLP."""
    prefix = layer.prefix
    if (altup := layer.altup) is not None:
        names = {
            "router": altup.router,
            "prediction": altup.prediction,
            "correction": altup.correction,
            "norm": altup.norm,
        }
        values = {key: f"{prefix}{name}.weight" for key, name in names.items()}
        yield _line("altup", values | {"scale": f"{prefix}{altup.scale}", "router_factor": 1 / config.hidden_size})
    if (laurel := layer.laurel) is not None:
        names = {"left": laurel.left, "right": laurel.right, "norm": laurel.norm}
        yield _line("laurel", {"rank": laurel.rank} | {key: f"{prefix}{name}.weight" for key, name in names.items()})
    if (experts := layer.experts) is not None:
        sizes = {"count": experts.count, "chosen": experts.chosen, "width": experts.width}
        names = {
            "router": f"{experts.router}.weight",
            "router_scale": experts.router_scale,
            "scales": experts.expert_scale,
            "gate_up": experts.gate_up,
            "down": experts.down,
            "dense_norm": f"{experts.dense_post_norm}.weight",
            "norm": f"{experts.norm}.weight",
            "post_norm": f"{experts.post_norm}.weight",
        }
        factor = {"router_factor": config.hidden_size**-0.5}
        yield _line("experts", sizes | factor | {key: f"{prefix}{name}" for key, name in names.items()})
    if (added := layer.per_layer) is not None:
        names = {"gate": added.gate, "projection": added.projection, "norm": added.norm}
        yield _line("adds", {key: f"{prefix}{name}.weight" for key, name in names.items()})


def _layer(config: ModelConfig, layer: LayerSpec, *, codes: bool) -> str:
    """The line of a layer; `codes`: keys and values are codes, of channels that have factors."""
    attention = next(branch for branch in layer.branches if branch.attends)
    mlp = next(branch for branch in layer.branches if not branch.attends)
    norms, linears, prefix = dict(layer.head_norms), {one.name for one in layer.linears}, layer.prefix
    values: dict[str, object] = {
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "width": layer.intermediate_size,
        "window": layer.window or 0,
        "factor": float(layer.attention_scale),
        "cap": float(config.attn_logit_softcapping or 0),
        "source": layer.index if layer.cache_from is None else layer.cache_from,
        "value_norm": int(layer.value_norm is not None),
        "frequencies": f"model.rotary_emb.{layer.kind}.inv_freq",
        "q": f"{prefix}{attention.entry.observed}.weight",
        "o": f"{prefix}{attention.output}.weight",
        "gate": f"{prefix}{mlp.entry.readers[0]}.weight",
        "up": f"{prefix}{mlp.entry.readers[1]}.weight",
        "down": f"{prefix}{mlp.output}.weight",
        "input_norm": f"{prefix}{attention.norm}.weight",
        "pre_mlp_norm": f"{prefix}{mlp.norm}.weight",
    }
    if layer.cache_from is None:
        caches = dict(layer.caches)
        values["k"] = f"{prefix}{caches['key']}.weight"
        if caches["value"] != caches["key"] and caches["value"] in linears:
            values["v"] = f"{prefix}{caches['value']}.weight"
        if caches["key"] in norms:
            values["k_norm"] = f"{prefix}{norms[caches['key']]}.weight"
        if codes:
            values |= {f"{part}_factor": name for part, name in cache_factor_names(layer).items()}
    optional = {
        "q_norm": norms.get(attention.entry.observed),
        "post_attention_norm": attention.post_norm,
        "post_mlp_norm": mlp.post_norm,
    }
    values |= {key: f"{prefix}{norm}.weight" for key, norm in optional.items() if norm is not None}
    if layer.sparsity:
        values["quantile"] = NormalDist().inv_cdf(layer.sparsity)
    if layer.scalar is not None:
        values["scalar"] = f"{prefix}{layer.scalar}"
    return _line("layer", values)
