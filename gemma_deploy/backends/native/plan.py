"""The text that tells the library what a model is and where its parameters lie: `model.plan` of an artifact.

src/plan.h has the form. Names are those of the parameter file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.names import EMBEDDING_WEIGHT, NORM
from gemma_deploy.params.layout import Place

VERSION = 1
FORMS = {"uint8": "int8", "uint4": "int4", "float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def plan_of(config: ModelConfig, places: Iterable[Place], *, context: int, embed_scale: float) -> str:
    """The plan of a model.

    Args:
        places: tensors of the parameter file, in panels; context: positions there are.
        embed_scale: by which rows of the table are multiplied.
    """
    found = {place.name: place for place in places}
    lines = [_model(config, context=context, embed_scale=embed_scale)]
    lines += _tensors(found)
    lines += [_layer(config, layer, found) for layer in config.layers]
    return "\n".join(lines) + "\n"


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


def _tensors(found: Mapping[str, Place]) -> Iterator[str]:
    """A line for every matrix and every vector."""
    scales = {f"{name.removesuffix('.weight')}.scale" for name, place in found.items() if "int" in place.dtype}
    for name, place in found.items():
        if name in scales:
            continue
        if len(place.shape) == 1:
            yield _line("vector", {"name": name, "size": place.shape[0], "at": place.offset})
            continue
        rows, columns = place.shape
        values = {"name": name, "form": FORMS[place.dtype], "rows": rows, "columns": columns, "at": place.offset}
        if BY_NAME[place.dtype].bits <= 8:
            scale = found[f"{name.removesuffix('.weight')}.scale"]
            groups = scale.shape[1]
            values |= {
                "group": 0 if groups == 1 else columns // groups,
                "scales": FORMS[scale.dtype],
                "scales_at": scale.offset,
            }
        yield _line("matrix", values)


def _layer(config: ModelConfig, layer: LayerSpec, found: Mapping[str, Place]) -> str:
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
    optional = {
        "q_norm": norms.get(attention.entry.observed),
        "post_attention_norm": attention.post_norm,
        "post_mlp_norm": mlp.post_norm,
    }
    values |= {key: f"{prefix}{norm}.weight" for key, norm in optional.items() if norm is not None}
    if layer.scalar is not None:
        values["scalar"] = f"{prefix}{layer.scalar}"
    missing = [str(name) for name in values.values() if str(name).startswith("model.") and name not in found]
    assert not missing, f"not in the parameter file: {missing}"
    return _line("layer", values)
