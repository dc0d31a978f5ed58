"""One module whose parts are unconnected: prologue, a layer of each template, epilogue, each with inputs of its own.

Third step of the export: one trace gives every part of both graphs, the parts are cut apart by what feeds them, and
the layer parts are stamped out once per layer (stamp.py). Depth costs nothing.

Names at the part borders: `prologue` reads input_ids, attention_mask, position_ids and writes hidden, vectors (of all
layers, where layers add some), mask.{kind}, cos.{kind}, sin.{kind}; `layer.{template}` reads them (of the vectors its
own) and past.key, past.value and writes hidden, present.key, present.value; `epilogue` reads hidden and writes logits.
A layer that shares keys and values reads shared.key and shared.value, which are new, beside what is past, and writes
none; in iter0 it computes the last position alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.graph.collectives import all_gather
from gemma_deploy.graph.contract import DECODE, GRAPHS, PREFILL, GraphContract
from gemma_deploy.graph.skeleton import Skeleton


@dataclass(frozen=True)
class TraceBorder:
    """A cut-out of the trace: `inputs` and `outputs` are (trace name, name at the border)."""

    name: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


class DisconnectedParts(nn.Module):
    """Runs the patched model's own submodules, unconnected. Attributes keep the model's names."""

    def __init__(self, skeleton: Skeleton):
        super().__init__()
        self.model, self.lm_head = skeleton.model.model, skeleton.model.lm_head
        self.kinds, self.softcap = skeleton.kinds, getattr(skeleton.model.config, "final_logit_softcapping", None)
        self.score_dtype, self.in_float32, self.ranks = skeleton.score_dtype, skeleton.in_float32, skeleton.ranks
        graph = GRAPHS[skeleton.model.config.iter_num]
        at_last = ends_at_last(skeleton, graph)  # layers have taken it already
        self.keep_last = bool(skeleton.model.config.insert_slice) and not at_last
        self.fields = [layer_fields(layer, graph) for layer in skeleton.templates]
        self.adds_vectors, self.streams = skeleton.adds_vectors, skeleton.streams

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        parts: list[tuple[torch.Tensor, ...]],
        head_hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Run every part on its own inputs.

        Args:
            parts: per template what `layer_fields` names.
            head_hidden: [batch, seq, hidden], or [batch, seq, streams, hidden], input of the epilogue.
        """
        model = self.model
        hidden = model.embed_tokens(input_ids)
        batch, seq = input_ids.shape
        masks = model.build_masks(attention_mask, position_ids, batch, seq, None, self.score_dtype, hidden.device)
        out = [hidden]
        if self.adds_vectors:
            out.append(model.per_layer_inputs(input_ids, hidden))
        if self.streams:
            out[0] = model.entered(hidden)
        for kind in self.kinds:
            out += [masks[kind], *model.rotary[kind](hidden, position_ids)]
        for layer, names, values in zip(model.layers, self.fields, parts, strict=True):
            out += _layer(layer, dict(zip(names, values, strict=True)))
        x = model.left(head_hidden) if self.streams else head_hidden
        x = model.norm(x.float() if self.in_float32 else x)
        if self.keep_last:
            x = x[:, -1:, :]
        logits = self.lm_head(x)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.float()
        return (*out, logits if self.ranks == 1 else all_gather(logits, self.ranks))


