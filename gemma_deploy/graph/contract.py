"""Names, dtypes and shapes at the border of the graphs (docs/design.md 4.3), written once.

iter0: input_ids, attention_mask, position_ids [B,P] -> logits [B,1,V], present.{i}.key/value [B,Hk,P,D].
iter1: input_ids, position_ids [B,1], attention_mask [B,C+1], past_key_values.{i}.key/value [B,Hk,C,D] ->
logits [B,1,V], present.{i}.key/value [B,Hk,1,D] (the new entries only).

A stage (`split.points`) reads inputs_embeds [B,S,H] in the place of input_ids, or gives hidden_states in the place of
logits, of several streams [B,S,streams,H]; its caches are those of its own layers, which keep the whole model's
numbers. Where layers add vectors of tokens, those of layers that are not done yet pass, per_layer_vectors
[B,S,layers,size] and next_per_layer_vectors. New keys and values that a later stage reads enter it as
shared.{i}.key/value [B,Hk,S,D], and in iter1 a copy of that cache; behind a layer that reads another's, the last
position of a prompt passes alone. A rank's caches hold its heads.

In dynamic graphs B, new tokens and cache slots are free, and P and C the largest lengths there may be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gemma_deploy.bounds import Count, Size
from gemma_deploy.partition.ranks import kv_heads_of
from gemma_deploy.schemes import Form

if TYPE_CHECKING:
    from gemma_deploy.checkpoint.config import ModelConfig
    from gemma_deploy.partition import ArtifactPart

GRAPHS = ("iter0", "iter1")
PREFILL, DECODE = GRAPHS
ENTERING, LEAVING = "inputs_embeds", "hidden_states"  # of a stage that does not embed, or has no head
ENTERING_VECTORS, LEAVING_VECTORS = "per_layer_vectors", "next_per_layer_vectors"  # likewise, where layers add some
BORROWED, PRESENT, PAST_CACHE = "shared", "present", "past_key_values"  # begin names of keys and values, `.{i}.key`
# Of an encoder: what leaves the last norm, and the vector of each text; named as sentence-transformers' exports are.
TOKEN_STATES, TEXT_VECTORS = "last_hidden_state", "sentence_embedding"
ENCODER = "model"  # its one graph, without `.onnx`; and that of a drafter
SHARED_KV = "shared_kv_states"  # keys and values that a drafter reads, as transformers names them
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "past_sequence + sequence"


@dataclass(frozen=True)
class Port:
    """One graph input or output; a free dimension has a name."""

    name: str
    dtype: str
    shape: tuple[Count | str, ...]


@dataclass(frozen=True)
class AdapterSlots:
    """What a graph takes of a LoRA adapter beside its weights: for every linear, two matrices that are optional inputs.

    Args:
        rank: the largest that an adapter may have; the graph itself takes any.
        dtype: of the matrices, that of the activations.
        linears: module path -> (input channels, output channels).
    """

    rank: Size
    dtype: str
    linears: dict[str, tuple[Size, Size]]

    def inputs(self, module: str) -> tuple[Port, Port]:
        """`lora_A` [in, rank] and `lora_B` [rank, out] of a linear; its output becomes W x + lora_B^T lora_A^T x.

        Every linear has a rank of its own, 0 by default: ONNX Runtime shares buffers of values with equal free names.
        """
        entering, leaving = self.linears[module]
        rank = f"{module}.rank"
        return (
            Port(f"{module}.lora_A", self.dtype, (entering, rank)),
            Port(f"{module}.lora_B", self.dtype, (rank, leaving)),
        )


@dataclass(frozen=True)
class GraphContract:
    """Sizes of a pair of static graphs.

    Args:
        batch: B; prefill: P, length of iter0; context: C, cache slots of iter1; dynamic: batch and lengths are free.
        cache_dtype: of past_key_values and present: float16 in fp16 artifacts, float32 in all others, or int8. Codes
            have their scales beside them, `.key_scale` and `.value_scale` [B,Hk,C,1] float16, for each head and token.
        hidden_size: H; hidden_dtype: of what passes between stages, float16 in fp16 artifacts.
        first_layer: `layers` are counted from it; embeds, heads: whether token ids enter and logits leave.
        geometry: KV heads and head_dim of each layer of the whole model, (0, 0) of one without a cache; () where all
            have `kv_heads` and `head_dim`.
        vector_size: of what layers add of each token; vectors: layers from `first_layer` on, that is, how many vectors
            a stage reads of a token. 0 where layers add none.
        streams: that hidden states have between stages; 0 where there is one alone, without an axis of its own.
        sources: of each layer of the whole model, whose keys and values it reads; () where all read their own.
    """

    batch: int
    prefill: int
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    cache_dtype: str
    dynamic: bool = False
    hidden_size: int = 0
    hidden_dtype: str = "float32"
    first_layer: int = 0
    embeds: bool = True
    heads: bool = True
    geometry: tuple[tuple[int, int], ...] = ()
    vector_size: int = 0
    vectors: int = 0
    streams: int = 0
    sources: tuple[int, ...] = ()

    @property
    def beside_graphs(self) -> tuple[str, ...]:
        """Files that the export makes of the graphs, in the artifact."""
        return ()

    @property
    def graph_names(self) -> tuple[str, ...]:
        """Graphs of an artifact, or of one part of it."""
        return GRAPHS

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        scheme: Form,
        batch: int,
        *,
        prefill: int,
        context: int,
        dynamic: bool = False,
        ranks: int = 1,
        int8_cache: bool = False,
    ) -> GraphContract:
        """Contract of the whole of `config` compiled as `scheme`; of `ranks` ranks joined, with all their KV heads."""
        dtype = "float16" if scheme == "fp16" else "float32"
        kv_heads, head_dim, geometry = kv_shapes(config, ranks)
        return cls(
            batch=batch,
            prefill=prefill,
            context=context,
            layers=config.num_hidden_layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            geometry=geometry,
            vocab_size=config.vocab_size,
            cache_dtype="int8" if int8_cache else dtype,
            dynamic=dynamic,
            hidden_size=config.hidden_size,
            hidden_dtype=dtype,
            vector_size=0 if config.per_layer is None else config.per_layer.size,
            vectors=0 if config.per_layer is None else config.per_layer.layers,
            streams=0 if config.altup is None else config.altup.streams,
            sources=() if config.first_sharing is None else tuple(layer.keys_of for layer in config.layers),
        )

    def of_part(self, part: ArtifactPart) -> GraphContract:
        """Contract of one rank of one stage."""
        span = part.span
        return replace(
            self.of_rank(part.ranks),
            layers=span.stop - span.start,
            first_layer=span.start,
            embeds=span.embeds,
            heads=span.heads,
            vectors=self.vectors - span.start if self.vectors else 0,
        )

    def of_rank(self, ranks: int) -> GraphContract:
        """The same with the KV heads of one rank."""
        geometry = tuple((heads // ranks, size) for heads, size in self.geometry)
        return replace(self, kv_heads=self.kv_heads // ranks, geometry=geometry)

    @property
    def borrowed(self) -> tuple[int, ...]:
        """Layers of earlier stages whose keys and values those of this one read."""
        own = self.sources[self.first_layer : self.first_layer + self.layers]
        return tuple(sorted({source for source in own if source < self.first_layer}))

    def cut_in_front(self, graph: str, layer: int) -> bool:
        """Whether a layer gets the last position of a prompt alone: one before it reads another's keys and values."""
        return graph == PREFILL and any(source != number for number, source in enumerate(self.sources[:layer]))

    def kv_shape(self, layer: int) -> tuple[int, int]:
        """KV heads and head_dim of a layer, by its number in the whole model."""
        return self.geometry[layer] if self.geometry else (self.kv_heads, self.head_dim)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Inputs of `iter0` or `iter1`, in order."""
        batch, seq, keys = self._sizes(graph)
        own = range(self.first_layer, self.first_layer + self.layers)
        entering = 1 if self.cut_in_front(graph, self.first_layer) else seq
        ports = [Port("input_ids", "int64", (batch, seq)) if self.embeds else self._hidden(ENTERING, batch, entering)]
        if self.vectors and not self.embeds:
            ports.append(self._vectors(ENTERING_VECTORS, batch, entering, count=self.vectors))
        ports += [Port("attention_mask", "int64", (batch, keys)), Port("position_ids", "int64", (batch, seq))]
        ports += self._cache(BORROWED, seq, self.borrowed)
        if graph == DECODE:
            ports += self._cache(PAST_CACHE, PAST if self.dynamic else self.context, (*self.borrowed, *own))
        return tuple(ports)

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Outputs of `iter0` or `iter1`, in order."""
        batch, seq, _ = self._sizes(graph)
        leaving = 1 if self.cut_in_front(graph, self.first_layer + self.layers) else seq
        logits = Port("logits", "float32", (batch, 1, self.vocab_size))
        ports = [logits if self.heads else self._hidden(LEAVING, batch, leaving)]
        if self.vectors and not self.heads:
            ports.append(self._vectors(LEAVING_VECTORS, batch, leaving, count=self.vectors - self.layers))
        return (*ports, *self._cache(PRESENT, seq))

    def _hidden(self, name: str, batch: int | str, seq: int | str) -> Port:
        return Port(name, self.hidden_dtype, (batch, seq, *[self.streams] * bool(self.streams), self.hidden_size))

    def _vectors(self, name: str, batch: int | str, seq: int | str, *, count: int) -> Port:
        return Port(name, self.hidden_dtype, (batch, seq, count, self.vector_size))

    def keeps_last(self, graph: str) -> bool:
        """Whether the graph takes more than one token and slices the last before the LM head."""
        return graph == PREFILL or self.dynamic

    def to_json(self) -> dict[str, Any]:
        """Sizes and ports, for the manifest."""
        graphs = {
            graph: {
                "inputs": [asdict(port) for port in self.inputs(graph)],
                "outputs": [asdict(port) for port in self.outputs(graph)],
            }
            for graph in self.graph_names
        }
        sizes = asdict(self)
        where_there = ("geometry", "vector_size", "vectors", "adapters")  # the last of contracts that know adapters
        unsaid = {"streams", "sources", *(name for name in where_there if not sizes.get(name))}
        return {**{name: value for name, value in sizes.items() if name not in unsaid}, "graphs": graphs}

    def _sizes(self, graph: str) -> tuple[int | str, int | str, int | str]:
        """Batch, new tokens, columns of the attention mask."""
        if self.dynamic:
            return BATCH, SEQUENCE, SEQUENCE if graph == PREFILL else TOTAL
        return (self.batch, self.prefill, self.prefill) if graph == PREFILL else (self.batch, 1, self.context + 1)

    def _cache(self, prefix: str, length: int | str, layers: Iterable[int] | None = None) -> list[Port]:
        batch, ports = BATCH if self.dynamic else self.batch, []
        for i in range(self.first_layer, self.first_layer + self.layers) if layers is None else layers:
            heads, size = self.kv_shape(i)
            if not heads:
                continue
            shape = (batch, heads, self._positions(i, length), size)
            for part in ("key", "value"):
                ports.append(Port(f"{prefix}.{i}.{part}", self.cache_dtype, shape))
                if self.token_scales:
                    ports.append(Port(f"{prefix}.{i}.{part}_scale", "float16", (*shape[:3], 1)))
        return ports

    def _positions(self, layer: int, length: int | str) -> int | str:
        """Of a layer's cache, where most have `length`."""
        return length

    @property
    def token_scales(self) -> bool:
        """Whether every token's codes have a scale beside them, in a cache of its own."""
        return self.cache_dtype == "int8"

    @property
    def computed(self) -> GraphContract:
        """With the cache as attention computes it: what is traced, before its caches become codes."""
        return replace(self, cache_dtype=self.hidden_dtype) if self.cache_dtype == "int8" else self


