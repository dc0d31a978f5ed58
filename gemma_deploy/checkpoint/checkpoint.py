"""A checkpoint on disk: config and lazy tensor index. Opening it checks everything and reads no weight.

Second step of the data path (design 2). Directories of safetensors, single or sharded, and .gguf files look the same
from here on: Hugging Face tensor names, float32 row blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gemma_deploy import paths, reading
from gemma_deploy.checkpoint.config import LM_HEAD, TABLE, ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.index import INDEX_NAME, locate_shards, read_json, read_shards, refuse_other_formats
from gemma_deploy.checkpoint.safetensors_reader import readable
from gemma_deploy.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# A classifier's head is no part of a language model; staging carries it because it links the whole file.
CLASSIFIER_HEAD = "score.weight"
FINGERPRINT_BYTES = 1 << 20


class WeightsFile(Protocol):
    """What a format gives: named entries, float32 rows, rows as stored, and the size of its header."""

    path: Path
    header_bytes: int
    entries: dict[str, Any]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as float32."""
        ...

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as stored."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its Hugging Face name, shape, dtype as stored, file, and bytes stored."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; make one with `Checkpoint.open`."""

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    _files: Mapping[str, WeightsFile]
    _config_bytes: bytes

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a directory of safetensors or a .gguf file and check all of it but the values.

        Raises:
            CheckpointError: everything missing, unexpected or misshaped, in one message.
        """
        path = resolve_checkpoint(str(path))
        if absent := reading.why_absent(path):
            raise CheckpointError(
                absent,
                where=str(path),
                expected="a checkpoint directory (config.json and *.safetensors), a .gguf file, or the word demo",
                next_step="check the path (frontend.checkpoint, --checkpoint)",
            )
        if not reading.is_dir(path):
            return _open_gguf(cls, path)
        return _open_directory(cls, path)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, [stop - start, cols] (1-D tensors: [stop - start])."""
        return self._files[name].rows(name, start, stop)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as stored: bfloat16 as uint16, GGUF blocks as uint8 [stop - start, bytes]."""
        return self._files[name].raw_rows(name, start, stop)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Every file that holds weights, in order of name."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    def config_dict(self) -> dict[str, Any]:
        """The checkpoint's own config.json; for GGUF the one that says the same."""
        return dict(self.config.raw)

    def tokenizer_dir(self) -> Path:
        """Where tokenizer files would lie."""
        return self.path.parent if self.path.is_file() else self.path

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files; none when there is no vocabulary (a GGUF file carries its own inside)."""
        found = [self.tokenizer_dir() / name for name in TOKENIZER_FILES]
        found = [path for path in found if path.is_file()]
        return found if any(path.name in TOKENIZER_FILES[:2] for path in found) else []

    def fingerprint(self, *, times: bool = True) -> str:
        """Sha256 over config, tokenizer, and each weight file's name, size, time, header and first MiB.

        Args:
            times: without them a copy of the files has the same fingerprint; a change behind the first MiB too.
        """
        digest = hashlib.sha256(self._config_bytes)
        headers = {self._files[name].path: self._files[name].header_bytes for name in self.tensors}
        for path in self.weight_files:
            stat = path.stat()
            written = stat.st_mtime_ns if times else 0
            digest.update(f"\0{path.name}\0{stat.st_size}\0{written}\0".encode())
            with open(path, "rb") as file:
                for _ in range(0, max(FINGERPRINT_BYTES, headers[path] + 8), FINGERPRINT_BYTES):
                    digest.update(file.read(FINGERPRINT_BYTES))
        for path in self.tokenizer_files():
            digest.update(f"\0{path.name}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def resolve_checkpoint(spec: str) -> Path:
    """A recipe's frontend.checkpoint as a path: `demo` is the bundled mini checkpoint."""
    return paths.demo_checkpoint_dir() if spec == "demo" else reading.expand(spec)


def _open_gguf(cls: type[Checkpoint], path: Path) -> Checkpoint:
    if path.suffix != ".gguf":
        refuse_other_formats(path.parent, [path])
    from gemma_deploy.checkpoint.gguf_reader import GgufFile

    file = GgufFile(path)
    raw = file.config_dict()
    config = ModelConfig.from_dict(raw, str(path))
    return _assemble(cls, path, "gguf", config, {name: file for name in file.entries}, json.dumps(raw).encode())


