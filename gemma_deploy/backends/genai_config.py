"""genai_config.json: what onnxruntime-genai needs to know of a graph, so that it runs the artifact as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_deploy.bounds import Count, Size
from gemma_deploy.checkpoint.config import ModelConfig
from gemma_deploy.errors import ArtifactError
from gemma_deploy.reading import FileKind, read_object
from gemma_deploy.runtime.limits import REBUILD

CONFIG_FILE = "genai_config.json"
GRAPH = "model.onnx"
LARGEST_VOCABULARY = 1 << 22  # logits of a position are made whatever the graph says; Gemma has 262,208 at most
LARGEST_WINDOW = 65536  # positions of a cache that is made whatever the prompt; Gemma's windows are below 8192
FILE_KIND = FileKind(ArtifactError, "what `gemma-deploy compile` wrote", REBUILD, missing=REBUILD, unique_keys=True)


def genai_config(
    config: ModelConfig,
    context_length: int,
    chunk_size: int | None = None,
    *,
    gpu: bool = False,
    windowed: Sequence[int] = (),
) -> dict[str, Any]:
    """The file's content.

    Args:
        context_length: positions that the rotary tables cover.
        chunk_size: tokens of a prompt that run together; None for all. gpu: ask for the CUDA provider.
        windowed: layers whose caches hold their sliding window alone; the operator moves what is in them.
    """
    window = {
        "window_size": config.sliding_window,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": list(windowed),
    }
    sliding = {"sliding_window": window} if windowed else {}
    return {
        "model": {
            "bos_token_id": config.bos_token_id,
            "context_length": context_length,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "intra_op_num_threads": 0,  # one per core; without it genai 0.18 took one of two
                    "provider_options": [{"cuda": {}}] if gpu else [],
                },
                "filename": GRAPH,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                # It asks for a cache of each of these: layers that share others' have none, and come last.
                "num_hidden_layers": config.num_hidden_layers if config.first_sharing is None else config.first_sharing,
                "num_key_value_heads": config.num_key_value_heads,
            }
            | sliding,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": 0 if config.pad_token_id is None else config.pad_token_id,
            "type": config.architecture.genai_type,
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context_length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        }
        | ({} if chunk_size is None else {"chunk_size": chunk_size}),
    }


class _Section(BaseModel):
    """Only keys that `genai_config` writes: others name libraries that genai loads, or files anywhere."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Cuda(_Section):
    pass


class _Provider(_Section):
    cuda: _Cuda


class _SessionOptions(_Section):
    log_id: str = ""
    intra_op_num_threads: int = 0
    provider_options: list[_Provider] = []


class SlidingWindow(_Section):
    """Caches that hold a window."""

    window_size: Annotated[int, Field(ge=0, le=LARGEST_WINDOW)]
    slide_key_value_cache: bool = False
    slide_inputs: bool = False
    layers: list[int] = []


class Decoder(_Section):
    """The object `decoder`: the graph."""

    session_options: _SessionOptions
    filename: Literal["model.onnx"]
    head_size: int
    hidden_size: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int
    sliding_window: SlidingWindow | None = None


class Model(_Section):
    """The object `model`: type, tokens, context and graph."""

    bos_token_id: int | None
    context_length: Size
    decoder: Decoder
    eos_token_id: list[Count] | Count
    pad_token_id: int
    type: str
    vocab_size: Annotated[int, Field(ge=1, le=LARGEST_VOCABULARY)]


class GenaiConfig(_Section):
    """What an artifact's genai_config.json says."""

    model: Model
    search: dict[str, bool | int | float]


def read_genai_config(file: Path) -> GenaiConfig:
    """Read genai_config.json, before genai does.

    Raises:
        ArtifactError: it is missing or damaged, or has keys that no compile wrote.
    """
    raw = read_object(file, FILE_KIND)
    try:
        return GenaiConfig.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(
            "is damaged",
            where=str(file),
            problems=[f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors()],
            expected=FILE_KIND.expected,
            next_step=REBUILD,
        ) from error
