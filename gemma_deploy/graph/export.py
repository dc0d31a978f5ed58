"""Weightless export: a ModelConfig becomes the iter0 and iter1 graphs; no weight is read.

The steps, in order: skeleton -> islands -> trace -> passes -> cut and stamp -> function bodies. What leaves here has
initializers without data, named like the checkpoint's tensors; external.py points them into params.safetensors.
"""

from __future__ import annotations

import logging
import time

import onnx_ir as ir

from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.graph import stamp
from gemma_deploy.graph.contract import DECODE, GRAPHS, GraphContract, Scheme
from gemma_deploy.graph.functions import used_functions
from gemma_deploy.graph.islands import Islands, dynamic_dimensions, example_inputs, parts_of
from gemma_deploy.graph.passes.fold import fold_constants
from gemma_deploy.graph.passes.name_outputs import name_module_outputs
from gemma_deploy.graph.passes.simplify import simplify
from gemma_deploy.graph.passes.weights import hide_weights
from gemma_deploy.graph.skeleton import build_skeleton
from gemma_deploy.graph.trace import OPSET, trace

log = logging.getLogger(__name__)


def export_graphs(
    config: ModelConfig, scheme: Scheme, contract: GraphContract, embed_scale: str = "exact"
) -> dict[str, ir.Model]:
    """Both static graphs of a model.

    Args:
        embed_scale: `exact` or `bf16`, see gemma_facts.

    Raises:
        ExportError: the patched model could not be traced or simplified.
        NotBuiltError: no patched model exists for this generation.
    """
    return {graph: export_graph(config, scheme, contract, graph, embed_scale) for graph in GRAPHS}


def export_graph(
    config: ModelConfig, scheme: Scheme, contract: GraphContract, graph: str, embed_scale: str = "exact"
) -> ir.Model:
    """One static graph, `iter0` or `iter1`."""
    started = time.perf_counter()
    skeleton = build_skeleton(
        config,
        scheme,
        iter_num=int(graph == DECODE),
        context=contract.context,
        keep_last=contract.keeps_last(graph),
        embed_scale=embed_scale,
    )
    islands = Islands(skeleton)
    free = dynamic_dimensions(skeleton, graph) if contract.dynamic else None
    model = trace(islands, example_inputs(skeleton, contract, graph, config.hidden_size), free)
    inputs, outputs = ([value.name or "" for value in values] for values in (model.graph.inputs, model.graph.outputs))
    hidden = hide_weights(model, parameter_names(islands, config))
    folded = fold_constants(model)
    outputs = [value.name or "" for value in model.graph.outputs]
    named = name_module_outputs(model)
    outputs = [value.name or "" for value in model.graph.outputs]
    model, removed = simplify(model, used_functions(model, OPSET))
    log.debug(
        "%s: %d weights, %d nodes folded, %d module outputs named, %d nodes simplified away, %.2f s",
        graph, hidden, folded, named, removed, time.perf_counter() - started,
    )  # fmt: skip
    parts = parts_of(skeleton, inputs, outputs, graph)
    prefixes = {f"layer.{kind}": f"model.layers.{k}." for k, kind in enumerate(skeleton.kinds)}
    templates = stamp.cut(model, parts, prefixes)
    whole = stamp.stamp(model, templates, config.layer_types, contract, graph)
    for function in used_functions(whole, OPSET):
        whole.functions[function.identifier()] = function
        whole.opset_imports[function.domain] = 1
    return whole


def parameter_names(islands: Islands, config: ModelConfig) -> dict[str, str]:
    """Name in the trace -> name in the parameter file, for every parameter and buffer of the islands."""
    names = [name for name, _ in islands.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in islands.named_buffers(remove_duplicate=False)]
    mapping = {name: name.replace("model.rotary.", "model.rotary_emb.") for name in names}
    if config.tie_word_embeddings:
        mapping |= {
            name: name.replace("lm_head.", "model.embed_tokens.") for name in names if name.startswith("lm_head.")
        }
    return mapping