def _open_directory(cls: type[Checkpoint], path: Path) -> Checkpoint:
    weights = locate_shards(path)
    raw, config_bytes = read_json(path / "config.json", missing="copy config.json from where the weights came from")
    config = ModelConfig.from_dict(raw, str(path / "config.json"))
    config = _with_generation_stops(config, path)
    files = read_shards(path, weights)
    checkpoint = _assemble(cls, path, "safetensors", config, files, config_bytes)
    if reading.exists(path / INDEX_NAME) and weights.index is None:
        note = f"{INDEX_NAME} is ignored because model.safetensors is there, as transformers does"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return checkpoint


def _with_generation_stops(config: ModelConfig, path: Path) -> ModelConfig:
    """Add generation_config.json's stop tokens: instruction-tuned Gemmas say <end_of_turn> only there."""
    file = path / "generation_config.json"
    if not reading.exists(file):
        return config
    value = read_json(file)[0].get("eos_token_id")
    tokens = value if isinstance(value, list) else [value]
    stops = [token for token in tokens if type(token) is int and 0 <= token < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *stops])))


def _assemble(
    cls: type[Checkpoint],
    path: Path,
    kind: str,
    config: ModelConfig,
    files: Mapping[str, WeightsFile],
    config_bytes: bytes,
) -> Checkpoint:
    """Compare what is there with what the config calls for."""
    entries = {name: file.entries[name] for name, file in files.items()}
    _refuse_multimodal(path, entries)
    expected = expected_tensors(config)
    notes: list[str] = []
    extras = _unexpected(config, entries, expected, notes)
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in entries]
    problems += [f"unexpected: {name} {list(entries[name].shape)}" for name in extras]
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is not None and entry.shape != shape:
            problems.append(f"wrong shape: {name} is {list(entry.shape)}, config.json calls for {list(shape)}")
        elif entry is not None and kind == "safetensors" and not readable(entry.dtype):
            problems.append(f"wrong dtype: {name} is {entry.dtype}, expected bfloat16, float16 or float32")
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensor(s) do not fit the config",
            where=str(path),
            problems=problems,
            next_step="make sure config.json and the weights belong together and every shard is there",
        )
    tensors = {
        name: TensorInfo(name, entries[name].shape, entries[name].dtype, files[name].path, _nbytes(entries[name]))
        for name in expected
    }
    if LM_HEAD in entries and config.tie_word_embeddings:
        notes.append(_tied_note(files, entries))
    notes.extend(config.warnings)
    return cls(path, kind, config, tensors, tuple(notes), dict(files), config_bytes)


def _nbytes(entry: Any) -> int:
    return int(entry.stop - entry.start)


def _refuse_multimodal(path: Path, entries: Mapping[str, Any]) -> None:
    inner = [name for name in entries if name.startswith(("language_model.", "model.language_model."))]
    if inner:
        raise CheckpointError(
            f"{len(inner)} tensors are named like {inner[0]}: this is a multimodal Gemma 3, and only text models are "
            "compiled",
            where=str(path),
            next_step="save the language model alone (Gemma3ForCausalLM.save_pretrained), or use a text checkpoint",
        )


def _unexpected(
    config: ModelConfig, entries: Mapping[str, Any], expected: Mapping[str, Any], notes: list[str]
) -> list[str]:
    """Names nothing here uses; the harmless ones become notes instead."""
    extras = []
    for name in entries:
        if name in expected or (name == LM_HEAD and config.tie_word_embeddings):
            continue
        if name.endswith(".rotary_emb.inv_freq"):
            notes.append(f"{name} is ignored: the frequencies follow from the config")
        elif name == CLASSIFIER_HEAD:
            notes.append(f"{name} is ignored: the classification head is no part of the language model")
        else:
            extras.append(name)
    return extras


def _tied_note(files: Mapping[str, WeightsFile], entries: Mapping[str, Any]) -> str:
    """Say that the extra head is ignored, louder when it is plainly another matrix than the table."""
    note = f"{LM_HEAD} is ignored: tie_word_embeddings makes the embedding table the head"
    head, table = entries[LM_HEAD], entries[TABLE]
    rows = min(16, *head.shape[:1], *table.shape[:1])
    same = (
        head.shape == table.shape
        and readable(head.dtype)
        and np.array_equal(files[LM_HEAD].rows(LM_HEAD, 0, rows), files[TABLE].rows(TABLE, 0, rows))
    )
    return note if same else f"{note}. But it differs from the table: check tie_word_embeddings in config.json"