def _layer(layer: nn.Module, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Run a layer on what `layer_fields` names: hidden, and its present key and value where it has some."""

    def pair(what: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (given[f"{what}.key"], given[f"{what}.value"]) if f"{what}.key" in given else None

    more = {"per_layer_input": given[VECTOR]} if VECTOR in given else {}
    if (shared := pair("shared")) is not None:
        more["shared"] = shared
    x, _, present = layer(
        given["hidden"],
        position_embeddings=(given["cos"], given["sin"]),
        attention_mask=given["mask"],
        past_key_values=pair("past"),
        **more,
    )
    return [x, *(present or ())]


class GraphPair(nn.Module):
    """The disconnected parts of both graphs: what torch's exporter spends once per call is spent once."""

    def __init__(self, skeletons: dict[str, Skeleton]):
        super().__init__()
        self.graphs = nn.ModuleDict({graph: DisconnectedParts(skeleton) for graph, skeleton in skeletons.items()})

    def forward(self, args: dict[str, tuple[Any, ...]]) -> tuple[torch.Tensor, ...]:
        """args: inputs of each graph's parts -> outputs of all, in the order of the graphs."""
        return tuple(value for graph, module in self.graphs.items() for value in module(*args[graph]))


def own_name(name: str) -> str:
    """The model's name of a module, parameter or value in the trace of a `GraphPair` (graphs.iter0.model.norm)."""
    graphs, _, rest = name.partition(".")
    return rest.partition(".")[2] if graphs == "graphs" else name


VECTOR = "per_layer_input"


def layer_fields(layer: LayerSpec, graph: str) -> list[str]:
    """What a layer reads in a graph, in the order of its inputs in the trace."""
    fields = ["hidden", "cos", "sin", "mask"]
    fields += [VECTOR] if layer.per_layer is not None else []
    fields += ["shared.key", "shared.value"] if layer.cache_from is not None else []
    return fields + (["past.key", "past.value"] if graph == DECODE else [])


def computes_last(layer: LayerSpec, graph: str) -> bool:
    """Whether a layer computes the last position alone: of a prompt, nobody reads what sharing layers give before."""
    return graph == PREFILL and layer.cache_from is not None


def ends_at_last(skeleton: Skeleton, graph: str) -> bool:
    """Whether the last layers compute that position alone."""
    return any(computes_last(layer, graph) for layer in skeleton.templates)


# Batch, new tokens and cache slots of a dynamic trace: unequal, as torch.export may take equal sizes for one dimension,
# and more than one, as it takes that for fixed.
DYNAMIC_SIZES = (3, 5, 7)


def example_inputs(skeleton: Skeleton, contract: GraphContract, graph: str, *, hidden_size: int) -> tuple[Any, ...]:
    """Zero-storage inputs of the shapes the graph will have (of any shapes when it is dynamic)."""
    decode = graph == DECODE
    batch, seq, past = contract.batch, 1 if decode else contract.prefill, contract.context
    if contract.dynamic:
        batch, seq, past = DYNAMIC_SIZES
    keys = past + seq if decode else seq
    stream = (skeleton.streams, hidden_size) if skeleton.streams else (hidden_size,)

    def zeros(*shape: int, dtype: torch.dtype = skeleton.dtype) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    def part(layer: LayerSpec) -> tuple[torch.Tensor, ...]:
        # Fresh tensors: torch.export takes one object given twice for one input.
        (kv_heads, size), score = contract.kv_shape(layer.index), skeleton.score_dtype
        if layer.cache_from is not None:
            kv_heads, size = contract.kv_shape(layer.cache_from)
        queries = 1 if computes_last(layer, graph) else seq
        shapes = {"hidden": (batch, queries, *stream), "mask": (batch, 1, queries, keys)}
        shapes |= dict.fromkeys(("cos", "sin"), (batch, queries, size))
        shapes |= {VECTOR: (batch, queries, layer.per_layer.size)} if layer.per_layer is not None else {}
        shapes |= dict.fromkeys(("shared.key", "shared.value"), (batch, kv_heads, seq, size))
        shapes |= dict.fromkeys(("past.key", "past.value"), (batch, kv_heads, past, size))
        dtypes = dict.fromkeys(("cos", "sin", "mask"), score)
        return tuple(
            zeros(*shapes[name], dtype=dtypes.get(name, skeleton.dtype)) for name in layer_fields(layer, graph)
        )

    ids = torch.zeros(batch, seq, dtype=torch.int64)
    mask = torch.ones(batch, keys, dtype=torch.int64)
    left = 1 if ends_at_last(skeleton, graph) else seq
    return ids, mask, ids.clone(), [part(layer) for layer in skeleton.templates], zeros(batch, left, *stream)


def dynamic_dimensions(skeleton: Skeleton, graph: str) -> tuple[Any, ...]:
    """Which dimensions of `example_inputs` are free; torch finds out how they hang together."""
    free = torch.export.Dim.DYNAMIC
    row, cache = {0: free, 1: free}, {0: free, 2: free}

    def dimensions(layer: LayerSpec) -> tuple[dict[int, Any], ...]:
        last = computes_last(layer, graph)
        queries = {0: free} if last else row
        mask = {0: free, 3: free} if last else {0: free, 2: free, 3: free}
        free_of = {"mask": mask} | dict.fromkeys(("shared.key", "shared.value", "past.key", "past.value"), cache)
        return tuple(free_of.get(name, queries) for name in layer_fields(layer, graph))

    left = {0: free} if ends_at_last(skeleton, graph) else row
    return row, row, row, [dimensions(layer) for layer in skeleton.templates], left


def parts_of(skeleton: Skeleton, names: Iterator[str], outs: Iterator[str], *, graph: str) -> list[TraceBorder]:
    """Which trace inputs and outputs belong to which part, in the order of `DisconnectedParts.forward`.

    Args:
        names: of the trace's inputs; outs: of its outputs. A graph's own are taken from their front.
    """
    kinds, templates = skeleton.kinds, [layer.template for layer in skeleton.templates]
    prologue_in = tuple((next(names), name) for name in ("input_ids", "attention_mask", "position_ids"))
    layer_in = {
        layer.template: tuple((next(names), name) for name in layer_fields(layer, graph))
        for layer in skeleton.templates
    }
    epilogue_in = ((next(names), "hidden"),)
    prologue_fields = ["hidden", *["vectors"] * skeleton.adds_vectors]
    prologue_fields += [f"{what}.{kind}" for kind in kinds for what in ("mask", "cos", "sin")]
    prologue_out = tuple((next(outs), name) for name in prologue_fields)
    presents = ("present.key", "present.value")
    layer_out = {
        layer.template: tuple((next(outs), name) for name in ("hidden", *(presents if layer.caches else ())))
        for layer in skeleton.templates
    }
    parts = [TraceBorder("prologue", prologue_in, prologue_out)]
    parts += [TraceBorder(f"layer.{template}", layer_in[template], layer_out[template]) for template in templates]
    return [*parts, TraceBorder("epilogue", epilogue_in, ((next(outs), "logits"),))]
