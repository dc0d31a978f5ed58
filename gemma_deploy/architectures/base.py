"""What a generation of Gemma is, as data: which tensors a layer has, what reads what, and how the files name it.

A generation is one module here with an `Architecture`, and a row in `ROWS` (__init__.py). All other parts ask the row:
none of them names a model type, and none spells the linears of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from gemma_deploy.architectures.blocks import AltUp, Experts, Laurel, PerLayer, PerLayerTable
from gemma_deploy.architectures.drafting import Drafting
from gemma_deploy.architectures.gguf import Gguf
from gemma_deploy.architectures.keys import ConfigKeys

LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["gelu", "gelu_pytorch_tanh"]
Axis = Literal["rows", "columns"]

FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"
LAYER_TYPES: tuple[LayerType, ...] = (FULL, SLIDING)
# Keys that the patched config classes add to the stock ones, with what they have in ordinary use.
SWITCHES: Mapping[str, Any] = {"iter_num": None, "insert_slice": False, "embed_scale": "exact"}
EXACT_GELU: Activation = "gelu"
TANH_GELU: Activation = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer: base frequency and linear position divisor.

    Args:
        rotated: share of the channel pairs that turn, the first ones; frequencies are those of all pairs.
    """

    theta: float
    factor: float = 1.0
    rotated: float = 1.0

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values; without `rotated` where all pairs turn."""
        plain = asdict(self)
        return plain if self.rotated != 1.0 else {"theta": self.theta, "factor": self.factor}


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer, [out_features, in_features].

    Args:
        name: within the layer, `self_attn.q_proj`.
    """

    name: str
    out_features: int
    in_features: int

    @property
    def kind(self) -> str:
        """The name's last part, `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class InputGroup:
    """Linears of a layer that read one tensor.

    Args:
        readers: names within the layer, in the order in which they lie in the parameter file; of an attention's, that
            of the queries first.
        norm: the norm that makes the tensor, whose gain can absorb a factor for each channel; None where none does.
        maker: the linear of whose rows the tensor's channels are weighted sums, or products with something else, so
            that its rows can absorb such factors; None where none does.
        fused: name of one linear that does the work of all.
    """

    readers: tuple[str, ...]
    norm: str | None = None
    maker: str | None = None
    fused: str = ""

    @property
    def observed(self) -> str:
        """The linear after which the tensor is called."""
        return self.readers[0]

    @property
    def label(self) -> str:
        """The tensor's name in tables and pictures: `q/k/v input`, `o_proj input`."""
        kinds = [reader.rpartition(".")[2] for reader in self.readers]
        return ("/".join(kind.removesuffix("_proj") for kind in kinds) if len(kinds) > 1 else kinds[0]) + " input"


