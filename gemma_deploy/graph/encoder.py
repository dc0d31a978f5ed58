"""Weightless export of an encoder: one graph, stamped from a trace of one layer of each kind as a decoder's pair is.

The steps are those of export.py; the parts are others. `prologue` reads input_ids and attention_mask and writes hidden,
vectors (of all layers, where they add some), mask.{kind}, cos.{kind}, sin.{kind}; `layer.{template}` reads those (of
the vectors its own) and writes hidden; `epilogue` reads hidden and attention_mask and writes last_hidden_state and
sentence_embedding. A token's place is its position: rotary embedding is relative, so that padding on either side
changes nothing.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.sentence import LEAST_LENGTH, LEAST_TOKENS
from gemma_deploy.graph import stamp
from gemma_deploy.graph.contract import ENCODER, TEXT_VECTORS, TOKEN_STATES, GraphContract
from gemma_deploy.graph.disconnected import DYNAMIC_SIZES, VECTOR, TraceBorder
from gemma_deploy.graph.export import parameter_names
from gemma_deploy.graph.functions import used_functions
from gemma_deploy.graph.passes.fold import fold_constants
from gemma_deploy.graph.passes.name_outputs import name_module_outputs
from gemma_deploy.graph.passes.simplify import simplify
from gemma_deploy.graph.passes.weights import hide_weights
from gemma_deploy.graph.passes.widen import widen
from gemma_deploy.graph.skeleton import Skeleton, build_skeleton
from gemma_deploy.graph.trace import OPSET, trace
from gemma_deploy.names import PER_LAYER_VECTORS
from gemma_deploy.patched import patched_module
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import Form, Storage

BEHIND = "behind."  # the dense layers in the trace, numbered
DENSE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # float16 of all others


class EncoderParts(nn.Module):
    """Runs the patched model's own submodules, unconnected, and what stands behind them.

    Args:
        skeleton: of the stack; dense: layers behind the mean.
    """

    def __init__(self, skeleton: Skeleton, dense: list[nn.Module]):
        super().__init__()
        self.model, self.behind = skeleton.model.model, nn.ModuleList(dense)
        self.adds_vectors, self.projects = skeleton.adds_vectors, hasattr(self.model, "embedding_projection")
        self.kinds, self.score_dtype, self.in_float32 = skeleton.kinds, skeleton.score_dtype, skeleton.in_float32

    def forward(self, ends: list[torch.Tensor], parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Run every part on its own inputs.

        Args:
            ends: input_ids, attention_mask [batch, seq], and of the epilogue hidden [batch, seq, hidden] and
                attention_mask; parts: per template hidden, cos, sin, mask, and vectors [batch, seq, size] where the
                layer adds some.
        """
        model, (ids, real, last, pooled) = self.model, ends
        hidden = model.embed_tokens(ids)
        batch, seq = ids.shape
        places = torch.arange(seq, device=ids.device)[None].expand(batch, seq)
        masks = model.build_masks(real, places, batch, seq, None, self.score_dtype, hidden.device)
        out = [hidden]
        if self.adds_vectors:
            out.append(model.per_layer_inputs(ids, hidden))
        for kind in self.kinds:
            out += [masks[kind], *model.rotary[kind](hidden, places)]
        for layer, (x, cos, sin, mask, *vectors) in zip(model.layers, parts, strict=True):
            more = dict(zip((VECTOR,), vectors, strict=False))
            x, _, _ = layer(x, position_embeddings=(cos, sin), attention_mask=mask, past_key_values=None, **more)
            out.append(x)
        states = model.norm(last.float() if self.in_float32 else last).float()
        if self.projects:
            states = model.embedding_projection(states)
        weights = pooled.unsqueeze(-1).float()
        vector = (states * weights).sum(1) / weights.sum(1).clamp(min=LEAST_TOKENS)
        for dense in self.behind:
            vector = dense(vector)
        length = vector.square().sum(-1, keepdim=True).sqrt().clamp(min=LEAST_LENGTH)
        return (*out, states, vector / length)


