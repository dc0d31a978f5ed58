"""A llama.cpp .gguf file seen as a Hugging Face checkpoint: names, config, float32 rows.

Two things differ from the safetensors of the same model: llama.cpp stores norm weights as what they multiply by
(1 + w up to Gemma 3), and its metadata does not say everything config.json does (the generation's row says what is
filled in, and from which tensors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy import architectures, extras
from gemma_deploy.architectures import TANH_GELU, Architecture, Gguf
from gemma_deploy.architectures.keys import ConfigKeys
from gemma_deploy.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from gemma_deploy.checkpoint.mapped import MappedFile
from gemma_deploy.checkpoint.shapes import as_matrix
from gemma_deploy.dtypes import BY_SAFETENSORS
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import EMBEDDING_WEIGHT, HEAD_WEIGHT

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
    """Checked header and lazy rows of one GGUF file.

    Attributes:
        entries: weights by their Hugging Face names; said: tensors that say what config.json says, by llama.cpp's.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        extras.require("gguf", what="reading a .gguf file")
        self.path = path
        self.file = MappedFile(path)
        header = read_gguf_header(self.file)
        self.header_bytes = header.data_start
        self.metadata = header.metadata
        self.architecture, self.layout = self._architecture()
        stored = self._stored(header)
        self.said = {name: stored.pop(name) for name in self.layout.said if name in stored}
        self.tensors = {**stored, **self.said}
        for name in (name for name in self.layout.stacked if name in stored):
            stored |= {one.name: one for one in _apart(stored.pop(name), self.layout.stacked[name])}
        self.entries = {entry.name: entry for entry in stored.values()}

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as stored, uint8 [stop - start, bytes per row]; of several matrices those of all, below each other."""
        entry = self.entries[name]
        row_bytes = (entry.stop - entry.start) // as_matrix(entry.shape)[0]
        first, last = entry.start + start * row_bytes, entry.start + stop * row_bytes
        return self.file.copy(first, last).reshape(stop - start, row_bytes)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows dequantized to float32; norm weights as Hugging Face has them (without the 1). See `raw_rows`."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.entries[name]
        shape = as_matrix(entry.shape)
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{entry.name}: rows {start}..{stop} of {shape[0]}")
        kind = GGMLQuantizationType(entry.ggml_type)
        if len(entry.shape) == 1:
            values = self.vector(entry)[start:stop]
            return values - np.float32(self.architecture.norm_offset) if entry.name.endswith("norm.weight") else values
        out = np.empty((stop - start, shape[1]), np.float32)
        step = max(1, DEQUANTIZE_BYTES // (4 * shape[1]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            block = dequantize(_typed(self.raw_rows(name, first, last), kind.name), kind)
            out[first - start : last - start] = block.reshape(last - first, -1)
        return out

    def vector(self, entry: GgufEntry) -> np.ndarray:
        """A vector as it is stored, float32."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(entry.ggml_type)
        raw = _typed(self.file.copy(entry.start, entry.stop), kind.name)
        return np.asarray(dequantize(raw, kind), np.float32).reshape(entry.shape)

    def config_dict(self) -> dict[str, Any]:
        """The config.json that says what the metadata say; missing keys stay missing, for ModelConfig to report.

        Raises:
            CheckpointError: listing what the generation's own metadata lack or contradict.
        """
        meta, row = _Metadata(self), self.architecture
        config: dict[str, Any] = {"architectures": [row.causal_class], "model_type": row.model_type}
        config |= {key: meta(name) for key, name in SIZES.items() if meta(name) is not None}
        table = self.entries.get(EMBEDDING_WEIGHT)
        if table is not None:
            config["vocab_size"] = table.shape[0]
        epsilon = meta("attention.layer_norm_rms_epsilon")
        if epsilon is not None:
            config["rms_norm_eps"] = epsilon
        config["tie_word_embeddings"] = HEAD_WEIGHT not in self.entries
        config[row.activation_key] = TANH_GELU
        for key, names in TOKEN_IDS.items():
            values = [self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
            ids = [
                one
                for index, one in enumerate(values)
                if one is not None and repr(one) not in map(repr, values[:index])
            ]
            if ids:
                config[key] = ids[0] if len(ids) == 1 and type(ids[0]) is int else ids
        config |= self.layout.config(meta)
        if meta.problems:
            raise CheckpointError(
                f"{len(meta.problems)} key(s) or tensor(s) that say how the model computes are missing or wrong",
                where=str(self.path),
                problems=meta.problems,
                next_step="convert it again with a current llama.cpp, or pass the directory of safetensors",
            )
        return config

    def _architecture(self) -> tuple[Architecture, Gguf]:
        name = self.metadata.get("general.architecture")
        rows = architectures.by_gguf_name()
        if not isinstance(name, str) or name not in rows:
            known = list(rows)
            raise CheckpointError(
                f"holds a model of architecture {name!r}" + architectures.nearest(name, known),
                where=str(self.path),
                expected="one of " + ", ".join(known),
                next_step=f"pass the GGUF file of {architectures.names(gguf=True)}, or the directory of safetensors",
            )
        parts = self.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"is one of {parts} parts of a split GGUF",
                where=str(self.path),
                next_step="merge the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )
        return rows[name]

    def _stored(self, header: GgufHeader) -> dict[str, GgufEntry]:
        """Every tensor by llama.cpp's name, checked against the file."""
        problems: list[str] = []
        entries = {}
        for tensor in header.tensors:
            entry = self._entry(tensor, header.data_start, problems)
            if entry is not None:
                entries[tensor.name] = entry
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

        name = self.layout.hf_name(tensor.name)
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


class _Metadata:
    """See `architectures.Metadata`.

    Args:
        file: the open file.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file, self._prefix = file, f"{file.layout.name}."
        self._keys = ConfigKeys({}, str(file.path))

    def __call__(self, key: str) -> Any:
        value = self._file.metadata.get(self._prefix + key)
        return _shortest(value) if isinstance(value, float) else value

    def problem(self, key: str, got: object, expected: str) -> None:
        name = key if key.endswith(".weight") else self._prefix + key
        if got is None:
            self._keys.problems.append(f"{name} is missing: expected {expected}")
        else:
            self._keys.problem(name, got, expected)

    @property
    def problems(self) -> list[str]:
        return self._keys.problems

    def has(self, tensor: str) -> bool:
        return tensor in self._file.tensors

    def rows(self, tensor: str) -> int | None:
        entry = self._file.tensors.get(tensor)
        return None if entry is None else entry.shape[0]

    def numbers(self, tensor: str) -> Sequence[float] | None:
        entry = self._file.said.get(tensor)
        return None if entry is None or len(entry.shape) != 1 else [float(one) for one in self._file.vector(entry)]


def _apart(entry: GgufEntry, prefix: str) -> list[GgufEntry]:
    """The matrices of a tensor of several; as it is where it holds one."""
    if len(entry.shape) != 3:
        return [entry]
    count, size = entry.shape[0], (entry.stop - entry.start) // entry.shape[0]
    return [
        replace(entry, name=f"{prefix}.{i}.weight", shape=entry.shape[1:], start=first, stop=first + size)
        for i, first in ((i, entry.start + i * size) for i in range(count))
    ]


def _typed(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Give float types their dtype back; gguf's dequantizers take the others as bytes."""
    return raw.view(
        BY_SAFETENSORS[type_name].numpy if type_name in ("F32", "F16") else np.uint8
    )  # GGUF names these so, too


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
