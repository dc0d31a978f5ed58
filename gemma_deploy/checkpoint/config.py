"""The facts about a Gemma that every later stage needs, read from config.json and checked all at once.

First step of the data path: raw dictionary -> ModelConfig. Reads no file and no weight (see checkpoint.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gemma_deploy.errors import CheckpointError

ModelType = Literal["gemma", "gemma2", "gemma3_text"]
LayerType = Literal["full_attention", "sliding_attention"]
Activation = Literal["gelu", "gelu_pytorch_tanh"]

MODEL_TYPES: tuple[ModelType, ...] = ("gemma", "gemma2", "gemma3_text")
TABLE, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"
LAYER_TYPES: tuple[LayerType, ...] = (FULL, SLIDING)
# The exact GELU, and names of its tanh approximation, which Gemma 1 computes also where its config says "gelu".
EXACT_GELU, TANH_GELU = "gelu", "gelu_pytorch_tanh"
GELU_NAMES = (EXACT_GELU, TANH_GELU, "gelu_new")
# What works for every published spelling of the names. Without the mapping `from_pretrained` gives random weights, and
# without the last argument `save_pretrained` undoes it.
EXTRACT_TEXT_MODEL = (
    'use a text checkpoint (Gemma 3 270M or 1B), or extract the text model: python -c "from transformers import '
    "AutoConfig, AutoModelForCausalLM as M; D = 'CHECKPOINT'; M.from_pretrained(D, dtype='auto', "
    "config=AutoConfig.from_pretrained(D).get_text_config(), key_mapping={'^language_model.model': 'model', "
    "'^model.language_model': 'model', '^language_model.lm_head': 'lm_head'}).save_pretrained('OUT', "
    "save_original_format=False)\", and copy the tokenizer's files to OUT"
)
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
_MISSING = object()


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer: base frequency and linear position divisor."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """What the weights mean. `layer_types` has one entry per layer, `rope` one per kind that occurs in it."""

    model_type: ModelType
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
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str) -> ModelConfig:
        """Check a config.json and fill what it may leave out, as transformers' config classes do.

        Args:
            raw: the parsed config.json.
            where: the file, for messages.

        Raises:
            CheckpointError: listing every wrong or missing key.
        """
        return _Parser(raw, where).parse()

    @property
    def head_weight(self) -> str:
        """Name of the matrix the LM head multiplies by: the token table where the two are tied."""
        return TABLE if self.tie_word_embeddings else LM_HEAD

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the raw config, for the manifest."""
        plain = {key: value for key, value in asdict(self).items() if key != "raw"}
        return plain | {key: list(plain[key]) for key in ("layer_types", "eos_token_ids", "warnings")}