class Whole(nn.Module):
    """The parts under the name of their graph, as those of a pair are."""

    def __init__(self, parts: EncoderParts):
        super().__init__()
        self.graphs = nn.ModuleDict({ENCODER: parts})

    def forward(self, ends: list[torch.Tensor], parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """See `EncoderParts`."""
        made: tuple[torch.Tensor, ...] = self.graphs[ENCODER](ends, parts)
        return made


def export_encoder(
    config: ModelConfig,
    scheme: Form,
    contract: GraphContract,
    *,
    embed_scale: str = "exact",
    rescaling: Rescaling | None = None,
    storage: Storage | None = None,
) -> dict[str, ir.Model]:
    """The graph of an encoder, by its name.

    Raises:
        ExportError: the patched model could not be traced or simplified.
    """
    skeleton = build_skeleton(
        config,
        scheme,
        iter_num=0,
        context=contract.context,
        keep_last=False,
        embed_scale=embed_scale,
        rescaling=rescaling,
        storage=storage,
    )
    assert config.sentence is not None
    stored = patched_module("quantization_vacc").StoredLinear
    dtype = DENSE_DTYPES.get(scheme, torch.float16)
    dense = [
        stored(torch.zeros((), dtype=dtype).expand(layer.out_features, layer.in_features))
        for layer in config.sentence.dense
    ]
    whole = Whole(EncoderParts(skeleton, dense))
    model = trace(whole, _inputs(skeleton, contract), _free(skeleton) if contract.dynamic else None)
    inputs = [value.name or "" for value in model.graph.inputs]
    names = parameter_names(whole, config)
    for number, layer in enumerate(config.sentence.dense):
        names = {
            traced: f"{layer.name}.weight" if own == f"{BEHIND}{number}.weight" else own
            for traced, own in names.items()
        }
    hide_weights(model, names)
    fold_constants(model)
    name_module_outputs(model)
    widen(model)
    outputs = [value.name or "" for value in model.graph.outputs]
    model, _ = simplify(model, used_functions(model, OPSET))
    borders = _borders(skeleton, inputs, outputs)
    prefixes = {f"layer.{one.template}": f"model.layers.{k}." for k, one in enumerate(config.templates)}
    made = _stamped(model, stamp.cut(model, borders, prefixes), config, contract)
    made.opset_imports.update({node.domain: 1 for node in made.graph if node.domain})
    for function in used_functions(made, OPSET):
        made.functions[function.identifier()] = function
    return {ENCODER: made}


def _inputs(skeleton: Skeleton, contract: GraphContract) -> tuple[Any, ...]:
    """Zero-storage inputs of the shapes the graph will have, of any shapes where it is dynamic."""
    batch, seq = (contract.batch, contract.prefill) if not contract.dynamic else DYNAMIC_SIZES[:2]

    def zeros(*shape: int, dtype: torch.dtype = skeleton.dtype) -> torch.Tensor:
        return torch.zeros((), dtype=dtype).expand(shape)

    def part(layer: LayerSpec) -> tuple[torch.Tensor, ...]:
        turns = [zeros(batch, seq, layer.head_dim, dtype=skeleton.score_dtype) for _ in range(2)]
        mask = zeros(batch, 1, seq, seq, dtype=skeleton.score_dtype)
        vectors = [] if layer.per_layer is None else [zeros(batch, seq, layer.per_layer.size)]
        return (zeros(batch, seq, contract.hidden_size), *turns, mask, *vectors)

    ids = [torch.ones(batch, seq, dtype=torch.int64) for _ in range(3)]
    ends = [ids[0], ids[1], zeros(batch, seq, contract.hidden_size), ids[2]]
    return ends, [part(layer) for layer in skeleton.templates]


def _free(skeleton: Skeleton) -> tuple[Any, ...]:
    """Which dimensions of `_inputs` are free."""
    free = torch.export.Dim.DYNAMIC
    row = {0: free, 1: free}
    mask = {0: free, 2: free, 3: free}
    parts = [(row, row, row, mask, *[row] * (layer.per_layer is not None)) for layer in skeleton.templates]
    return [row, row, row, row], parts


def _borders(skeleton: Skeleton, inputs: list[str], outputs: list[str]) -> list[TraceBorder]:
    """Which trace inputs and outputs belong to which part, in the order of `EncoderParts.forward`."""
    ids, real, last, pooled, *rest = inputs
    names, outs = iter(rest), iter(outputs)
    made = [f"{what}.{kind}" for kind in skeleton.kinds for what in ("mask", "cos", "sin")]
    borders = [
        TraceBorder(
            "prologue",
            ((ids, "input_ids"), (real, "attention_mask")),
            tuple((next(outs), name) for name in ("hidden", *["vectors"] * skeleton.adds_vectors, *made)),
        )
    ]
    for layer in skeleton.templates:
        read = ("hidden", "cos", "sin", "mask", *[VECTOR] * (layer.per_layer is not None))
        fields = tuple((next(names), name) for name in read)
        borders.append(TraceBorder(f"layer.{layer.template}", fields, ((next(outs), "hidden"),)))
    behind = tuple((next(outs), name) for name in (TOKEN_STATES, TEXT_VECTORS))
    return [*borders, TraceBorder("epilogue", ((last, "hidden"), (pooled, "attention_mask")), behind)]


def _stamped(
    source: ir.Model, templates: dict[str, stamp.Template], config: ModelConfig, contract: GraphContract
) -> ir.Model:
    """Prologue, every layer, epilogue."""
    build = stamp.Builder(source, contract, ENCODER)
    shared = build.place(templates["prologue"], dict(build.inputs), "prologue.")
    hidden = shared["hidden"]
    if "vectors" in shared:
        shared["vectors"].name = PER_LAYER_VECTORS
    for layer in config.layers:
        inputs = {"hidden": hidden, **{what: shared[f"{what}.{layer.kind}"] for what in ("cos", "sin", "mask")}}
        if layer.per_layer is not None:
            inputs[VECTOR] = stamp.vector_of(build, shared["vectors"], layer)
        hidden = build.place(templates[f"layer.{layer.template}"], inputs, layer.prefix)["hidden"]
    mask = build.inputs["attention_mask"]
    made = build.place(templates["epilogue"], {"hidden": hidden, "attention_mask": mask}, "epilogue.")
    return build.finish(made, dict(source.opset_imports))
