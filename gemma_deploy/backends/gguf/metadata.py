"""What a file for llama.cpp says beside its tensors, as `convert_hf_to_gguf.py` (llama-cpp-python 0.3.36) writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_deploy import architectures
from gemma_deploy.architectures import FULL, SLIDING
from gemma_deploy.backends.gguf.vocabulary import Vocabulary, vocabulary_of
from gemma_deploy.backends.spec import BuildSpec
from gemma_deploy.checkpoint import Checkpoint, ModelConfig, expected_tensors
from gemma_deploy.checkpoint.gguf_reader import SIZES
from gemma_deploy.params.constants import frequency_divisors
from gemma_deploy.params.gguf import ARCHITECTURE, Value, pack
from gemma_deploy.text.tokenizer import files_of

# llama.cpp's numbers of what most matrices are (`LLAMA_FTYPE_*`), by their bits or their scheme.
FILE_TYPES = {"fp32": 0, "fp16": 1, 4: 2, 8: 7, "bf16": 32}
QUANTIZATION_VERSION = 2  # of ggml's blocks
TOKENIZER = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
FACTS = (
    "layer_types", "sliding_window", "rope", "query_pre_attn_scalar", "hidden_activation", "attn_logit_softcapping",
    "final_logit_softcapping", "rms_norm_eps", "head_dim",
)  # fmt: skip


def front(spec: BuildSpec, checkpoint: Checkpoint, name: str) -> bytes:
    """Everything in front of the table of tensors.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
    """
    config = checkpoint.config
    gguf = config.architecture.gguf
    assert gguf is not None  # options.py
    kind = spec.storage(config.hidden_size).linears.bits if spec.scheme.codes else spec.scheme.weights
    said: dict[str, Value] = {
        ARCHITECTURE: gguf.name,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    said |= {f"{gguf.name}.{key}": value for key, value in model_keys(config).items()}
    files = files_of(checkpoint)
    said |= _tokenizer(vocabulary_of(files, config.vocab_size, gguf), config, gguf.tokenizer)
    template = files.templates().get("default")
    return pack(said if template is None else said | {"tokenizer.chat_template": template})


def model_keys(config: ModelConfig) -> dict[str, Value]:
    """Keys, without the generation's name in front, that say what the model computes."""
    keys: dict[str, Value] = {name: getattr(config, key) for key, name in SIZES.items()}
    keys |= {
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    widest = next(
        config.rope[kind] for kind in reversed(sorted(config.rope)) if kind != SLIDING or len(config.rope) == 1
    )
    keys["rope.freq_base"] = float(widest.theta)
    if widest.factor != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(widest.factor)}
    if SLIDING in config.rope and config.rope[SLIDING].theta != widest.theta:
        keys["rope.freq_base_swa"] = float(config.rope[SLIDING].theta)
    if config.sliding_window is not None:
        keys["attention.sliding_window"] = config.sliding_window
        pattern = next((at + 1 for at, kind in enumerate(config.layer_types) if kind != SLIDING), None)
        if pattern is not None:
            keys["attention.sliding_window_pattern"] = pattern
    for name, cap in (
        ("attn_logit_softcapping", config.attn_logit_softcapping),
        ("final_logit_softcapping", config.final_logit_softcapping),
    ):
        if cap is not None:
            keys[name] = float(cap)
    assert config.architecture.gguf is not None
    return keys | dict(config.architecture.gguf.keys(config))


def differences(config: ModelConfig) -> list[str]:
    """Facts of a model that llama.cpp would take for others, as this program reads the keys it writes."""
    row = config.architecture
    assert row.gguf is not None
    said = _Said(config, model_keys(config))
    values: dict[str, Any] = {"architectures": [row.causal_class], "model_type": row.model_type}
    values |= {key: said(name) for key, name in SIZES.items()}
    values |= {"vocab_size": config.vocab_size, "rms_norm_eps": config.rms_norm_eps}
    values |= {"tie_word_embeddings": config.tie_word_embeddings, row.activation_key: architectures.TANH_GELU}
    read = ModelConfig.from_dict(values | row.gguf.config(said), "metadata")
    found = [
        f"{fact} is {getattr(config, fact)}, llama.cpp computes with {getattr(read, fact)}"
        for fact in FACTS
        if getattr(read, fact) != getattr(config, fact)
    ]
    if not found and read.layers != config.layers:
        found.append("its layers are others than those that llama.cpp makes of its metadata")
    return found


def _tokenizer(made: Vocabulary, config: ModelConfig, kind: str) -> dict[str, Value]:
    keys: dict[str, Value] = {
        f"{TOKENIZER}model": kind,
        f"{TOKENIZER}pre": "default",
        f"{TOKENIZER}tokens": made.tokens,
        f"{TOKENIZER}scores": made.scores,
        f"{TOKENIZER}token_type": made.kinds,
    }
    if made.merges:
        keys[f"{TOKENIZER}merges"] = made.merges
    named = {"bos": config.bos_token_id, "unknown": made.unknown, "padding": config.pad_token_id}
    named |= dict(zip(ENDS, config.eos_token_ids, strict=False))
    keys |= {f"{TOKENIZER}{name}_token_id": number for name, number in named.items() if number is not None}
    return keys | {
        f"{TOKENIZER}add_bos_token": config.bos_token_id is not None,
        f"{TOKENIZER}add_eos_token": False,
        f"{TOKENIZER}add_space_prefix": False,
    }


class _Said:
    """Keys and tensors that are to be written, as `architectures.Metadata`."""

    def __init__(self, config: ModelConfig, keys: dict[str, Value]) -> None:
        self._config, self._keys = config, keys
        assert config.architecture.gguf is not None
        own = config.architecture.gguf.own_name
        self._shapes = {own(name): shape for name, shape in expected_tensors(config).items()}

    def __call__(self, key: str) -> Any:
        return self._keys.get(key)

    def problem(self, key: str, got: object, expected: str) -> None:
        raise AssertionError(f"{key} is {got}, expected {expected}")

    def has(self, tensor: str) -> bool:
        return tensor in self._shapes

    def rows(self, tensor: str) -> int | None:
        return self._shapes[tensor][0] if tensor in self._shapes else None

    def numbers(self, tensor: str) -> Sequence[float] | None:
        rope, layers = self._config.rope, self._config.layers
        size = next(one.head_dim for one in layers if one.kind == FULL)
        found: list[float] = frequency_divisors(rope[FULL], size).tolist()
        return found
