"""The facts about a Gemma that every later stage needs, read from config.json and checked all at once.

First step of the data path: raw dictionary -> ModelConfig. Reads no file and no weight (see checkpoint.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from gemma_deploy.architectures import (
    Activation,
    AltUp,
    Architecture,
    Drafting,
    LayerSpec,
    LayerType,
    PerLayerTable,
    Rope,
    architecture_of,
    model_types,
    multimodal_types,
    names,
    nearest,
    of_config,
)
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.checkpoint.nested import language_model
from gemma_deploy.checkpoint.quantized import settings
from gemma_deploy.checkpoint.sentence import SentenceHead
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT, LAYERS

REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
LARGEST = {"num_hidden_layers": 1024}


@dataclass(frozen=True)
class ModelConfig:
    """What the weights mean.

    `layer_types` has one entry per layer, `rope` one per kind that occurs in it. Sizes are those of most layers;
    `layers` says what each one has. `sentence` is what stands behind an encoder's last norm, from the files beside
    config.json; None of a decoder. `drafting` is how a drafter is joined to the model it guesses for; None of others.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    query_pre_attn_scalar: float
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    rope: dict[LayerType, Rope]
    hidden_activation: Activation
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    bos_token_id: int | None
    pad_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)  # they name the file
    sentence: SentenceHead | None = None
    drafting: Drafting | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Check a config.json and fill what it may leave out, as transformers' config classes do.

        Args:
            raw: the parsed config.json.
            where: the file, for messages.

        Raises:
            CheckpointError: listing every wrong or missing key.
        """
        return _parse(language_model(ConfigKeys(raw, where)))

    @property
    def architecture(self) -> Architecture:
        """The row of the model's generation."""
        return architecture_of(self.model_type)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each decoder layer computes, in model order."""
        return tuple(self.architecture.layer(self, index) for index in range(self.num_hidden_layers))

    @cached_property
    def per_layer(self) -> PerLayerTable | None:
        """The vectors that layers add, and their table; None where they add none."""
        return self.architecture.per_layer(self)

    @property
    def token_size(self) -> int:
        """Channels of what a stack gives of each token: behind the projection where an encoder has one."""
        return self.architecture.token_size(self) or self.hidden_size

    @property
    def projects_tokens(self) -> bool:
        """Whether an encoder's hidden states are projected behind the last norm."""
        return self.architecture.token_size(self) is not None

    @property
    def altup(self) -> AltUp | None:
        """How layers carry several streams along; None where there is one stream."""
        return self.layers[0].altup

    @property
    def carried(self) -> int:
        """Values of a token between two layers."""
        return self.layers[0].carried

    @property
    def reads_beside(self) -> bool:
        """Whether layers read more than hidden states: vectors of each token, or keys and values of earlier layers."""
        return self.per_layer is not None or self.first_sharing is not None

    @property
    def has_experts(self) -> bool:
        """Whether layers have experts beside their MLP."""
        return any(layer.experts is not None for layer in self.templates)

    @property
    def first_sharing(self) -> int | None:
        """The first of the layers at the end that read keys and values of earlier ones; None where none do."""
        return next((layer.index for layer in self.layers if layer.cache_from is not None), None)

    @cached_property
    def cache_sources(self) -> tuple[LayerSpec, ...]:
        """The layers whose keys and values later ones read, in model order."""
        sources = {layer.cache_from for layer in self.layers}
        return tuple(layer for layer in self.layers if layer.index in sources)

    def layer_of(self, name: str) -> LayerSpec | None:
        """The layer of a module or tensor, by its path; None where it is no layer's."""
        if not name.startswith(LAYERS):
            return None
        return self.layers[int(name.removeprefix(LAYERS).partition(".")[0])]

    @property
    def templates(self) -> tuple[LayerSpec, ...]:
        """The first layer of every template, in the order in which they occur."""
        found: dict[str, LayerSpec] = {}
        for layer in self.layers:
            found.setdefault(layer.template, layer)
        return tuple(found.values())

    @property
    def head_weight(self) -> str:
        """Name of the matrix the LM head multiplies by: the token table where the two are tied."""
        return EMBEDDING_WEIGHT if self.tie_word_embeddings else HEAD_WEIGHT

    def generation_ids(self) -> dict[str, Any]:
        """The ids of a generation_config.json, for a checkpoint that has no such file of its own."""
        ids = {
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        return {key: value for key, value in ids.items() if value not in (None, [])}

    @property
    def head_reads_table(self) -> bool:
        """Whether there is an LM head, and it multiplies by the token table."""
        return self.tie_word_embeddings and not self.architecture.encoder

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the raw config, for the manifest."""
        plain = {key: value for key, value in asdict(self).items() if key != "raw"}
        plain["rope"] = {kind: rope.to_dict() for kind, rope in self.rope.items()}
        for key in ("sentence", "drafting"):
            if plain[key] is None:
                del plain[key]
        return plain | {key: list(plain[key]) for key in ("layer_types", "eos_token_ids", "warnings")}


def _parse(keys: ConfigKeys) -> ModelConfig:
    """Read all keys, and raise once."""
    row = _architecture(keys)
    _refuse_unbuilt(keys, row)
    size = {key: _size(keys, key, row) for key in REQUIRED_SIZES}
    _check_heads(keys, size)
    layers, vocab = size["num_hidden_layers"], size["vocab_size"]
    facts = row.read(keys, size, layers if layers <= LARGEST["num_hidden_layers"] else 1)
    config = ModelConfig(
        model_type=row.model_type,
        **size,
        rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=facts.max_position_embeddings,
        query_pre_attn_scalar=facts.query_pre_attn_scalar,
        sliding_window=facts.sliding_window,
        layer_types=facts.layer_types,
        rope=facts.rope,
        hidden_activation=facts.hidden_activation,
        attn_logit_softcapping=facts.attn_logit_softcapping,
        final_logit_softcapping=facts.final_logit_softcapping,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", True) or row.encoder,  # which has no head
        bos_token_id=_token(keys, "bos_token_id", 2, vocab),
        pad_token_id=_token(keys, "pad_token_id", 0, vocab),
        eos_token_ids=_stop_tokens(keys, vocab),
        raw={key: value for key, value in keys.raw.items() if key != settings.KEY},  # what is read are floats
        warnings=tuple(keys.warnings),
        sentence=None,  # of files beside it
        drafting=facts.drafting,
    )
    if keys.problems:
        raise CheckpointError(
            f"{len(keys.problems)} wrong or missing key(s) in the model's config",
            where=keys.where,
            problems=keys.problems,
            next_step="take config.json from the place the weights came from",
        )
    return config


def _size(keys: ConfigKeys, key: str, row: Architecture) -> int:
    """A size; that of most layers where there is one for each."""
    given = keys.raw.get(key)
    if key not in row.listed or not isinstance(given, list):
        return keys.integer(key, most=LARGEST.get(key, 2**31))
    layers = keys.raw.get("num_hidden_layers")
    if len(given) != layers or any(type(one) is not int or not 0 < one <= 2**31 for one in given):
        keys.problem(key, given, f"a whole number from 1 on, or a list of one for each of the {layers} layers")
        return 1
    return int(Counter(given).most_common(1)[0][0])


def _architecture(keys: ConfigKeys) -> Architecture:
    kind = keys.raw.get("model_type")
    row = of_config(keys.raw)
    if row is None:
        said = "model_type is missing" if kind is None else f"unknown model_type {kind!r}{nearest(kind, model_types())}"
        raise CheckpointError(
            said,
            where=keys.where,
            expected="one of " + ", ".join((*model_types(), *multimodal_types())),
            next_step=f"pass a checkpoint of {names()}",
        )
    return row


def _refuse_unbuilt(keys: ConfigKeys, row: Architecture) -> None:
    raw = keys.raw
    if raw.get(settings.KEY) and (problem := settings.problem_of(raw[settings.KEY])) is not None:
        keys.problem(settings.KEY, *problem)
    if raw.get("attention_bias"):
        keys.problem("attention_bias", raw["attention_bias"], "false: no Gemma has attention biases")
    both_ways = raw.get("use_bidirectional_attention")
    if both_ways and not row.encoder and both_ways not in row.causal_text:
        keys.problem("use_bidirectional_attention", True, f"false: of {row.name}, only causal models are compiled")


def _check_heads(keys: ConfigKeys, size: Mapping[str, int]) -> None:
    heads, kv_heads, head_dim = size["num_attention_heads"], size["num_key_value_heads"], size["head_dim"]
    if heads % kv_heads:
        keys.problems.append(
            f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}: "
            "each KV head serves the same number of query heads"
        )
    if head_dim % 2 and keys.raw.get("head_dim") == head_dim:
        keys.problem("head_dim", head_dim, "an even number: rotary embedding turns pairs")


def _stop_tokens(keys: ConfigKeys, vocab: int) -> tuple[int, ...]:
    value = keys.raw.get("eos_token_id", 1)
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    for token in tokens:
        _check_token(keys, "eos_token_id", token, vocab)
    return tuple(dict.fromkeys(token for token in tokens if type(token) is int))


def _token(keys: ConfigKeys, key: str, default: int, vocab: int) -> int | None:
    value = keys.raw.get(key, default)
    if value is not None:
        _check_token(keys, key, value, vocab)
    return value if type(value) is int else None


def _check_token(keys: ConfigKeys, key: str, token: object, vocab: int) -> None:
    known_vocab = isinstance(keys.raw.get("vocab_size"), int)
    if type(token) is not int or token < 0 or (known_vocab and token >= vocab):
        keys.problem(key, token, f"a token id from 0 to {vocab - 1}" if known_vocab else "a token id")
