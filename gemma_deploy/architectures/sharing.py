"""Layers that read keys and values of an earlier one, have an MLP of their own width, or add a vector of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gemma_deploy.architectures.base import LayerSpec, LayerType, Linear
from gemma_deploy.architectures.blocks import PerLayer, PerLayerTable
from gemma_deploy.architectures.keys import ConfigKeys

SHARED_LAYERS = "num_kv_shared_layers"


def sharing(spec: LayerSpec, layer_types: Sequence[LayerType], shared: int) -> LayerSpec:
    """The layer as one that reads the keys and values of an earlier one, where it is such.

    Args:
        layer_types: of the whole model; shared: how many layers at the end are such.
    """
    own = len(layer_types) - shared
    if spec.index < own:
        return spec
    source = max(index for index, kind in enumerate(layer_types[:own]) if kind == spec.kind)
    return replace(queries_alone(spec), cache_from=source)


def queries_alone(spec: LayerSpec) -> LayerSpec:
    """The layer as one that makes queries alone, and has its keys and values from elsewhere."""
    attention, mlp = spec.branches
    queries = (attention.entry.observed,)
    inner = (*queries, *(norm for linear, norm in spec.head_norms if linear in queries))
    entry = replace(attention.entry, readers=queries, fused="")
    made = ("self_attn.k_proj", "self_attn.v_proj")
    return replace(
        spec,
        template=f"{spec.template}.sharing",
        linears=tuple(one for one in spec.linears if one.name not in made),
        branches=(replace(attention, entry=entry, inner=inner), mlp),
        head_norms=tuple(pair for pair in spec.head_norms if pair[0] in queries),
        caches=(),
        value_norm=None,
    )


def with_width(spec: LayerSpec, width: int) -> LayerSpec:
    """The layer with another width of its MLP."""
    heights = {"mlp.gate_proj": (width, spec.hidden_size), "mlp.up_proj": (width, spec.hidden_size),
               "mlp.down_proj": (spec.hidden_size, width)}  # fmt: skip
    linears = (Linear(one.name, *heights.get(one.name, (one.out_features, one.in_features))) for one in spec.linears)
    return replace(spec, intermediate_size=width, linears=tuple(linears))


def check_sharing(keys: ConfigKeys, layer_types: Sequence[LayerType], *, default: int) -> None:
    """That every layer which shares keys and values has one of its kind before it that makes some."""
    shared, layers = keys.raw.get(SHARED_LAYERS, default), len(layer_types)
    if type(shared) is not int or not 0 <= shared < layers:
        keys.problem(SHARED_LAYERS, shared, f"a whole number from 0 to {layers - 1}")
        return
    for kind in sorted(set(layer_types[layers - shared :]) - set(layer_types[: layers - shared])):
        keys.problem(SHARED_LAYERS, shared, f"fewer: no layer before those has keys and values of {kind}")


def with_vectors(spec: LayerSpec, table: PerLayerTable | None) -> LayerSpec:
    """The layer as one that adds a vector of each token; as it is without them."""
    return spec if table is None else with_vector(spec, PerLayer(table.size))


def with_vector(spec: LayerSpec, added: PerLayer) -> LayerSpec:
    """The layer as one that adds this of a vector."""
    linears = (
        Linear(added.gate, added.size, spec.hidden_size),
        Linear(added.projection, spec.hidden_size, added.size),
    )
    return replace(spec, linears=(*spec.linears, *linears), norms=(*spec.norms, added.norm), per_layer=added)
