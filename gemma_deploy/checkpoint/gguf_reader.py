"""A llama.cpp .gguf file seen as a Hugging Face checkpoint: names, config, float32 rows.

Two things differ from the safetensors of the same model: llama.cpp stores norm weights as 1 + w, and its metadata does
not say everything config.json does (tables below say what is filled in, and from where).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from gemma_deploy.checkpoint.mapped import MappedFile
from gemma_deploy.errors import CheckpointError

ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
CLASSES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# llama.cpp says ffn_norm for the norm before the MLP, which Hugging Face names differently with two and four norms.
TWO_NORM_NAMES = {"ffn_norm": "post_attention_layernorm"}
FOUR_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# config.json key -> metadata key after "ARCH."
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}
# config.json key -> metadata keys: a text is ended by its end, by that of a turn, and by that of a message
TOKEN_IDS = {"bos_token_id": ("bos",), "eos_token_id": ("eos", "eot", "eom"), "pad_token_id": ("padding",)}
DEQUANTIZE_BYTES = 8 << 20  # float32 bytes dequantized at a time: gguf's code holds about three copies


@dataclass(frozen=True)
class GgufEntry:
    """One tensor under its Hugging Face name; dtype is ggml's name of the type, start and stop are absolute."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    stop: int
    ggml_type: int


