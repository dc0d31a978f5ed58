"""A checkpoint on disk: config and lazy tensor index. Opening it checks everything but the values of weights.

Second step of the data path (docs/design.md 2). Directories of safetensors, single or sharded, and .gguf files look
the same from here on: Hugging Face tensor names, float32 row blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy import paths, reading
from gemma_deploy.checkpoint.adapters.merging import AdapterRef, WeightedAdapter, merge_places, open_adapters
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.checkpoint.expected import expected_tensors
from gemma_deploy.checkpoint.index import (
    INDEX_NAME,
    locate_shards,
    read_json,
    read_shards,
    refuse_other_formats,
)
from gemma_deploy.checkpoint.naming import is_inside, name_tensors
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile, readable
from gemma_deploy.checkpoint.sentence import read_sentence_head
from gemma_deploy.checkpoint.source import Rows, TensorInfo, equal
from gemma_deploy.checkpoint.stored import Stored
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.errors import CheckpointError, NotBuiltError
from gemma_deploy.names import CONFIG, EMBEDDING_WEIGHT, GENERATION_CONFIG, HEAD_WEIGHT
from gemma_deploy.provenance import code_of

if TYPE_CHECKING:
    from hashlib import _Hash as _Digest

    from gemma_deploy.checkpoint.gguf_reader import GgufFile

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
    _places: Mapping[str, Stored[Any]]
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
            encoder: whether a model that makes vectors of texts will do; what makes text of tokens needs another.

        Raises:
            CheckpointError: everything missing, unexpected or misshaped, in one message; an adapter that cannot be
                carried out, or belongs to another model. NotBuiltError: an encoder where none will do.
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
        return opened._with_adapters(open_adapters(refs, opened.config, (str(path),))) if refs else opened

    def _with_adapters(self, adapters: Sequence[WeightedAdapter]) -> Checkpoint:
        """The same with adapters added."""
        merged = merge_places(adapters, self._places, self.config)
        config = self.config
        if merged.tied != config.tie_word_embeddings or merged.vocab_size != config.vocab_size:
            raw = {**config.raw, "tie_word_embeddings": merged.tied, "vocab_size": merged.vocab_size}
            config = replace(config, tie_word_embeddings=merged.tied, vocab_size=merged.vocab_size, raw=raw)
        tensors = {
            name: _merged_info(self, name, merged.places[name]) if name in merged.places else self.tensors[name]
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
        """What the checkpoint's files store weights as: the dtype of the token table; float32 of a .gguf file."""
        return "float32" if self.format == "gguf" else self._places[EMBEDDING_WEIGHT].entry.dtype

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
        return tuple(sorted({info.file for info in self.tensors.values()}))

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
            digest.update(f"\0{name}\0{self.local_name(place.file.path)}\0{place.name}".encode())
        if self.format == "gguf":
            reader = code_of((GGUF_READER,))
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
        headers = {place.file.path: place.file.header_bytes for place in self._places.values()}
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
    name = checkpoint.config.architecture.name
    raise NotBuiltError(
        f"is an encoder ({name}), and adapters are not added to one"
        if adapted
        else f"is an encoder ({name}): it makes vectors of texts, and no text of tokens",
        where=str(checkpoint.path),
        expected="no adapter" if adapted else "a model that generates text",
        next_step="merge it with peft, save, and pass the result"
        if adapted
        else "`gemma-deploy compile RECIPE --checkpoint PATH` compiles it, `gemma-deploy embed ARTIFACT` makes vectors",
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


def _merged_info(checkpoint: Checkpoint, name: str, place: Rows) -> TensorInfo:
    """Of a tensor that adapters changed; the file is the one its base lies in."""
    own = checkpoint.tensors.get(name) or checkpoint.tensors[EMBEDDING_WEIGHT]
    shape, dtype = place.entry.shape, place.entry.dtype
    return TensorInfo(name, shape, dtype, own.file, math.prod(shape) * BY_NAME[dtype].itemsize)


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
    raw, config_bytes = read_json(path / CONFIG, missing="copy config.json from where the weights came from")
    config = ModelConfig.from_dict(raw, str(path / CONFIG))
    config = _with_generation_stops(config, path)
    behind: Mapping[str, Stored[SafetensorsFile]] = {}
    if config.architecture.encoder:
        found = read_sentence_head(path, config.hidden_size, config.max_position_embeddings)
        config, behind, config_bytes = (
            replace(config, sentence=found.head),
            found.places,
            config_bytes + found.described,
        )
    files = read_shards(path, weights)
    checkpoint = _assemble(cls, path, "safetensors", config, files, config_bytes, behind=behind)
    if reading.exists(path / INDEX_NAME) and weights.index is None:
        note = f"{INDEX_NAME} is ignored because model.safetensors is there, as transformers does"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    return checkpoint


def _with_generation_stops(config: ModelConfig, path: Path) -> ModelConfig:
    """Add generation_config.json's stop tokens: instruction-tuned Gemmas say <end_of_turn> only there."""
    file = path / GENERATION_CONFIG
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
    files: Mapping[str, SafetensorsFile] | Mapping[str, GgufFile],
    config_bytes: bytes,
    *,
    behind: Mapping[str, Stored[SafetensorsFile]] | None = None,
) -> Checkpoint:
    """Compare what is there with what the config calls for.

    Args:
        behind: what lies in files of its own, behind an encoder.
    """
    expected, behind = expected_tensors(config), behind or {}
    named = name_tensors(files, [name for name in expected if name not in behind], tied=config.tie_word_embeddings)
    places: dict[str, Stored[Any]] = {name: Stored(files[source], source) for name, source in named.sources.items()}
    places |= behind
    shapes = expected | ({HEAD_WEIGHT: expected[EMBEDDING_WEIGHT]} if HEAD_WEIGHT in places else {})
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in places]
    problems += [f"unexpected: {name} {list(files[name].entries[name].shape)}" for name in named.extras]
    problems += [f"twice: {names} are one tensor of the model" for names in named.twice]
    for name, place in places.items():
        entry = place.entry
        if entry.shape != shapes[name]:
            problems.append(
                f"wrong shape: {place.name} is {list(entry.shape)}, config.json calls for {list(shapes[name])}"
            )
        elif kind == "safetensors" and not readable(entry.dtype):
            problems.append(f"wrong dtype: {place.name} is {entry.dtype}, expected bfloat16, float16 or float32")
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensor(s) do not fit the config",
            where=str(path),
            problems=problems,
            next_step="make sure config.json and the weights belong together and every shard is there",
        )
    notes = list(named.notes)
    if config.tie_word_embeddings and HEAD_WEIGHT in places:
        config = _tied_or_not(config, places, notes)
    tensors = {name: _info(name, places[name]) for name in expected_tensors(config)}
    notes.extend(config.warnings)
    return cls(path, kind, config, tensors, tuple(notes), {name: places[name] for name in tensors}, config_bytes)


def _info(name: str, place: Stored[Any]) -> TensorInfo:
    entry = place.entry
    return TensorInfo(name, entry.shape, entry.dtype, place.file.path, int(entry.stop - entry.start))


def _tied_or_not(config: ModelConfig, places: Mapping[str, Stored[Any]], notes: list[str]) -> ModelConfig:
    """Keep a head beside the table apart when it is another matrix, whatever the config says, as transformers does."""
    if equal(places[HEAD_WEIGHT], places[EMBEDDING_WEIGHT]):
        notes.append(f"{HEAD_WEIGHT} is ignored: it equals the token table, to which the config ties it")
        return config
    notes.append(
        f"{HEAD_WEIGHT} differs from the token table although tie_word_embeddings is true: the two are kept apart, as "
        "transformers does; set tie_word_embeddings to false in config.json to say so"
    )
    return replace(config, tie_word_embeddings=False, raw={**config.raw, "tie_word_embeddings": False})