@dataclass(frozen=True)
class Branch:
    """Something that is added to the residual stream: x + post_norm(output(module(norm(x)))).

    Args:
        module: that holds what lies between, `self_attn`; norm: in front of it.
        entry, exit: the input groups at both ends.
        post_norm: before the sum, or None.
        inner: modules between the norm and the last linear, in the order in which they run.
        attends: whether it reads other positions.
        between: what stands between the inner modules and the last linear, for people.
    """

    module: str
    norm: str
    entry: InputGroup
    exit: InputGroup
    post_norm: str | None
    inner: tuple[str, ...]
    attends: bool = False
    between: str = ""

    @property
    def output(self) -> str:
        """The linear whose result is added."""
        return self.exit.observed


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. Layers of a model may differ in all of it.

    Args:
        index: in the model.
        kind: of attention; decides the mask and the rotary table.
        template: layers of one template have the same graph but for their weights.
        heads: of queries; kv_heads: of keys and values; head_dim: of all of them.
        intermediate_size: width of the MLP.
        window: positions that a query sees, itself included; None for all. Of an encoder as many on either side.
        rope: of its kind; attention_scale: by which scores are multiplied.
        linears: in file order.
        branches: in running order.
        head_norms: (linear, norm of each of its heads).
        caches: ("key" or "value", the linear it comes from); both from one linear where keys are values.
        cache_from: the layer whose keys and values it reads; None where it has its own. norms: of the hidden size.
        value_norm: the norm without weights of each head of values; None where they have none.
        per_layer: what it adds of a vector for each token; None: nothing.
        experts: beside the MLP; None where it has none. `linears` has neither their matrices nor their router.
        scalar: the number in the file by which the residual stream is multiplied behind the layer; None for no such.
        laurel: a residual of low rank beside attention; None: there is none.
        altup: how it carries several streams along; None where there is one stream.
        sparsity: share of the MLP's gates that would be zero, were they normal: gelu(relu(gate - mean - q std)), q
            being that quantile of the normal distribution; 0 for gelu(gate).
    """

    index: int
    kind: LayerType
    template: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None
    rope: Rope
    attention_scale: float
    linears: tuple[Linear, ...]
    branches: tuple[Branch, ...]
    head_norms: tuple[tuple[str, str], ...]
    caches: tuple[tuple[str, str], ...]
    norms: tuple[str, ...]
    cache_from: int | None = None
    value_norm: str | None = None
    per_layer: PerLayer | None = None
    experts: Experts | None = None
    scalar: str | None = None
    laurel: Laurel | None = None
    altup: AltUp | None = None
    sparsity: float = 0.0

    @property
    def prefix(self) -> str:
        """Of its modules' paths: `model.layers.3.`."""
        return f"model.layers.{self.index}."

    @property
    def keys_of(self) -> int:
        """The layer whose keys and values it reads: itself where it has some."""
        return self.index if self.cache_from is None else self.cache_from

    @property
    def groups(self) -> tuple[InputGroup, ...]:
        """Input groups in running order."""
        found = [group for branch in self.branches for group in (branch.entry, branch.exit)]
        if (beside := self.laurel) is not None:  # adds what attention reads to the stream: its norm absorbs no factor
            readers = (*found[0].readers, beside.left)
            found[:1] = replace(found[0], readers=readers, norm=None), InputGroup((beside.right,))
        behind = () if self.per_layer is None else self.per_layer.linears
        return (*found, *(InputGroup((name,)) for name in behind))

    @property
    def carried(self) -> int:
        """Values of a token between two layers: the hidden size, of several streams that of each."""
        return self.hidden_size * (1 if self.altup is None else self.altup.streams)

    @property
    def scoring(self) -> tuple[str, ...]:
        """The linears of queries and, where they are the layer's own, of keys, whose products are the scores."""
        attention = next(branch for branch in self.branches if branch.attends)
        return (attention.entry.observed, *(maker for part, maker in self.caches if part == "key"))

    @property
    def scored(self) -> tuple[str, ...]:
        """What becomes queries and keys: the norms of their heads where there are some, else their linears."""
        norms = dict(self.head_norms)
        return tuple(norms.get(name, name) for name in self.scoring)

    def linear(self, name: str) -> Linear:
        """The linear of that name.

        Raises:
            KeyError: it has none.
        """
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(name)

    def feeding_rows(self, group: InputGroup) -> tuple[int, ...] | None:
        """Row of a group's maker that feeds each channel of the group; None where every channel has its own.

        A value head feeds those of all query heads that read it.
        """
        if group.maker is None or group.maker != dict(self.caches).get("value"):
            return None
        shared, size = self.heads // self.kv_heads, self.head_dim
        return tuple(head // shared * size + channel for head in range(self.heads) for channel in range(size))

    @property
    def small(self) -> tuple[str, ...]:
        """Matrices of a few numbers that every artifact has in float32: routers, and what mixes streams."""
        router = () if self.experts is None else (self.experts.router,)
        return (*router, *(() if self.altup is None else self.altup.coefficients(self.hidden_size)))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names within the layer and shapes, in file order."""
        shapes: dict[str, tuple[int, ...]] = {one.name: (one.out_features, one.in_features) for one in self.linears}
        shapes |= {norm: (self.head_dim,) for _, norm in self.head_norms}
        shapes |= {norm: (self.hidden_size,) for norm in self.norms}
        if self.altup is not None:
            shapes |= self.altup.coefficients(self.hidden_size)
        named = {f"{name}.weight": shape for name, shape in shapes.items()}
        if self.experts is not None:
            named |= self.experts.tensors(self.hidden_size)
        if self.altup is not None:
            named[self.altup.scale] = (self.hidden_size,)
        return named if self.scalar is None else {**named, self.scalar: (1,)}

    def points(self) -> tuple[str, ...]:
        """What its modules make, `MODULE.out`, and what last linears read, `MODULE.in`, in running order."""
        found: list[str] = []
        for branch in self.branches:
            found.append(f"{branch.norm}.out")
            if branch.attends and self.laurel is not None:
                found += [f"{name}.out" for name in (self.laurel.left, self.laurel.right, self.laurel.norm)]
            found += [f"{name}.out" for name in branch.inner]
            found += [f"{branch.output}.in", f"{branch.output}.out"]
            if self.experts is not None and branch is self.branches[-1]:
                found += [f"{name}.out" for name in self.experts.running]
            found += [f"{branch.post_norm}.out"] if branch.post_norm else []
        if (add := self.per_layer) is not None:
            found += [f"{add.gate}.out", f"{add.projection}.in", f"{add.projection}.out", f"{add.norm}.out"]
        return tuple(found)


class Sizes(Protocol):
    """What of a model's config its layers are made from; `checkpoint.ModelConfig` has it."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def intermediate_size(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def num_key_value_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def layer_types(self) -> tuple[LayerType, ...]: ...  # noqa: D102
    @property
    def sliding_window(self) -> int | None: ...  # noqa: D102
    @property
    def rope(self) -> Mapping[LayerType, Rope]: ...  # noqa: D102
    @property
    def query_pre_attn_scalar(self) -> float: ...  # noqa: D102
    @property
    def raw(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Facts:
    """What a generation reads of a config.json in its own way."""

    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    rope: dict[LayerType, Rope]
    query_pre_attn_scalar: float
    max_position_embeddings: int
    hidden_activation: Activation = TANH_GELU
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Patched:
    """Files and classes of source_code/.

    Args:
        configuration, modeling: modules; config_class, stack, causal, classifier: classes in them. No causal one
            of what has no head, no classifier where transformers has none.
        layer_types: whether the config class has a kind for each layer.
    """

    configuration: str
    config_class: str
    modeling: str
    stack: str
    causal: str | None
    classifier: str | None
    layer_types: bool = True

    @property
    def additions(self) -> dict[str, Any]:
        """Keys of config.json by which transformers finds them as remote code, and those they add to the stock ones."""
        auto_map = {
            "AutoConfig": f"{self.configuration}.{self.config_class}",
            "AutoModel": f"{self.modeling}.{self.stack}",
        }
        if self.causal is not None:
            auto_map["AutoModelForCausalLM"] = f"{self.modeling}.{self.causal}"
        if self.classifier is not None:
            auto_map["AutoModelForSequenceClassification"] = f"{self.modeling}.{self.classifier}"
        return {"auto_map": auto_map, **SWITCHES}


def part_keys(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    """Keys of config.json by which the patched classes have these layers, and no others."""
    return {"num_hidden_layers": len(layers), "layer_types": [layer.kind for layer in layers]}


@dataclass(frozen=True)
class Architecture:
    """A generation.

    Args:
        name: for people; model_type: in config.json; multimodal: model types whose language model it is.
        text_defaults: what their `text_config` may leave out; text_type: its model type, where it is another.
        around: keys beside it that are read.
        transformers_type: the model type under which transformers has its class; causal_class: that class.
        genai_type: `model.type` of genai_config.json; activation_key: of config.json.
        norm_offset: norms multiply by this plus their weight.
        encoder: positions see those behind them as well; there is neither cache nor LM head, texts become vectors.
        written_as: the model type that config.json says of an encoder, beside `use_bidirectional_attention`.
        gguf: what llama.cpp calls all that; None where it has no such model.
        read: the generation's own keys of a config.json; layers: their number, or 1 where that is wrong.
        layer: the layer of a number; branches: all that some layer has.
        per_layer: the vectors that layers add, and their table; None where they add none.
        token_size: channels that an encoder's hidden states are projected to behind the last norm; None: they are not.
        listed: sizes that config.json may say as a list, one for each layer.
        part_keys: of config.json, by which the patched classes have some layers and no others.
        positions_first: whether heads are normed as [batch, positions, heads, head_dim].
        causal_text: what `use_bidirectional_attention` may say, because text stays causal with it.
        vllm, openvino, tvm: whether vLLM's `causal_class` was seen to compute it; whether backends/openvino builds it.
    """

    name: str
    model_type: str
    transformers_type: str
    causal_class: str
    genai_type: str
    activation_key: str
    patched: Patched
    gguf: Gguf | None
    read: Callable[[ConfigKeys, Mapping[str, int], int], Facts]
    layer: Callable[[Sizes, int], LayerSpec]
    branches: tuple[Branch, ...]
    multimodal: tuple[str, ...] = ()
    text_defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 1.0
    encoder: bool = False
    written_as: str = ""
    per_layer: Callable[[Sizes], PerLayerTable | None] = lambda config: None
    token_size: Callable[[Sizes], int | None] = lambda config: None
    listed: tuple[str, ...] = ()
    part_keys: Callable[[Sequence[LayerSpec]], dict[str, Any]] = part_keys
    positions_first: bool = False
    causal_text: tuple[str, ...] = ()
    text_type: str = ""
    around: tuple[str, ...] = ()
    vllm: bool = False
    openvino: bool = False
    tvm: bool = False
