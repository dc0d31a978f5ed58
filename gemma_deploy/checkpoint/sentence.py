"""What turns an encoder's hidden states into a vector for each text: the folders that sentence-transformers writes.

`modules.json` names them, in order: the model itself, pooling, dense layers, normalisation. What is carried out is what
EmbeddingGemma has: the mean over a text's tokens, linears without bias and activation, length 1. Anything else would
give other vectors, and is refused before a weight is read. config_sentence_transformers.json has the prompts that stand
in front of texts of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from gemma_deploy import reading
from gemma_deploy.bounds import Size
from gemma_deploy.checkpoint.index import JSON_FILE, SINGLE_NAME, read_json
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile, readable
from gemma_deploy.checkpoint.stored import Stored
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import CONFIG
from gemma_deploy.writing import HALF_PAIR

MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
FILES = (MODULES, PROMPTS, LENGTH)
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TRANSFORMER, POOLING, DENSE, NORMALIZE = "Transformer", "Pooling", "Dense", "Normalize"
IDENTITY = "Identity"
MEAN = "mean"
# Of older files, a key of its own for each way of pooling.
MEAN_TOKENS, WAY = "pooling_mode_mean_tokens", "pooling_mode_"
LINEAR = "linear"  # the module inside a dense layer's folder
WHOLE = "copy the whole folder again from where the weights came from, with everything that modules.json names"
MOST_PROMPTS, MOST_CHARACTERS = 256, 10_000
LEAST_TOKENS, LEAST_LENGTH = 1e-9, 1e-12  # what sentence-transformers divides by, at least
# Sizes to which Matryoshka training lets a vector be cut; EmbeddingGemma's model card names these.
MATRYOSHKA = (512, 256, 128)


@dataclass(frozen=True)
class DenseLayer:
    """A linear behind pooling, without bias and activation.

    Args:
        name: its module, FOLDER.linear, as in `2_Dense.linear`.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    in_features: Size
    out_features: Size


@dataclass(frozen=True)
class SentenceHead:
    """What stands behind the last norm of an encoder: mean over real tokens, dense layers in order, length 1.

    Args:
        dimensions: of a vector.
        prompts: what is put in front of a text, by the kind of text (`query`, `document`, ...).
        default_prompt: the kind that is meant where none is named; None for none.
        longest: tokens of a text, at most; None where no file says.
    """

    dense: Annotated[tuple[DenseLayer, ...], Field(max_length=16)]
    dimensions: Size
    prompts: dict[str, str]
    default_prompt: str | None = None
    longest: Size | None = None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes [out, in] of the dense layers' matrices, in order."""
        return {f"{one.name}.weight": (one.out_features, one.in_features) for one in self.dense}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes to which a vector may be cut, the whole first."""
        return (self.dimensions, *(size for size in MATRYOSHKA if size < self.dimensions))


@dataclass(frozen=True)
class Found:
    """A head, where its matrices lie, and the bytes of the files that describe it."""

    head: SentenceHead
    places: Mapping[str, Stored[SafetensorsFile]]
    described: bytes


def read_sentence_head(directory: Path, hidden_size: int, positions: int) -> Found:
    """Read what stands behind an encoder, and check that it can be carried out.

    Args:
        directory: of the checkpoint; hidden_size: of what the encoder gives; positions: that it was made for.

    Raises:
        CheckpointError: a file is missing or damaged, or asks for what is not built; all at once.
    """
    modules, described = _modules(directory)
    problems: list[str] = []
    kinds = [kind for kind, _ in modules]
    inner = kinds[2:-1]
    if kinds[:2] != [TRANSFORMER, POOLING] or kinds[-1:] != [NORMALIZE] or any(kind != DENSE for kind in inner):
        raise CheckpointError(
            f"names the modules {', '.join(kinds) or 'none'}",
            where=str(directory / MODULES),
            expected=f"{TRANSFORMER}, {POOLING}, any number of {DENSE}, {NORMALIZE}, as EmbeddingGemma has them",
            next_step="pass a checkpoint of EmbeddingGemma or one that was trained from it; others are not built",
        )
    described += _pooling(directory / modules[1][1], hidden_size, problems)
    dense: list[DenseLayer] = []
    places: dict[str, Stored[SafetensorsFile]] = {}
    width = hidden_size
    for _, folder in modules[2:-1]:
        made = _dense(directory / folder, width, problems)
        if made is None:
            continue
        layer, file, content = made
        dense.append(layer)
        places[f"{layer.name}.weight"] = Stored(file, f"{LINEAR}.weight")
        described, width = described + content, layer.out_features
    head = SentenceHead(tuple(dense), width, {})
    head, content = _with_prompts(directory, head, problems)
    head, length = _with_length(directory, head, positions, problems)
    if reading.exists(directory / SENTENCEPIECE) and not reading.exists(directory / TOKENIZER):
        problems.append(f"{TOKENIZER} is not there, which alone says what stands before and behind a text")
    if problems:
        raise CheckpointError(
            f"{len(problems)} thing(s) behind the encoder cannot be carried out",
            where=str(directory),
            problems=problems,
            expected="mean pooling, dense layers without bias and activation whose widths fit each other",
            next_step=f"{WHOLE}; or pass one that has nothing else",
        )
    return Found(head, places, described + content + length)


def pooled(
    hidden: np.ndarray, mask: np.ndarray, head: SentenceHead, *, weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The vectors of texts in float64: what graphs are compared with.

    Args:
        hidden: [B, S, H] behind the last norm; mask: [B, S] of 0 and 1; weights: [out, in] of the dense layers.

    Returns:
        [B, dimensions], each of length 1; 0 for a text without a token.
    """
    real = mask[..., None].astype(np.float64)
    vectors = (hidden.astype(np.float64) * real).sum(1) / np.maximum(real.sum(1), LEAST_TOKENS)
    for layer in head.dense:
        vectors = vectors @ weights[f"{layer.name}.weight"].astype(np.float64).T
    return normalised(vectors)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., n] of length 1 (0 stays 0), in the dtype that they have."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: np.ndarray = vectors / np.maximum(lengths, LEAST_LENGTH).astype(vectors.dtype)
    return found


