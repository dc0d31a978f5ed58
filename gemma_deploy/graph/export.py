"""Weightless export: a ModelConfig becomes the iter0 and iter1 graphs; no weight is read.

The steps, in order: skeleton -> disconnected -> trace -> passes -> cut and stamp -> function bodies. What leaves here
has initializers without data, named like the checkpoint's tensors; external.py points them into params.safetensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

import onnx_ir as ir
from torch import nn

from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.graph import stamp
from gemma_deploy.graph.collectives import LEVELS
from gemma_deploy.graph.contract import DECODE, GRAPHS, GraphContract
from gemma_deploy.graph.disconnected import GraphPair, dynamic_dimensions, example_inputs, own_name, parts_of
from gemma_deploy.graph.functions import used_functions
from gemma_deploy.graph.passes.fold import fold_constants
from gemma_deploy.graph.passes.name_outputs import name_module_outputs
from gemma_deploy.graph.passes.quantize_cache import quantize_cache
from gemma_deploy.graph.passes.round_activations import round_activations
from gemma_deploy.graph.passes.simplify import simplify
from gemma_deploy.graph.passes.weights import hide_weights
from gemma_deploy.graph.passes.widen import widen
from gemma_deploy.graph.skeleton import build_skeleton
from gemma_deploy.graph.trace import OPSET, trace
from gemma_deploy.names import FIRST_ROW, PER_LAYER_TABLE
from gemma_deploy.partition import ArtifactPart, whole
from gemma_deploy.quantization.rescaling import Rescaling
from gemma_deploy.schemes import Form, Storage

log = logging.getLogger(__name__)


def export_graphs(
    config: ModelConfig,
    scheme: Form,
    contract: GraphContract,
    *,
    embed_scale: str = "exact",
    rescaling: Rescaling | None = None,
    storage: Storage | None = None,
) -> dict[str, ir.Model]:
    """Both graphs of an undivided model.

    Args:
        embed_scale: `exact` or `bf16`, see docs/gemma-facts.md.
        rescaling: of float16 graphs; storage: see `build_skeleton`.

    Raises:
        ExportError: the patched model could not be traced or simplified.
        NotBuiltError: no patched model exists for this generation.
    """
    traced = Traced(config, scheme, contract, embed_scale=embed_scale, rescaling=rescaling, storage=storage)
    return traced.graphs(ArtifactPart(whole(config.num_hidden_layers)))


class Traced:
    """One trace, from which the graphs of every part of an artifact are stamped.

    Args:
        contract: of the whole model; ranks: among which every stage is divided; storage: see `build_skeleton`.
        unrounded: linears whose inputs are not rounded to 8 bits; None where none are.

    Raises:
        ExportError, NotBuiltError: see `export_graphs`.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme: Form,
        contract: GraphContract,
        *,
        embed_scale: str = "exact",
        rescaling: Rescaling | None = None,
        ranks: int = 1,
        storage: Storage | None = None,
        unrounded: Collection[str] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.config, self.contract, self.unrounded = config, contract, unrounded
        local = contract.computed.of_rank(ranks)
        skeletons = {
            graph: build_skeleton(
                config,
                scheme,
                iter_num=int(graph == DECODE),
                context=contract.context,
                keep_last=contract.keeps_last(graph),
                embed_scale=embed_scale,
                rescaling=rescaling,
                ranks=ranks,
                storage=storage,
            )
            for graph in GRAPHS
        }
        pair = GraphPair(skeletons)
        args = {
            graph: example_inputs(skeletons[graph], local, graph, hidden_size=config.hidden_size) for graph in GRAPHS
        }
        free = {graph: dynamic_dimensions(skeletons[graph], graph) for graph in GRAPHS} if contract.dynamic else None
        model = trace(pair, (args,), None if free is None else (free,))
        inputs = [value.name or "" for value in model.graph.inputs]
        traced = len(model.graph)
        hidden = hide_weights(model, parameter_names(pair, config))
        folded = fold_constants(model)
        named = name_module_outputs(model)
        widened = widen(model)
        outputs = [value.name or "" for value in model.graph.outputs]
        self.model, removed = simplify(model, used_functions(model, OPSET))
        log.debug(
            "%d nodes traced: %d weights hidden, %d nodes folded, %d module outputs named, %d operators widened, "
            "%d nodes simplified away; %d left, %.2f s",
            traced, hidden, folded, named, widened, removed, len(self.model.graph), time.perf_counter() - started,
        )  # fmt: skip
        names = iter(inputs), iter(outputs)
        parts = {graph: parts_of(skeletons[graph], *names, graph=graph) for graph in GRAPHS}
        prefixes = {f"layer.{one.template}": f"model.layers.{k}." for k, one in enumerate(config.templates)}
        self.templates = {graph: stamp.cut(self.model, parts[graph], prefixes) for graph in GRAPHS}

    def graphs(self, part: ArtifactPart) -> dict[str, ir.Model]:
        """Both graphs of a part, function bodies included."""
        return {graph: self._stamped(graph, part) for graph in GRAPHS}

    def _stamped(self, graph: str, part: ArtifactPart) -> ir.Model:
        contract = self.contract.of_part(part)
        model = stamp.stamp(
            self.model, self.templates[graph], self.config.layers, contract=contract.computed, graph=graph
        )
        caches = rounded = 0
        if contract.cache_dtype == "int8":
            caches = quantize_cache(model, contract, graph, layers=self.config.layers)
        if part.ranks > 1:
            for name, first in model.graph.initializers.items():
                if name.endswith(FIRST_ROW):
                    row = part.rank * (self._rows(name.removesuffix(FIRST_ROW)) // part.ranks)
                    first.const_value = ir.tensor([row], dtype=ir.DataType.INT64, name=name)
        if self.unrounded is not None:
            rounded = round_activations(model, self.unrounded)
        log.debug(
            "%s stamped: %d nodes, %d int8 caches, %d inputs of linears rounded",
            part.file(graph), len(model.graph), caches, rounded,
        )  # fmt: skip
        model.opset_imports.update({node.domain: 1 for node in model.graph if node.domain})
        for function in used_functions(model, OPSET):
            model.functions[function.identifier()] = function
        return model

    def _rows(self, module: str) -> int:
        """Of a table, or the experts of a layer, in all ranks."""
        layer, vectors = self.config.layer_of(module), self.config.per_layer
        if layer is not None:
            return 0 if layer.experts is None else layer.experts.count
        return vectors.rows if vectors is not None and module == PER_LAYER_TABLE else self.config.vocab_size


def parameter_names(pair: nn.Module, config: ModelConfig) -> dict[str, str]:
    """Name in the trace -> name in the parameter file, for every parameter and buffer of both graphs."""
    names = [name for name, _ in pair.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in pair.named_buffers(remove_duplicate=False)]
    mapping = {}
    experts = [layer.experts for layer in config.templates if layer.experts is not None]
    stacks = tuple(f".{name}" for one in experts for name in (one.gate_up, one.down))
    for name in names:
        target = own_name(name).replace("model.rotary.", "model.rotary_emb.")
        for level in LEVELS:
            target = target.replace(level, ".")
        if target.removesuffix(".weight").endswith(stacks):
            target = target.removesuffix(".weight")
        if config.tie_word_embeddings and target.startswith("lm_head."):
            target = target.replace("lm_head.", "model.embed_tokens.")
        mapping[name] = target
    return mapping