class _Parser:
    """Reads keys, remembers every problem, and raises once."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def parse(self) -> ModelConfig:
        raw = self.raw
        kind = self._model_type()
        self._refuse_unbuilt()
        size = {key: self._integer(key, most=LARGEST.get(key, 2**31)) for key in REQUIRED_SIZES}
        self._check_heads(size)
        layers = size["num_hidden_layers"]
        layer_types = self._layer_types(kind, layers if layers <= LARGEST["num_hidden_layers"] else 1)
        max_positions = self._integer("max_position_embeddings", default=131072 if kind == "gemma3_text" else 8192)
        config = ModelConfig(
            model_type=kind,
            **size,
            rms_norm_eps=self._number("rms_norm_eps", default=1e-6),
            max_position_embeddings=max_positions,
            query_pre_attn_scalar=self._attention_scalar(kind, size),
            sliding_window=self._window(kind, layer_types),
            layer_types=layer_types,
            rope=self._rope(kind, layer_types),
            hidden_activation=self._activation(kind),
            attn_logit_softcapping=self._cap("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
            final_logit_softcapping=self._cap("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
            tie_word_embeddings=self._boolean("tie_word_embeddings", True),
            bos_token_id=self._token("bos_token_id", 2, size["vocab_size"]),
            pad_token_id=self._token("pad_token_id", 0, size["vocab_size"]),
            eos_token_ids=self._stop_tokens(size["vocab_size"]),
            raw=dict(raw),
            warnings=tuple(self.warnings),
        )
        if self.problems:
            raise CheckpointError(
                f"{len(self.problems)} wrong or missing key(s) in the model's config",
                where=self.where,
                problems=self.problems,
                next_step="take config.json from the place the weights came from",
            )
        return config

    def _model_type(self) -> ModelType:
        kind = self.raw.get("model_type")
        if "text_config" in self.raw or kind == "gemma3":
            raise CheckpointError(
                "this is a multimodal Gemma (text and images); gemma-deploy compiles text models only",
                where=self.where,
                expected='model_type "gemma3_text" and no text_config',
                next_step=EXTRACT_TEXT_MODEL,
            )
        if kind not in MODEL_TYPES:
            near = difflib.get_close_matches(str(kind), MODEL_TYPES, n=1, cutoff=0.5)
            said = "model_type is missing" if kind is None else f"unknown model_type {kind!r}"
            raise CheckpointError(
                said + (f"; the nearest known one is {near[0]!r}" if near else ""),
                where=self.where,
                expected="one of " + ", ".join(MODEL_TYPES),
                next_step="pass a Gemma 1, 2 or 3 text checkpoint",
            )
        found: ModelType = kind
        return found

    def _refuse_unbuilt(self) -> None:
        if self.raw.get("quantization_config"):
            method = self.raw["quantization_config"]
            method = method.get("quant_method", "?") if isinstance(method, dict) else method
            self._problem("quantization_config", f"already quantized ({method})", "bf16, fp16 or fp32 weights")
        if self.raw.get("attention_bias"):
            self._problem("attention_bias", self.raw["attention_bias"], "false: no Gemma has attention biases")
        if self.raw.get("use_bidirectional_attention"):
            self._problem("use_bidirectional_attention", True, "false: only causal models are compiled")

    def _check_heads(self, size: Mapping[str, int]) -> None:
        heads, kv_heads, head_dim = size["num_attention_heads"], size["num_key_value_heads"], size["head_dim"]
        if heads % kv_heads:
            self.problems.append(
                f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}: "
                "each KV head serves the same number of query heads"
            )
        if head_dim % 2 and self.raw.get("head_dim") == head_dim:
            self._problem("head_dim", head_dim, "an even number: rotary embedding turns pairs")

    def _layer_types(self, kind: ModelType, layers: int) -> tuple[LayerType, ...]:
        given = self.raw.get("layer_types")
        if given is not None:
            if not isinstance(given, list) or any(t not in LAYER_TYPES for t in given):
                self._problem("layer_types", given, "a list of " + " / ".join(LAYER_TYPES))
            elif len(given) != layers:
                self._problem("layer_types", f"{len(given)} entries", f"{layers}, one per layer")
            elif kind == "gemma" and SLIDING in given:
                self._problem("layer_types", SLIDING, "full_attention only: Gemma 1 has no window")
            else:
                return tuple(given)
        if kind == "gemma":
            return (FULL,) * layers
        pattern = 2
        if kind == "gemma3_text":
            key = "sliding_window_pattern" if "sliding_window_pattern" in self.raw else "_sliding_window_pattern"
            pattern = self._integer(key, default=6, most=LARGEST["num_hidden_layers"])
        return tuple(SLIDING if (i + 1) % pattern else FULL for i in range(layers))

    def _window(self, kind: ModelType, layer_types: tuple[LayerType, ...]) -> int | None:
        if kind == "gemma" or SLIDING not in layer_types:
            return None
        return self._integer("sliding_window", default=4096 if kind == "gemma2" else _MISSING)

    def _attention_scalar(self, kind: ModelType, size: Mapping[str, int]) -> float:
        if kind == "gemma":
            return float(size["head_dim"])
        if "query_pre_attn_scalar" not in self.raw:
            self.warnings.append(
                f"{self.where}: no query_pre_attn_scalar; 256 is used, which is transformers' default, "
                "but Gemma 2 27B needs 144 and Gemma 3 27B 168"
            )
        scalar = self._number("query_pre_attn_scalar", default=256.0)
        if kind == "gemma2" and size["hidden_size"] == 3584 and size["head_dim"] == 256 and scalar == 224:
            self.warnings.append(
                f"{self.where}: query_pre_attn_scalar is 224; Gemma 2 9B was trained with 256 and early copies of its "
                "config were wrong. 224 is used because the file says so; set 256 in config.json"
            )
        return scalar

    def _activation(self, kind: ModelType) -> Activation:
        """As transformers reads it: another key in Gemma 1, whose "gelu" means the approximation."""
        key = "hidden_act" if kind == "gemma" else "hidden_activation"
        value = self.raw.get(key, TANH_GELU)
        if value not in GELU_NAMES:
            self._problem(key, value, TANH_GELU)
        return "gelu" if value == EXACT_GELU and kind != "gemma" else "gelu_pytorch_tanh"

    def _rope(self, kind: ModelType, layer_types: tuple[LayerType, ...]) -> dict[LayerType, Rope]:
        """Both spellings: rope_theta / rope_local_base_freq / rope_scaling, and rope_parameters."""
        parameters = self._mapping("rope_parameters")
        scaling = self._mapping("rope_scaling")
        per_kind = any(name in parameters for name in LAYER_TYPES)
        if parameters and kind == "gemma3_text" and not per_kind:
            self._problem("rope_parameters", sorted(parameters), "one entry per layer type")
        ropes: dict[LayerType, Rope] = {}
        for layer_type in (t for t in LAYER_TYPES if t in layer_types):
            local = kind == "gemma3_text" and layer_type == SLIDING
            entry = parameters.get(layer_type) if per_kind else parameters
            if entry is not None and not isinstance(entry, dict):
                self._problem(f"rope_parameters.{layer_type}", entry, "an object")
                entry = None
            # transformers applies a legacy rope_scaling to the global layers of Gemma 3 only
            entry = dict(entry or {}) | ({} if local else scaling)
            legacy = "rope_local_base_freq" if local else "rope_theta"
            default = 1e6 if kind == "gemma3_text" and not local else 1e4
            where = "rope_parameters" + (f".{layer_type}" if per_kind else "")
            theta = entry.get("rope_theta")
            theta = self._number(legacy, default=default) if theta is None else self._positive(where, theta)
            rope_type = entry.get("rope_type") or entry.get("type") or "default"
            factor = 1.0
            if rope_type == "linear":
                factor = self._positive(f"{where} factor", entry.get("factor"))
            elif rope_type != "default":
                self._problem(f"{where} rope_type", rope_type, "default or linear: no Gemma uses another")
            ropes[layer_type] = Rope(theta, factor)
        return ropes

    def _stop_tokens(self, vocab: int) -> tuple[int, ...]:
        value = self.raw.get("eos_token_id", 1)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        for token in tokens:
            self._check_token("eos_token_id", token, vocab)
        return tuple(dict.fromkeys(token for token in tokens if type(token) is int))

    def _token(self, key: str, default: int, vocab: int) -> int | None:
        value = self.raw.get(key, default)
        if value is not None:
            self._check_token(key, value, vocab)
        return value if type(value) is int else None

    def _check_token(self, key: str, token: object, vocab: int) -> None:
        known_vocab = isinstance(self.raw.get("vocab_size"), int)
        if type(token) is not int or token < 0 or (known_vocab and token >= vocab):
            self._problem(key, token, f"a token id from 0 to {vocab - 1}" if known_vocab else "a token id")

    def _integer(self, key: str, default: Any = _MISSING, most: int = 2**31) -> int:
        value = self.raw.get(key, default)
        if value is _MISSING:
            self.problems.append(f"{key} is missing")
        elif type(value) is not int or not 0 < value <= most:
            self._problem(key, value, f"a whole number from 1 to {most}")
        else:
            return value
        return 1

    def _number(self, key: str, default: float) -> float:
        return self._positive(key, self.raw.get(key, default))

    def _positive(self, key: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30 and math.isfinite(value):
            return float(value)
        self._problem(key, value, "a positive number")
        return 1.0

    def _cap(self, key: str, default: float | None) -> float | None:
        value = self.raw.get(key, default)
        return None if value is None else self._positive(key, value)

    def _boolean(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self._problem(key, value, "true or false")
        return bool(value)

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            self._problem(key, value, "an object")
        return value if isinstance(value, dict) else {}

    def _problem(self, key: str, got: object, expected: str) -> None:
        text = (
            f"{key}: got {str(got)[:80]!r}, expected {expected}"
            if isinstance(got, str)
            else (f"{key}: got {str(got)[:80]}, expected {expected}")
        )
        if text not in self.problems:
            self.problems.append(text)
