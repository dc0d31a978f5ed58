"""What a port of a model to another framework has to show: config, tokenizer, base model, causal LM.

Each part of the staged (patched) model against transformers' own, in float32 and in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_deploy.architectures import SWITCHES
from gemma_deploy.calibration.sources import SOURCES
from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.names import CONFIG
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.compare import compare_sources, judged, measures_of
from gemma_deploy.parity.gates import Line, relative
from gemma_deploy.reading import read_text, text_kind
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.text.saving import link_file

if TYPE_CHECKING:
    from gemma_deploy.parity.reference import TorchSource

LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}
TEXTS = 64


def config_line(checkpoint: Checkpoint) -> Line:
    """How many keys of transformers' config class have another value in the patched one."""
    from transformers import AutoConfig

    from gemma_deploy.patched import configured, patched_config

    config = checkpoint.config
    raw = {key: value for key, value in config.raw.items() if key not in ("model_type", "auto_map", *SWITCHES)}
    kind = {"model_type": config.architecture.transformers_type}
    stock = configured(AutoConfig.for_model, kind | raw).to_dict()
    patched = patched_config(config).to_dict()
    differing = sorted(key for key, value in stock.items() if patched.get(key, KeyError) != value)
    name = "config keys that differ" + (f" ({', '.join(differing)})" if differing else "")
    return Line("hf = patched", name, float(len(differing)), 0.0, not differing)


def tokenizer_lines(checkpoint: Checkpoint, text: Path | None, notes: list[str]) -> list[Line]:
    """How many texts become other tokens with the staged directory's tokenizer; no line where there is none.

    Where an adapter brings a tokenizer, that is the one of both sides.
    """
    if not checkpoint.tokenizer_files() or checkpoint.format == "gguf":
        notes.append("no tokenizer files of transformers' own beside the checkpoint: tokenizers are not compared")
        return []
    source = SOURCES["c4"]
    texts = list(islice(source.texts(source.sample), TEXTS))
    if text is not None:
        texts.append(read_text(text, text_kind("--text")))
    with tempfile.TemporaryDirectory() as scratch:
        refs = [AdapterRef(one.adapter.path, one.weight) for one in checkpoint.adapters]
        staged = _tokenizer(stage_checkpoint(checkpoint.path, Path(scratch) / "staged", adapter=refs, weights=False))
        stock = _tokenizer(_stock_directory(checkpoint, Path(scratch) / "stock"))
        differing = sum(stock(one)["input_ids"] != staged(one)["input_ids"] for one in texts)
    return [Line("hf = patched", f"texts of {len(texts)} with other tokens", float(differing), 0.0, not differing)]


def _stock_directory(checkpoint: Checkpoint, out: Path) -> Path:
    """What transformers reads config and tokenizer from: the checkpoint, or `out` with the tokenizer of an adapter."""
    own = checkpoint.tokenizer_dir()
    if own == checkpoint.path:
        return own
    out.mkdir()
    for file in checkpoint.tokenizer_files():
        target = out / file.relative_to(own)
        target.parent.mkdir(exist_ok=True)
        link_file(file, target)
    link_file(checkpoint.path / CONFIG, out / CONFIG)
    return out


def _tokenizer(directory: Path) -> Any:
    """The tokenizer that transformers makes of a directory.

    Raises:
        CheckpointError: it cannot.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # it has no error of its own
        raise CheckpointError(
            f"transformers refuses the tokenizer: {' '.join(str(error).split())[:300]}",
            where=str(directory),
            expected="files that transformers' AutoTokenizer reads",
            next_step="copy the tokenizer's files again from where the weights came from",
        ) from error


def model_lines(
    checkpoint: Checkpoint,
    sources: Mapping[str, TorchSource],
    cases: Sequence[Case],
    *,
    report: Callable[[str], None],
    measures: list[dict[str, Any]],
) -> list[Line]:
    """Largest error of hidden states and of logits, relative to the largest value.

    Args:
        sources: the float32 pair; measures: every metric of the logits is added.
    """
    import torch

    from gemma_deploy.parity.reference import TorchSource

    lines = []
    for dtype, limit in LIMITS.items():
        pair = list(sources.values())
        if dtype != "float32":
            pair = [TorchSource(checkpoint, source.kind, dtype=getattr(torch, dtype)) for source in pair]
        kept = [_Kept(source) for source in pair]
        names = (kept[0].name, kept[1].name)
        found = compare_sources(
            {one.name: one for one in kept}, [names], cases, vocab_size=checkpoint.config.vocab_size, report=report
        )
        error = _relative([one.features for one in kept])
        lines.append(Line(" = ".join(names), f"base model, {dtype}, relative error", error, limit, error <= limit))
        (logits,) = judged(relative(limit, names), found)
        name = f"causal LM, {dtype}, relative error"
        lines.append(Line(logits.comparison, name, logits.value, limit, logits.passed))
        measures += measures_of(found)
    return lines


class _Kept:
    """A source that remembers its hidden states."""

    def __init__(self, source: TorchSource) -> None:
        self.source, self.name = source, source.name
        self.features: list[list[np.ndarray]] = []

    def run(self, cases: Sequence[Case]) -> list[list[np.ndarray]]:
        self.features = self.source.run(cases)
        return self.features

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        return self.source.head(features, prompt_end)


def _relative(features: Sequence[list[list[np.ndarray]]]) -> float:
    """Largest difference over the largest reference value; NaN when anything is not finite."""
    reference, test = ([row for case in one for row in case] for one in features)
    largest = np.max([np.abs(row).max() for row in reference])  # NaN stays NaN
    error = np.max([np.abs(a - b).max() for a, b in zip(reference, test, strict=True)])
    return float(error / np.maximum(largest, 1.0))