def cut(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    """The first channels of vectors [..., n], of length 1 again: a cut vector is shorter than 1."""
    return normalised(vectors[..., :dimensions])


def _modules(directory: Path) -> tuple[list[tuple[str, str]], bytes]:
    """(last part of the type, folder) of each module in order, and the file's bytes."""
    path = directory / MODULES
    kind = replace(
        JSON_FILE,
        expected="a UTF-8 file that holds a JSON list of {type, path}",
        missing="an encoder needs what sentence-transformers saved beside it (pooling, dense layers): " + WHOLE,
    )
    data = reading.read_bytes(path, kind)
    listed = reading.value_in(data, path, kind)
    entries = listed if isinstance(listed, list) else []
    found = [(one.get("type"), one.get("path")) for one in entries if isinstance(one, dict)]
    named = [(str(one).rpartition(".")[2], folder) for one, folder in found if isinstance(one, str)]
    wrong = [repr(folder)[:80] for kind_, folder in named if not _is_folder(folder, root=kind_ == TRANSFORMER)]
    if len(named) != len(entries) or not named or wrong:
        raise CheckpointError(
            "is no list of modules in folders of its own directory",
            where=str(path),
            problems=wrong,
            expected='[{"type": "...Transformer", "path": ""}, {"type": "...Pooling", "path": "1_Pooling"}, ...]',
            next_step=WHOLE,
        )
    return [(kind_, str(folder)) for kind_, folder in named], data


def _is_folder(folder: object, *, root: bool) -> bool:
    """Whether a module's path is one folder beside modules.json; the encoder itself lies there."""
    if not isinstance(folder, str):
        return False
    if root:
        return folder == ""
    return folder not in ("", ".", "..") and not any(letter in folder for letter in "/\\:\0")


def _pooling(folder: Path, hidden_size: int, problems: list[str]) -> bytes:
    config, data = read_json(folder / CONFIG, missing=WHOLE)
    where = f"{folder.name}/{CONFIG}"
    old = sorted(
        key.removeprefix(WAY).removesuffix("_tokens") for key, on in config.items() if key.startswith(WAY) and on
    )
    given = config.get("pooling_mode", old)
    ways = [given] if isinstance(given, str) else given
    if ways != [MEAN]:
        said = ", ".join(map(str, ways)) if isinstance(ways, list) and ways else "none"
        problems.append(f"{where}: pooling is {said[:80]!r}, and only the mean over tokens is built")
    width = config.get("embedding_dimension", config.get("word_embedding_dimension", hidden_size))
    if width != hidden_size:
        problems.append(f"{where}: pools {str(width)[:20]} channels, the encoder has {hidden_size}")
    if config.get("include_prompt", True) is not True:
        problems.append(f"{where}: include_prompt is false: leaving a prompt's tokens out of the mean is not built")
    return data


def _dense(folder: Path, width: int, problems: list[str]) -> tuple[DenseLayer, SafetensorsFile, bytes] | None:
    """One dense layer, its file, and the bytes of its config; None where it cannot be told what it is."""
    if not reading.is_dir(folder):
        problems.append(f"{folder.name} is not there, and {MODULES} names it")
        return None
    config, data = read_json(folder / CONFIG, missing=WHOLE)
    where = f"{folder.name}/{CONFIG}"
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")  # sentence-transformers' default
    if str(activation).rpartition(".")[2] != IDENTITY:
        problems.append(f"{where}: activation_function is {str(activation)[:80]!r}, and only {IDENTITY} is built")
    if config.get("bias", True) is not False:
        problems.append(f"{where}: a bias is not built")
    if config.get("use_residual", False):
        problems.append(f"{where}: use_residual is not built")
    sizes: list[Any] = [config.get(key) for key in ("in_features", "out_features")]
    if any(type(size) is not int or not 0 < size < 2**20 for size in sizes):
        problems.append(f"{where}: in_features and out_features are {str(sizes)[:80]}, expected two sizes")
        return None
    if sizes[0] != width:
        problems.append(f"{where}: reads {sizes[0]} channels, and what stands before it gives {width}")
    weights = folder / SINGLE_NAME
    if not reading.is_file(weights):
        pickled = " (pickled weights are never opened)" if reading.exists(folder / "pytorch_model.bin") else ""
        problems.append(f"{folder.name}/{SINGLE_NAME} is not there{pickled}")
        return None
    file = SafetensorsFile(weights)
    entry = file.entries.get(f"{LINEAR}.weight")
    others = sorted(set(file.entries) - {f"{LINEAR}.weight"})
    if entry is None or others:
        problems.append(f"{folder.name}/{SINGLE_NAME}: holds {', '.join(file.entries)[:200]}, expected {LINEAR}.weight")
    elif entry.shape != (sizes[1], sizes[0]):
        problems.append(f"{folder.name}/{SINGLE_NAME}: {LINEAR}.weight is {list(entry.shape)}, its config says "
                        f"{[sizes[1], sizes[0]]}")  # fmt: skip
    elif not readable(entry.dtype):
        problems.append(f"{folder.name}/{SINGLE_NAME}: {entry.dtype}, expected bfloat16, float16 or float32")
    return DenseLayer(f"{folder.name}.{LINEAR}", sizes[0], sizes[1]), file, data


def _with_prompts(directory: Path, head: SentenceHead, problems: list[str]) -> tuple[SentenceHead, bytes]:
    """The head with the prompts of config_sentence_transformers.json, where there is one."""
    path = directory / PROMPTS
    if not reading.exists(path):
        return head, b""
    config, data = read_json(path)
    prompts = config.get("prompts") or {}
    right = isinstance(prompts, dict) and len(prompts) <= MOST_PROMPTS
    if not right or any(not isinstance(text, str) or len(text) > MOST_CHARACTERS for text in prompts.values()):
        problems.append(f"{PROMPTS}: prompts is no object of at most {MOST_PROMPTS} texts")
        return head, data
    halves = [repr(name)[:80] for name, text in prompts.items() if HALF_PAIR.search(name + text)]
    if halves:
        problems.append(f"{PROMPTS}: prompts {', '.join(halves)[:200]}: half a character, which no UTF-8 text has")
    default = config.get("default_prompt_name")
    if default is not None and default not in list(prompts):
        problems.append(f"{PROMPTS}: default_prompt_name {str(default)[:80]!r} is none of {', '.join(prompts)[:200]}")
        default = None
    return replace(head, prompts=dict(prompts), default_prompt=default), data


def _with_length(
    directory: Path, head: SentenceHead, positions: int, problems: list[str]
) -> tuple[SentenceHead, bytes]:
    """The head with the longest text of sentence_bert_config.json, where there is one."""
    path = directory / LENGTH
    if not reading.exists(path):
        return head, b""
    config, data = read_json(path)
    longest: Any = config.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        problems.append(f"{LENGTH}: max_seq_length is {str(longest)[:80]}, expected a number of tokens")
        return head, data
    if config.get("do_lower_case"):
        problems.append(f"{LENGTH}: do_lower_case is true, and texts are tokenized as they are")
    return replace(head, longest=None if longest is None else min(longest, positions)), data
