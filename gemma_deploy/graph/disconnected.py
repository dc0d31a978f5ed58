"""One module whose parts are unconnected: prologue, a layer of each template, epilogue, each with inputs of its own.

Third step of the export: one trace gives every part of both graphs, the parts are cut apart by what feeds them, and
the layer parts are stamped out once per layer (stamp.py). Depth costs nothing.

Names at the part borders: `prologue` reads input_ids, attention_mask, position_ids and writes hidden, mask.{kind},
cos.{kind}, sin.{kind}; `layer.{template}` reads them and past.key, past.value and writes hidden, present.key,
present.value; `epilogue` reads hidden and writes logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.graph.collectives import all_gather
from gemma_deploy.graph.contract import DECODE, GraphContract
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
        self.keep_last = bool(skeleton.model.config.insert_slice)
        self.score_dtype, self.in_float32, self.ranks = skeleton.score_dtype, skeleton.in_float32, skeleton.ranks

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
            parts: per template (hidden, cos, sin, mask) and, for decode, (past key, past value).
            head_hidden: [batch, seq, hidden], input of the epilogue.
        """
        model = self.model
        hidden = model.embed_tokens(input_ids)
        batch, seq = input_ids.shape
        masks = model.build_masks(attention_mask, position_ids, batch, seq, None, self.score_dtype, hidden.device)
        out = [hidden]
        for kind in self.kinds:
            out += [masks[kind], *model.rotary[kind](hidden, position_ids)]
        for layer, (x, cos, sin, mask, *past) in zip(model.layers, parts, strict=True):
            x, _, present = layer(
                x, position_embeddings=(cos, sin), attention_mask=mask, past_key_values=tuple(past) or None
            )
            out += [x, *present]
        x = model.norm(head_hidden.float() if self.in_float32 else head_hidden)
        if self.keep_last:
            x = x[:, -1:, :]
        logits = self.lm_head(x)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.float()
        return (*out, logits if self.ranks == 1 else all_gather(logits, self.ranks))


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

    def zeros(*shape: int, dtype: torch.dtype = skeleton.dtype) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    def part(layer: LayerSpec) -> tuple[torch.Tensor, ...]:
        # Fresh tensors: torch.export takes one object given twice for one input.
        kv_heads, head_dim = contract.kv_shape(layer.index)
        turns = [zeros(batch, seq, head_dim, dtype=skeleton.score_dtype) for _ in range(2)]
        mask = zeros(batch, 1, seq, keys, dtype=skeleton.score_dtype)
        tensors = [zeros(batch, seq, hidden_size), *turns, mask]
        if decode:
            tensors += [zeros(batch, kv_heads, past, head_dim) for _ in range(2)]
        return tuple(tensors)

    ids = torch.zeros(batch, seq, dtype=torch.int64)
    mask = torch.ones(batch, keys, dtype=torch.int64)
    return ids, mask, ids.clone(), [part(layer) for layer in skeleton.templates], zeros(batch, seq, hidden_size)


def dynamic_dimensions(skeleton: Skeleton, graph: str) -> tuple[Any, ...]:
    """Which dimensions of `example_inputs` are free; torch finds out how they hang together."""
    free = torch.export.Dim.DYNAMIC
    row = {0: free, 1: free}
    layer = [row, row, row, {0: free, 2: free, 3: free}]
    if graph == DECODE:
        layer += [{0: free, 2: free}] * 2
    return row, row, row, [tuple(layer) for _ in skeleton.templates], row


def parts_of(skeleton: Skeleton, names: Iterator[str], outs: Iterator[str], *, graph: str) -> list[TraceBorder]:
    """Which trace inputs and outputs belong to which part, in the order of `DisconnectedParts.forward`.

    Args:
        names: of the trace's inputs; outs: of its outputs. A graph's own are taken from their front.
    """
    kinds, templates = skeleton.kinds, [layer.template for layer in skeleton.templates]
    prologue_in = tuple((next(names), name) for name in ("input_ids", "attention_mask", "position_ids"))
    layer_fields = ["hidden", "cos", "sin", "mask"] + (["past.key", "past.value"] if graph == DECODE else [])
    layer_in = {template: tuple((next(names), name) for name in layer_fields) for template in templates}
    epilogue_in = ((next(names), "hidden"),)
    prologue_fields = ["hidden"] + [f"{what}.{kind}" for kind in kinds for what in ("mask", "cos", "sin")]
    prologue_out = tuple((next(outs), name) for name in prologue_fields)
    layer_out = {
        template: tuple((next(outs), name) for name in ("hidden", "present.key", "present.value"))
        for template in templates
    }
    parts = [TraceBorder("prologue", prologue_in, prologue_out)]
    parts += [TraceBorder(f"layer.{template}", layer_in[template], layer_out[template]) for template in templates]
    return [*parts, TraceBorder("epilogue", epilogue_in, ((next(outs), "logits"),))]