@dataclass(frozen=True)
class EncoderContract(GraphContract):
    """One graph of an encoder: token ids and their mask -> hidden states, and a vector for each text.

    input_ids, attention_mask [B,S] int64 -> last_hidden_state [B,S,H] float32, behind the last norm and, where there is
    one, the projection of each token, and sentence_embedding [B,dimensions] float32, of length 1. S is P where the
    graph is static: texts are padded to it, on either side. There are no caches; `context` is the longest text.

    Args:
        dimensions: of a vector; token_size: H.
    """

    dimensions: int = 0
    token_size: int = 0

    @classmethod
    def of_encoder(cls, config: ModelConfig, *, batch: int, length: int, dynamic: bool) -> EncoderContract:
        """Contract of an encoder.

        Args:
            length: tokens of the longest text, or, where the graph is static, of every one with its padding.
        """
        assert config.sentence is not None  # what opens a checkpoint has read it
        return cls(
            batch=batch,
            prefill=length,
            context=length,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            cache_dtype="float32",
            dynamic=dynamic,
            hidden_size=config.hidden_size,
            dimensions=config.sentence.dimensions,
            token_size=config.token_size,
        )

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The name of the one graph."""
        return (ENCODER,)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Token ids, and which of them are real."""
        shape = self._lengths()
        return (Port("input_ids", "int64", shape), Port("attention_mask", "int64", shape))

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Hidden states of all tokens, padding too, and vectors."""
        batch, length = self._lengths()
        return (
            Port(TOKEN_STATES, "float32", (batch, length, self.token_size)),
            Port(TEXT_VECTORS, "float32", (batch, self.dimensions)),
        )

    def _lengths(self) -> tuple[int | str, int | str]:
        return (BATCH, SEQUENCE) if self.dynamic else (self.batch, self.prefill)


@dataclass(frozen=True)
class DrafterContract(GraphContract):
    """One graph of a drafter: a token and a hidden state of the model it guesses for -> logits, and the next state.

    inputs_embeds [1,1,2*backbone] float32: the embedding of the last token, scaled as that model scales it, and the
    hidden state behind its last norm; attention_mask [1,T] int64: T positions that have keys and values;
    shared_kv_states.{kind}.key/value [1,Hk,*,D] float32: those of that model's last layer of the kind, T of them at the
    front -> logits [1,1,V], last_hidden_state [1,1,backbone]. The token stands at position T, however often the graph
    runs for guesses in a row.

    Args:
        backbone: hidden size of that model.
        kinds: kinds of layers, and KV heads and head_dim of each.
    """

    backbone: int = 0
    kinds: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of_drafter(cls, config: ModelConfig, *, context: int) -> DrafterContract:
        """Contract of a drafter for texts of `context` positions."""
        assert config.drafting is not None
        return cls(
            batch=1,
            prefill=1,
            context=context,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            cache_dtype="float32",
            dynamic=True,
            hidden_size=config.hidden_size,
            backbone=config.drafting.backbone,
            kinds=tuple((layer.kind, layer.kv_heads, layer.head_dim) for layer in config.templates),
        )

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The name of the one graph."""
        return (ENCODER,)

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Token and state, positions, keys and values."""
        shared = (
            Port(f"{SHARED_KV}.{kind}.{part}", "float32", (1, heads, f"{kind}.capacity", size))
            for kind, heads, size in self.kinds
            for part in ("key", "value")
        )
        states = Port(ENTERING, "float32", (1, 1, 2 * self.backbone))
        return (states, Port("attention_mask", "int64", (1, "total_sequence")), *shared)

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Logits and the next state."""
        logits = Port("logits", "float32", (1, 1, self.vocab_size))
        return (logits, Port(TOKEN_STATES, "float32", (1, 1, self.backbone)))


def kv_shapes(config: ModelConfig, ranks: int = 1) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """KV heads and head_dim of most layers, and of each layer where they differ; of `ranks` ranks joined."""
    each = tuple(
        (kv_heads_of(layer.kv_heads, ranks) * ranks, layer.head_dim) if layer.cache_from is None else (0, 0)
        for layer in config.layers
    )
    heads, size = kv_heads_of(config.num_key_value_heads, ranks) * ranks, config.head_dim
    return heads, size, each if {*each} != {(heads, size)} else ()
