"""Per-layer embeddings: a vector for every token and layer, from a table's row and a projection of the embedding.

The table is most of such a model (Gemma 4 E2B: 2.35 of 5.1 billion weights) and never multiplied: rows are looked up
where they lie in the file, which a session maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import PerLayerTable
from gemma_deploy.backends.onnxruntime.linears import Matrix
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.names import PER_LAYER_TABLE
from gemma_deploy.names import PER_LAYER_VECTORS as VECTORS


def rows_of(nodes: Nodes, matrix: Matrix, ids: ir.Value, *, table: str) -> ir.Value:
    """ids: [B,S] -> rows of a table [B,S,columns], in float32."""
    if not matrix.dense:
        return matrix.chosen_rows(nodes, ids, f"{table}.rows")
    weight = f"{table}.weight"
    rows = nodes.one("Gather", [matrix.weights.view([weight], weight), ids], f"{table}.rows")
    if matrix.weights.dtype(weight) != "float32":
        rows = nodes.one("Cast", [rows], f"{table}.wide", to=ir.DataType.FLOAT.value)
    return rows


def table_part(nodes: Nodes, matrix: Matrix, ids: ir.Value, *, table: PerLayerTable, scale: float) -> ir.Value:
    """[B,S,layers,size] float32: rows of the table times the root of a vector's size."""
    rows = rows_of(nodes, matrix, ids, table=PER_LAYER_TABLE)
    scaled = nodes.one("Mul", [rows, nodes.scalar(scale)], f"{PER_LAYER_TABLE}.out")
    return nodes.one("Reshape", [scaled, nodes.numbers(0, 0, table.layers, table.size)], f"{PER_LAYER_TABLE}.vectors")


def known_ids(nodes: Nodes, ids: ir.Value, rows: int) -> ir.Value:
    """Token ids [B,S], that of the first row in the place of those that the table has none for."""
    most, first = (nodes.constant(np.int64(number), f"int64.scalar.{number}") for number in (rows, 0))
    inside = nodes.one("Less", [ids, most], f"{PER_LAYER_TABLE}.inside")
    return nodes.one("Where", [inside, ids, first], f"{PER_LAYER_TABLE}.ids")


def context_of(
    weights: Weights, projected: ir.Value, table: PerLayerTable, *, hidden_size: int, eps: float
) -> ir.Value:
    """[B,S,layers,size]: norm(projection / sqrt(hidden)).

    Args:
        projected: [B,S,layers * size] of the embedding.
    """
    nodes, gain = weights.top, weights.gain(table.norm)
    shape = nodes.numbers(0, 0, table.layers, table.size)
    small = nodes.one("Mul", [projected, weights.scalar(hidden_size**-0.5)], f"{table.projection}.scaled")
    apart = nodes.one("Reshape", [small, shape], f"{table.projection}.vectors")
    return nodes.one("RMSNormalization", [apart, gain], f"{table.norm}.out", axis=-1, epsilon=eps, stash_type=1)


def halved(weights: Weights, rows: ir.Value, context: ir.Value) -> ir.Value:
    """[B,S,layers,size]: half of both, their sizes kept: (context + rows) / sqrt(2)."""
    both = weights.top.one("Add", [context, rows], f"{VECTORS}.sum")
    return weights.top.one("Mul", [both, weights.scalar(math.sqrt(0.5))], VECTORS)


def joined(nodes: Nodes, vectors: ir.Value, table: PerLayerTable) -> ir.Value:
    """[B,S,layers,size] -> [B,S,layers * size]."""
    return nodes.one("Reshape", [vectors, nodes.numbers(0, 0, table.width)], f"{VECTORS}.joined")


def by_layer(nodes: Nodes, vectors: ir.Value, layers: Sequence[int], *, size: int) -> dict[int, ir.Value]:
    """[B,N,count * size] -> the vectors [B,N,size] of each of these layers, which they are in this order."""
    names = [f"model.layers.{layer}.per_layer_input" for layer in layers]
    if len(names) == 1:
        return {layers[0]: vectors}
    parts = nodes.many("Split", [vectors, nodes.numbers(*[size] * len(names))], names, axis=-1)
    return dict(zip(layers, parts, strict=True))
