"""A checkpoint on disk: config and lazy tensor index. Opening it checks everything but the values of weights.

Second step of the data path (docs/design.md 2). Directories of safetensors, single or sharded, and .gguf files look
the same from here on: Hugging Face tensor names, float32 row blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy import paths, reading
from gemma_deploy.architectures.drafting import TOKEN_ORDERING
from gemma_deploy.checkpoint.adapters.merging import AdapterRef, WeightedAdapter, merge_places, open_adapters
from gemma_deploy.checkpoint.assembling import Assembled, Place, assemble, merged_info
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.index import (
    INDEX_NAME,
    locate_shards,
    read_json,
    read_shards,
    refuse_other_formats,
)
from gemma_deploy.checkpoint.naming import is_inside
from gemma_deploy.checkpoint.quantized.gguf_blocks import blocks_of
from gemma_deploy.checkpoint.quantized.matrix import QuantizedWeight
from gemma_deploy.checkpoint.quantized.modules import Modules, group
from gemma_deploy.checkpoint.quantized.settings import claim_of
from gemma_deploy.checkpoint.sentence import read_sentence_head
from gemma_deploy.checkpoint.source import Rows, TensorInfo
from gemma_deploy.checkpoint.stored import Stored
from gemma_deploy.errors import CheckpointError, NotBuiltError
from gemma_deploy.names import CONFIG, EMBEDDING_WEIGHT, GENERATION_CONFIG
from gemma_deploy.provenance import code_of

if TYPE_CHECKING:
    from hashlib import _Hash as _Digest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
MORE_TEMPLATES = "additional_chat_templates"
GGUF_READER = "gemma_deploy.checkpoint.gguf_reader"
QUANTIZED_READERS = ("gemma_deploy.checkpoint.quantized.modules",)
FINGERPRINT_BYTES = 1 << 20
TOKENIZER_FILE = reading.FileKind(
    CheckpointError, "a file of the model's tokenizer", "copy it again from where the weights came from"
)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; make one with `Checkpoint.open`.

    With adapters, `config`, `tensors` and what is read are those of the merged model; its files are the checkpoint's.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...]
    _places: Mapping[str, Place]
    _config_bytes: bytes
    adapters: tuple[WeightedAdapter, ...] = ()
    _merged: Mapping[str, Rows] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        path: str | Path,
        adapter: str | Path | AdapterRef | Sequence[AdapterRef] | None = None,
        *,
        encoder: bool = False,
    ) -> Checkpoint:
        """Open a directory of safetensors or a .gguf file and check all of it but the values.

        Args:
            path: of the directory or file, or `demo`.
            adapter: what is added to the weights while they are read: a directory that peft wrote, or several, each
                with a weight, one after the other.
            encoder: whether a model that makes vectors of texts will do, or one that guesses for another; what makes
                text of tokens needs another.

        Raises:
            CheckpointError: everything missing, unexpected or misshaped, in one message; an adapter that cannot be
                carried out, or belongs to another model. NotBuiltError: an encoder or a drafter where
                none will do.
        """
        path = resolve_checkpoint(str(path))
        if absent := reading.why_absent(path):
            raise CheckpointError(
                absent,
                where=str(path),
                expected="a checkpoint directory (config.json and *.safetensors), a .gguf file, or the word demo",
                next_step="check the path (frontend.checkpoint, --checkpoint)",
            )
        opened = _open_directory(cls, path) if reading.is_dir(path) else _open_gguf(cls, path)
        refs = _refs(adapter)
        if opened.config.architecture.encoder and (refs or not encoder):
            _refuse_encoder(opened, bool(refs))
        if opened.config.drafting is not None and (refs or not encoder):
            _refuse_drafter(opened, bool(refs))
        return opened._with_adapters(open_adapters(refs, opened.config, (str(path),))) if refs else opened

    def _with_adapters(self, adapters: Sequence[WeightedAdapter]) -> Checkpoint:
        """The same with adapters added."""
        merged = merge_places(adapters, self._places, self.config)
        config = self.config
        if merged.tied != config.tie_word_embeddings or merged.vocab_size != config.vocab_size:
            raw = {**config.raw, "tie_word_embeddings": merged.tied, "vocab_size": merged.vocab_size}
            config = replace(config, tie_word_embeddings=merged.tied, vocab_size=merged.vocab_size, raw=raw)
        tensors = {
            name: merged_info(name, merged.places[name], self._file_of(name))
            if name in merged.places
            else self.tensors[name]
            for name in expected_tensors(config)
        }
        notes = [note for one in adapters for note in one.adapter.notes]
        return replace(
            self,
            config=config,
            tensors=tensors,
            notes=(*self.notes, *notes, *merged.notes, *_tokenizer_notes(self, adapters)),
            adapters=tuple(adapters),
            _merged=merged.places,
        )

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32, [stop - start, cols] (1-D tensors: [stop - start])."""
        return (self._merged.get(name) or self._places[name]).rows(start, stop)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as stored: bfloat16 as uint16, GGUF blocks as uint8 [stop - start, bytes]."""
        return (self._merged.get(name) or self._places[name]).raw_rows(start, stop)

    @property
    def own_dtype(self) -> str:
        """What the checkpoint's files store weights as: the dtype of the token table; float32 where it dequantizes."""
        return "float32" if self.is_dequantized else self._places[EMBEDDING_WEIGHT].entry.dtype

    @property
    def is_dequantized(self) -> bool:
        """Whether what is read are not the floats in the files: a .gguf file, or codes."""
        return self.format == "gguf" or any(isinstance(place, QuantizedWeight) for place in self._places.values())

    @cached_property
    def quantized(self) -> Mapping[str, QuantizedWeight]:
        """Matrices that arrive as codes, by name, but those that adapters changed."""
        found = {}
        for name, place in self._places.items():
            weight = place if isinstance(place, QuantizedWeight) else None
            if self.format == "gguf" and isinstance(place, Stored):
                weight = blocks_of(place)
            if weight is not None and name not in self._merged and name in self.tensors:
                found[name] = weight
        return found

    @property
    def is_nested(self) -> bool:
        """Whether the files are those of a multimodal model: transformers' text class does not know such names."""
        return any(is_inside(place.name) for place in self._places.values())

    def is_changed(self, name: str) -> bool:
        """Whether adapters changed a tensor."""
        return name in self._merged

    def embedding_scale(self) -> np.ndarray | None:
        """None: rows are multiplied by sqrt(hidden_size) alone."""
        return None

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Every file that holds weights, in order of name."""
        return tuple(sorted({part.file.path for place in self._places.values() for part in place.parts}))

    def _file_of(self, name: str) -> Path:
        """Where a tensor lies, or what stands in for one that the checkpoint does not have."""
        return (self.tensors.get(name) or self.tensors[EMBEDDING_WEIGHT]).file

    def local_name(self, file: Path) -> str:
        """A weight file's path inside the checkpoint, with slashes."""
        return file.name if file == self.path else file.relative_to(self.path).as_posix()

    def config_dict(self) -> dict[str, Any]:
        """The checkpoint's own config.json (a head that is no table is said there); for GGUF one that says the same."""
        return dict(self.config.raw)

    def tokenizer_dir(self) -> Path:
        """Where tokenizer files would lie: the checkpoint's, or those that were saved with an adapter."""
        own = self.path.parent if self.path.is_file() else self.path
        return next((one.adapter.path for one in self.adapters if _tokenizer_in(one.adapter.path)), own)

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files; none when there is no vocabulary (a GGUF file carries its own inside)."""
        return _tokenizer_in(self.tokenizer_dir())

    def fingerprint(self, *, times: bool = True) -> str:
        """Sha256 over config, generation config, tokenizer, and each weight file's name, size, time, header, first MiB.

        Adapters count with their content and weight.

        Args:
            times: without them a copy of the files has the same fingerprint; a change behind the first MiB too.
        """
        digest = hashlib.sha256(self._config_bytes)
        self._add_weight_files(digest, times=times)
        self._add_text_files(digest)
        self._add_adapters(digest)
        return digest.hexdigest()

    def weights_fingerprint(self) -> str:
        """Of config and weights alone: files as in `fingerprint`, where each tensor lies, and of GGUF what reads it."""
        digest = hashlib.sha256(self._config_bytes)
        self._add_weight_files(digest, times=True)
        for name, place in sorted(self._places.items()):
            for part in place.parts:
                digest.update(f"\0{name}\0{self.local_name(part.file.path)}\0{part.name}".encode())
        if self.is_dequantized:
            reader = code_of((GGUF_READER,) if self.format == "gguf" else QUANTIZED_READERS)
            digest.update(f"\0{reader.sha256} {reader.versions}".encode())
        self._add_adapters(digest)
        return digest.hexdigest()

    def text_fingerprint(self) -> str:
        """Of the files that say how text becomes tokens and where it ends: tokenizer, templates, generation config."""
        digest = hashlib.sha256(self._config_bytes)
        if self.format == "gguf":  # the header holds what the files beside it do not
            with open(self.path, "rb") as file:
                digest.update(file.read(max(place.file.header_bytes for place in self._places.values()) + 8))
        self._add_text_files(digest)
        return digest.hexdigest()

    def _add_weight_files(self, digest: _Digest, *, times: bool) -> None:
        headers = {part.file.path: part.file.header_bytes for place in self._places.values() for part in place.parts}
        for path in self.weight_files:
            stat = path.stat()
            written = stat.st_mtime_ns if times else 0
            digest.update(f"\0{self.local_name(path)}\0{stat.st_size}\0{written}\0".encode())
            with open(path, "rb") as file:
                for _ in range(0, max(FINGERPRINT_BYTES, headers[path] + 8), FINGERPRINT_BYTES):
                    digest.update(file.read(FINGERPRINT_BYTES))

    def _add_adapters(self, digest: _Digest) -> None:
        for one in self.adapters:
            digest.update(f"\0adapter\0{one.adapter.fingerprint()}\0{one.weight!r}".encode())

    def _add_text_files(self, digest: _Digest) -> None:
        for path in self.tokenizer_files():
            digest.update(f"\0{path.name}\0".encode())
            digest.update(reading.read_bytes(path, TOKENIZER_FILE))
        generation = self.path / GENERATION_CONFIG
        if self.format != "gguf" and reading.exists(generation):
            digest.update(f"\0{GENERATION_CONFIG}\0".encode())
            digest.update(read_json(generation)[1])


def _refuse_encoder(checkpoint: Checkpoint, adapted: bool) -> None:
    what, where = f"is an encoder ({checkpoint.config.architecture.name})", str(checkpoint.path)
    if adapted:
        raise NotBuiltError(
            f"{what}, and adapters are not added to one",
            where=where,
            expected="no adapter",
            next_step="merge it with peft, save, and pass the result",
        )
    raise NotBuiltError(
        f"{what}: it makes vectors of texts, and no text of tokens",
        where=where,
        expected="a model that generates text",
        next_step="`gemma-deploy compile RECIPE --checkpoint PATH` compiles it, "
        "`gemma-deploy embed ARTIFACT` makes vectors",
    )


def _refuse_drafter(checkpoint: Checkpoint, adapted: bool) -> None:
    what = f"is a drafter ({checkpoint.config.architecture.name})"
    raise NotBuiltError(
        f"{what}, and adapters are not added to one"
        if adapted
        else f"{what}: it guesses for another model, and makes no text of its own",
        where=str(checkpoint.path),
        expected="no adapter" if adapted else "a model that generates text",
        next_step="`gemma-deploy compile RECIPE --checkpoint PATH` compiles it, "
        "`gemma-deploy run TARGET --draft ARTIFACT` uses it",
    )


def _check_ordering(checkpoint: Checkpoint) -> None:
    """See that a drafter's order of tokens has each of them once."""
    if TOKEN_ORDERING not in checkpoint.tensors:
        return
    count = checkpoint.config.vocab_size
    order = checkpoint.rows(TOKEN_ORDERING, 0, count)
    if not np.array_equal(np.sort(order), np.arange(count, dtype=np.float32)):
        raise CheckpointError(
            f"{TOKEN_ORDERING} is no order of {count} tokens",
            where=str(checkpoint.path),
            expected=f"every number from 0 to {count - 1} once",
            next_step="copy or download the file again",
        )