class GgufFile:
    """Checked header and lazy rows of one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        self.path = path
        self.file = MappedFile(path)
        header = read_gguf_header(self.file)
        self.header_bytes = header.data_start
        self.metadata = header.metadata
        self.model_type = self._architecture()
        self.entries = self._entries(header)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as stored, uint8 [stop - start, bytes per row]."""
        entry = self.entries[name]
        row_bytes = (entry.stop - entry.start) // entry.shape[0]
        first, last = entry.start + start * row_bytes, entry.start + stop * row_bytes
        return self.file.copy(first, last).reshape(stop - start, row_bytes)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows dequantized to float32; norm weights as Hugging Face has them (without the 1)."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.entries[name]
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"{entry.name}: rows {start}..{stop} of {entry.shape[0]}")
        kind = GGMLQuantizationType(entry.ggml_type)
        if len(entry.shape) == 1:
            return self._vector(entry, kind)[start:stop]
        out = np.empty((stop - start, *entry.shape[1:]), np.float32)
        step = max(1, DEQUANTIZE_BYTES // (4 * math.prod(entry.shape[1:])))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = dequantize(_typed(self.raw_rows(name, first, last), kind.name), kind)
            out[first - start : last - start] = block.reshape(last - first, -1)
        return out

    def _vector(self, entry: GgufEntry, kind: Any) -> np.ndarray:
        from gguf.quants import dequantize

        raw = _typed(self.file.copy(entry.start, entry.stop), kind.name)
        value = np.asarray(dequantize(raw, kind), np.float32).reshape(entry.shape)
        return value - np.float32(1) if entry.name.endswith("norm.weight") else value

    def config_dict(self) -> dict[str, Any]:
        """The config.json that says what the metadata say; missing keys stay missing, for ModelConfig to report."""
        meta, kind = self._meta, self.model_type
        config: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind}
        config |= {key: meta(name) for key, name in SIZES.items() if meta(name) is not None}
        table = self.entries.get("model.embed_tokens.weight")
        if table is not None:
            config["vocab_size"] = table.shape[0]
        epsilon = meta("attention.layer_norm_rms_epsilon")
        if epsilon is not None:
            config["rms_norm_eps"] = epsilon
        config["tie_word_embeddings"] = "lm_head.weight" not in self.entries
        config["hidden_act" if kind == "gemma" else "hidden_activation"] = "gelu_pytorch_tanh"
        for key, names in TOKEN_IDS.items():
            values = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
            ids = [
                one
                for index, one in enumerate(values)
                if one is not None and repr(one) not in map(repr, values[:index])
            ]
            if ids:
                config[key] = ids[0] if len(ids) == 1 and type(ids[0]) is int else ids
        if kind == "gemma":
            return config | {"rope_theta": meta("rope.freq_base") or 10000.0}
        config["sliding_window"] = meta("attention.sliding_window") or (4096 if kind == "gemma2" else None)
        config["query_pre_attn_scalar"] = self._attention_scalar()
        if kind == "gemma2":
            return config | {
                "rope_theta": meta("rope.freq_base") or 10000.0,
                "attn_logit_softcapping": meta("attn_logit_softcapping") or 50.0,
                "final_logit_softcapping": meta("final_logit_softcapping") or 30.0,
            }
        return config | self._gemma3_rope()

    def _gemma3_rope(self) -> dict[str, Any]:
        meta = self._meta
        rope: dict[str, Any] = {
            "rope_theta": meta("rope.freq_base") or 1000000.0,
            "rope_local_base_freq": meta("rope.freq_base_swa") or 10000.0,
        }
        pattern = meta("attention.sliding_window_pattern")
        rope["sliding_window_pattern"] = pattern if type(pattern) is int else 6
        if meta("rope.scaling.type") not in (None, "none"):
            rope["rope_scaling"] = {"rope_type": meta("rope.scaling.type"), "factor": meta("rope.scaling.factor")}
        return rope

    def _attention_scalar(self) -> int:
        """Not in the metadata. Only the 27B models differ from head_dim: hidden / heads (144 and 168).

        A whole number: transformers' config classes refuse 256.0 for it.
        """
        head_dim, layers = self._meta("attention.key_length"), self._meta("block_count")
        hidden, heads = self._meta("embedding_length"), self._meta("attention.head_count")
        largest = (self.model_type, layers, hidden) in (("gemma2", 46, 4608), ("gemma3_text", 62, 5376))
        if largest and type(heads) is int and heads > 0:
            return int(hidden // heads)
        return head_dim if type(head_dim) is int and head_dim else 256

    def _meta(self, key: str) -> Any:
        value = self.metadata.get(f"{self.metadata['general.architecture']}.{key}")
        return _shortest(value) if isinstance(value, float) else value

    def _architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1, cutoff=0.5)
            raise CheckpointError(
                f"holds a model of architecture {name!r}" + (f"; the nearest known one is {near[0]!r}" if near else ""),
                where=str(self.path),
                expected="one of " + ", ".join(ARCHITECTURES),
                next_step="pass the GGUF file of a Gemma 1, 2 or 3 text model",
            )
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"is one of {parts} parts of a split GGUF",
                where=str(self.path),
                next_step="merge the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )
        return ARCHITECTURES[name]

    def _entries(self, header: GgufHeader) -> dict[str, GgufEntry]:
        problems: list[str] = []
        entries = {}
        for tensor in header.tensors:
            entry = self._entry(tensor, header.data_start, problems)
            if entry is not None:
                entries[entry.name] = entry
        end, before = header.data_start, "the header"
        for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
            if entry.start < end:
                problems.append(f"{entry.name}: overlaps {before}")
            end, before = max(end, entry.stop), entry.name
        if problems:
            raise CheckpointError(
                f"{len(problems)} tensor(s) of the GGUF file cannot be used",
                where=str(self.path),
                problems=problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []),
                next_step="copy or download the file again",
            )
        return entries

    def _entry(self, tensor: GgufTensor, data_start: int, problems: list[str]) -> GgufEntry | None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = _hf_name(tensor.name, self.model_type)
        try:
            kind = GGMLQuantizationType(tensor.ggml_type)
            per_block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            problems.append(f"{tensor.name}: unknown ggml type {tensor.ggml_type}")
            return None
        if not _can_dequantize(kind):
            problems.append(f"{tensor.name}: the gguf package cannot dequantize {kind.name}")
            return None
        shape = tuple(reversed(tensor.dims))
        if not shape or 0 in shape or shape[-1] % per_block:
            problems.append(f"{tensor.name}: shape {list(shape)} does not fit blocks of {per_block} ({kind.name})")
            return None
        start = data_start + tensor.offset
        stop = start + math.prod(shape) // per_block * block_bytes
        if stop > self.file.size:
            problems.append(
                f"{tensor.name}: bytes {start}..{stop} lie outside the file of {self.file.size} (cut short?)"
            )
            return None
        return GgufEntry(name, shape, kind.name, start, stop, tensor.ggml_type)


def _hf_name(name: str, model_type: str) -> str:
    """The Hugging Face name; a name llama.cpp does not use for Gemma stays as it is and is reported as unexpected."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    parts = name.split(".")
    blocks = BLOCK_NAMES | (TWO_NORM_NAMES if model_type == "gemma" else FOUR_NORM_NAMES)
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in blocks and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{blocks[parts[2]]}.weight"
    return name


def _typed(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Give float types their dtype back; gguf's dequantizers take the others as bytes."""
    return raw.view({"F32": np.float32, "F16": np.float16}.get(type_name, np.uint8))


def _can_dequantize(kind: Any) -> bool:
    """Ask the package with one block of zeros, so that a type it lacks is known before the work starts."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in ("F32", "F16"):
        return True
    if kind.name in ("F64", "I8", "I16", "I32", "I64"):
        return False
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, ValueError):
        return False
    return True


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF stores float32(1e-6), config.json says 1e-6."""
    return float(str(np.float32(value)))
