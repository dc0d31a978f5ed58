"""PEFT's own model of a base and its adapters, nothing merged: what a merged checkpoint has to compute.

PEFT injects its modules into transformers' class and computes every update beside its base matrix. The base is streamed
as in reference.py: its linears have a weight without storage and read the checkpoint a block of rows at a time. The
table and the head are cut down to the rows in use, and a head that an adapter touches is built a block of rows at a
time, so that no copy of either is ever made. In memory is what adapters hold for the decoder layers, in float32.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.errors import CheckpointError, NotBuiltError
from gemma_deploy.names import EMBEDDING, EMBEDDING_WEIGHT
from gemma_deploy.parity.gates import MERGE
from gemma_deploy.parity.reference import TorchSource, is_linear
from gemma_deploy.patched import fill_numbers, set_parameter, stock_config

HEAD_BLOCK_BYTES = 64 << 20  # of its rows as float32; each block is a model of its own
VOCABULARY = (".embed_tokens.", ".lm_head.")
FILE = "adapter_model.safetensors"


class PeftSource(TorchSource):
    """float32 arithmetic on a base and adapters as PEFT's model computes them, unmerged.

    Args:
        base: the checkpoint that the adapters belong to, without them, or the weights that an artifact holds of it.
        adapters: directories in PEFT's form, and the factor of each one's update.
        vocab_size: rows of the merged table; an adapter may bring more than the base has.
        embed_scale: rounding of the embedding scale, see docs/gemma-facts.md.
        rounding: type that A, and B times its scaling, are rounded to, as a graph stores them; None for not at all.
        name: of the source.
    """

    def __init__(
        self,
        base: WeightSource,
        adapters: Sequence[tuple[Path, float]],
        *,
        vocab_size: int,
        embed_scale: str = "exact",
        rounding: torch.dtype | None = None,
        name: str = MERGE[0],
    ) -> None:
        super().__init__(base, "hf", embed_scale=embed_scale, name=name)
        self.rounding = rounding
        self.adapters, self.vocab_size = tuple(adapters), vocab_size
        self.configs = [_config_of(path) for path, _ in self.adapters]
        self.trained_tokens = sorted({token for config in self.configs for token in _trained_tokens(config)})
        names = [name for path, _ in self.adapters for name in _names(path)]
        # Whether an adapter is about the table or the head.
        self.changes_vocabulary = any(_of_vocabulary(name) for name in names)
        # DoRA divides a channel of the table by its length over all rows: then the whole table is in memory.
        self.whole_table = any(f"{EMBEDDING}.lora_magnitude" in name for name in names)

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        if not self.changes_vocabulary:
            return super().head(features, prompt_end)
        config = self.checkpoint.config
        step = max(1, HEAD_BLOCK_BYTES // (4 * config.hidden_size))
        hidden = torch.from_numpy(np.ascontiguousarray(features))
        logits = torch.empty((len(features), self.vocab_size))
        with torch.inference_mode():
            for start in range(0, self.vocab_size, step):
                block = range(start, min(start + step, self.vocab_size))
                rows = [*block, *(token for token in self.trained_tokens if token not in block)]
                logits[:, start : block.stop] = self._adapted(rows, decoder=False).lm_head(hidden)[:, : len(block)]
            cap = config.final_logit_softcapping
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
        return logits.numpy()

    def _rows_in_use(self, tokens: set[int]) -> list[int]:
        return list(range(self.vocab_size)) if self.whole_table else sorted(tokens | set(self.trained_tokens))

    def _streamed(self, used: Sequence[int]) -> nn.Module:
        stack: nn.Module = self._adapted(used, decoder=True).model
        return stack

    def _adapted(self, rows: Sequence[int], *, decoder: bool) -> Any:
        """The causal LM with PEFT's modules in it.

        Args:
            rows: of table and head, in order; those of `trained_tokens` are among them.
            decoder: with all layers; else with one that is not to be run.
        """
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        causal = self._base_model(rows, decoder=decoder)
        model: Any = None
        for number, (path, _) in enumerate(self.adapters):
            config, name = self._config(number, rows, decoder=decoder), f"adapter_{number}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice about merging and about training
                if model is None:
                    model = PeftModel(causal, config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
                self._load(model, path, name, rows, decoder=decoder)
        model.base_model.set_adapter([f"adapter_{number}" for number in range(len(self.adapters))])
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for number, (_, weight) in enumerate(self.adapters):
                    module.set_scale(f"adapter_{number}", weight)
                    if self.rounding is not None:
                        _round(module, f"adapter_{number}", self.rounding)
                if module.lora_variant and isinstance(module.base_layer, BaseLinear):
                    module.register_forward_pre_hook(lambda module, _: module.base_layer.read())
                    module.register_forward_hook(lambda module, *_: module.base_layer.drop())
        return causal.eval()

    def _base_model(self, rows: Sequence[int], *, decoder: bool) -> Any:
        """The causal LM of transformers: linears stream; norms, table and head (cut to `rows`) are in memory."""
        from transformers import AutoModelForCausalLM

        checkpoint, config = self.checkpoint, self.checkpoint.config
        changes: dict[str, Any] = {"vocab_size": len(rows), "pad_token_id": None}
        if not decoder:
            changes |= config.architecture.part_keys(config.layers[:1])
        with init_empty_weights(include_buffers=False):
            causal = AutoModelForCausalLM.from_config(
                stock_config(config, **changes), attn_implementation="eager", dtype=torch.float32
            )
        for name, module in list(causal.named_modules()):
            if is_linear(name):
                causal.set_submodule(name, BaseLinear(self, f"{name}.weight", module))
        for name, parameter in list(causal.named_parameters()):
            if parameter.is_meta and name in checkpoint.tensors and parameter.ndim == 1:
                values = checkpoint.rows(name, 0, checkpoint.tensors[name].shape[0])
                set_parameter(causal, name, nn.Parameter(torch.from_numpy(values), requires_grad=False))
        if decoder:
            fill_numbers(causal, checkpoint)
        values = self._base_rows(EMBEDDING_WEIGHT, rows)
        if decoder:  # which reads the table as the embedding alone
            values = self.embedded(values)
        table = nn.Parameter(torch.from_numpy(values), requires_grad=False)
        causal.model.embed_tokens.weight = causal.lm_head.weight = table
        if config.head_weight != EMBEDDING_WEIGHT:
            head = torch.from_numpy(self._base_rows(config.head_weight, rows))
            causal.lm_head.weight = nn.Parameter(head, requires_grad=False)
        return causal

    def _base_rows(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """[rows, H] of the base; zeros where it has none, which an adapter's own table stands for."""
        count, width = self.checkpoint.tensors[name].shape
        values = np.zeros((len(rows), width), np.float32)
        at = 0
        for start, stop in _runs(rows):
            there = min(stop, count)
            if start < there:
                values[at : at + there - start] = self.checkpoint.rows(name, start, there)
            at += stop - start
        return values

    def _config(self, number: int, rows: Sequence[int], *, decoder: bool) -> Any:
        """An adapter's settings for a model of `rows`."""
        config = copy.deepcopy(self.configs[number])
        config.init_lora_weights = False  # they are read from the file
        indices = getattr(config, "trainable_token_indices", None)
        if indices:
            places = {row: place for place, row in enumerate(rows)}
            config.trainable_token_indices = (
                {key: [places[token] for token in tokens] for key, tokens in indices.items()}
                if isinstance(indices, dict)
                else [places[token] for token in indices]
            )
        if not decoder:
            config.layers_to_transform = config.layers_pattern = None
        return config

    def _load(self, model: Any, path: Path, adapter: str, rows: Sequence[int], *, decoder: bool) -> None:
        """Let PEFT put an adapter's tensors where they belong.

        Raises:
            CheckpointError: it has no place for one, or finds none for a pair of its own.
        """
        from peft import set_peft_model_state_dict

        tensors = {}
        with safe_open(path / FILE, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if decoder or ".layers." not in name or ".layers.0." in name:
                    tensors[name] = self._cut(file, name, rows).float()
        found = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
        # Of a resized vocabulary PEFT writes a saved table a second time, under a name that it does not read.
        strange = [name for name in found.unexpected_keys if ".modules_to_save." not in name]
        lost = [f"{name}: PEFT's model has no such tensor" for name in strange]
        if decoder:
            lost += [f"{name}: not in the file" for name in found.missing_keys if "lora_" in name and adapter in name]
        if lost:
            raise CheckpointError(
                "PEFT does not load the adapter as it is",
                where=str(path),
                problems=lost,
                next_step="save the adapter again with the version of peft that is installed here",
            )

    def _cut(self, file: Any, name: str, rows: Sequence[int]) -> torch.Tensor:
        """A tensor of the file; of one with a dimension of the vocabulary, `rows` of that."""
        part = file.get_slice(name)
        shape = part.get_shape()
        sizes = {self.vocab_size, self.checkpoint.tensors[EMBEDDING_WEIGHT].shape[0]}
        axes = [axis for axis, size in enumerate(shape) if size in sizes] if _of_vocabulary(name) else []
        if not axes:
            return file.get_tensor(name)
        runs = [slice(start, min(stop, shape[axes[0]])) for start, stop in _runs(rows)]
        pieces = [part[run] if axes[0] == 0 else part[:, run] for run in runs]
        return torch.cat(pieces, dim=axes[0])


class BaseLinear(nn.Linear):
    """A linear of the base that PEFT wraps: its weight takes no memory (NaN, were it used) and is read when it runs."""

    def __init__(self, source: TorchSource, name: str, replaced: Any) -> None:
        nn.Module.__init__(self)
        if replaced.bias is not None:
            raise NotBuiltError(
                f"{name}: linears with a bias are not compared in this version", next_step="report it: no Gemma has one"
            )
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.source, self.name = source, name
        self.register_parameter("bias", None)
        self.drop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out]."""
        return self.source.linear(self.name, x)

    def read(self) -> None:
        """Have the whole weight in memory, for an update that asks for it (DoRA)."""
        values = self.source.checkpoint.rows(self.name, 0, self.out_features)
        self.weight = nn.Parameter(torch.from_numpy(values), requires_grad=False)

    def drop(self) -> None:
        """Have none of it there."""
        empty = torch.full((), torch.nan).expand(self.out_features, self.in_features)
        self.weight = nn.Parameter(empty, requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """A linear with a weight of its own, for `modules_to_save`, which loads another one into it."""
        return nn.Linear(self.in_features, self.out_features, bias=False)


def _round(module: Any, adapter: str, dtype: torch.dtype) -> None:
    """Round a linear's A, and its B times the scaling, in place."""
    if adapter in module.lora_A:
        down, up, scaling = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]
        down.data = down.data.to(dtype).float()
        up.data = (up.data * scaling).to(dtype).float() / scaling


def _config_of(path: Path) -> Any:
    told = logging.getLogger("bitsandbytes")  # which peft imports, and which misses a kernel that is not used here
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        from peft import PeftConfig
    finally:
        told.setLevel(level)
    config = PeftConfig.from_pretrained(str(path))
    config.inference_mode = True
    return config


def _trained_tokens(config: Any) -> list[int]:
    indices = getattr(config, "trainable_token_indices", None) or []
    return list(itertools.chain(*indices.values())) if isinstance(indices, Mapping) else list(indices)


def _names(path: Path) -> list[str]:
    with safe_open(path / FILE, "pt") as file:
        return list(file.keys())


def _of_vocabulary(name: str) -> bool:
    return any(module in f".{name}" for module in VOCABULARY)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows that follow each other."""
    start = previous = None
    for row in rows:
        if previous is not None and row == previous + 1:
            previous = row
            continue
        if start is not None and previous is not None:
            yield start, previous + 1
        start = previous = row
    if start is not None and previous is not None:
        yield start, previous + 1