def _refs(adapter: str | Path | AdapterRef | Sequence[AdapterRef] | None) -> tuple[AdapterRef, ...]:
    if adapter is None:
        return ()
    if isinstance(adapter, str | Path):
        return (AdapterRef(adapter),)
    return (adapter,) if isinstance(adapter, AdapterRef) else tuple(adapter)


def _tokenizer_in(directory: Path) -> list[Path]:
    """A tokenizer's files in a directory; none when there is no vocabulary."""
    found = [directory / name for name in TOKENIZER_FILES]
    found = [path for path in found if path.is_file()]
    found += sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    return found if any(path.name in TOKENIZER_FILES[:2] for path in found) else []


def _tokenizer_notes(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter]) -> list[str]:
    """Which tokenizer is taken, where adapters bring one."""
    brought = [one.adapter.path for one in adapters if _tokenizer_in(one.adapter.path)]
    notes = [f"the tokenizer is the one beside the adapter, {brought[0]}"] if brought else []
    return notes + [f"the tokenizer beside the adapter {path} is not read" for path in brought[1:]]


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
    found = assemble(path, config, Modules({name: file for name in file.entries}, {}), gguf=True)
    return _checkpoint(cls, path, "gguf", found, json.dumps(raw).encode())


def _open_directory(cls: type[Checkpoint], path: Path) -> Checkpoint:
    weights = locate_shards(path)
    raw, config_bytes = read_json(path / CONFIG, missing="copy config.json from where the weights came from")
    config = ModelConfig.from_dict(raw, str(path / CONFIG))
    config = _with_generation_stops(config, path)
    behind: Mapping[str, Stored[Any]] = {}
    if config.architecture.encoder:
        found = read_sentence_head(path, config.token_size, config.max_position_embeddings)
        config, behind, config_bytes = (
            replace(config, sentence=found.head),
            found.places,
            config_bytes + found.described,
        )
    files = read_shards(path, weights)
    assembled = assemble(path, config, group(files, claim_of(raw)), gguf=False, behind=behind)
    checkpoint = _checkpoint(cls, path, "safetensors", assembled, config_bytes)
    _check_ordering(checkpoint)
    if reading.exists(path / INDEX_NAME) and weights.index is None:
        note = f"{INDEX_NAME} is ignored because model.safetensors is there, as transformers does"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return checkpoint


def _checkpoint(cls: type[Checkpoint], path: Path, kind: str, found: Assembled, config_bytes: bytes) -> Checkpoint:
    return cls(path, kind, found.config, found.tensors, found.notes, found.places, config_bytes)


def _with_generation_stops(config: ModelConfig, path: Path) -> ModelConfig:
    """Add generation_config.json's stop tokens: instruction-tuned Gemmas say <end_of_turn> only there."""
    file = path / GENERATION_CONFIG
    if not reading.exists(file):
        return config
    value = read_json(file)[0].get("eos_token_id")
    tokens = value if isinstance(value, list) else [value]
    stops = [token for token in tokens if type(token) is int and 0 <= token < config.vocab_size]
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *stops])))
