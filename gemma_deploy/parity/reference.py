"""The torch side of parity: transformers' own class (`hf`) or the patched one, streamed through accelerate.

The model is built empty. accelerate's hooks ask `Weights` for norms and embedding rows when a module runs and drop them
afterwards; linears read their matrix a block of rows at a time. So 8 MiB of weights are in memory, whatever the model's
size, and everything else is the class's own code. All rows of all cases go through the stack
in one pass, padded on the right, where causality keeps padding from reaching a token; an encoder gets a mask. The token
table is cut down to the tokens in use: no copy of it is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.errors import NotBuiltError
from gemma_deploy.machine import give_memory_back
from gemma_deploy.names import EMBEDDING_WEIGHT, PER_LAYER_TABLE, STREAM_PROJECTION, STREAM_UNEMBED
from gemma_deploy.parity.cases import Case
from gemma_deploy.parity.choices import Choices, watch_choices
from gemma_deploy.parity.sources import Features
from gemma_deploy.patched import patched_causal, patched_module, stock_config
from gemma_deploy.progress import Tick

Weighting = Literal["fp32", "bf16", "w8a16"]
BLOCK_BYTES = 8 << 20  # of a matrix as float32; malloc maps and unmaps anything of 32 MiB, at the price of page faults
LINEARS = (
    *("_proj", "router.proj", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
    *("linear_left", "linear_right", "embedding_projection"),
)
NORMS = ("norm", "norm_1", "norm_2")
NUMBERED = tuple(name.removeprefix("model.") for name in (STREAM_PROJECTION, STREAM_UNEMBED))


class TorchSource:
    """float32 arithmetic on the checkpoint's weights.

    Args:
        checkpoint: open checkpoint, or the weights of an artifact.
        kind: `hf` is transformers' class with eager attention, `patched` the one of source_code/.
        weighting: the weights: as they are, matrices rounded to bfloat16, or int8 per row by `quantize(8)`.
        embed_scale: rounding of the embedding scale, see docs/gemma-facts.md; given to `hf` through its embedding rows.
        dtype: of weights and arithmetic.
        name: instead of one made from the above.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        kind: Literal["hf", "patched"],
        weighting: Weighting = "fp32",
        *,
        embed_scale: str = "exact",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> None:
        if kind == "hf" and weighting == "w8a16":
            raise ValueError("transformers' own class has no int8 linears of this form")
        self.checkpoint, self.kind, self.weighting, self.embed_scale = checkpoint, kind, weighting, embed_scale
        self.name = kind if weighting == "fp32" else f"{kind} {weighting}"
        self.dtype = dtype
        if dtype != torch.float32:
            self.name += f" in {str(dtype).removeprefix('torch.')}"
        self.name = name or self.name
        self.absmax: dict[str, float] = {}
        self.chosen: Choices = {}
        self.progress: Tick | None = None
        self.unit = "layers"

    def run(self, cases: Sequence[Case]) -> Features:
        """Hidden states after the final norm, [prompt + steps, H] of every row."""
        sequences = [case.sequence(row) for case in cases for row in range(len(case.prompts))]
        with torch.inference_mode():
            hidden = self._forward(sequences, self._watch)
        rows: Iterator[np.ndarray] = (
            hidden[i, : len(sequence)].float().numpy().copy() for i, sequence in enumerate(sequences)
        )
        return [[next(rows) for _ in case.prompts] for case in cases]

    def maxima(self, ids: np.ndarray) -> dict[str, float]:
        """Run windows [n, seqlen] and give `absmax`: the largest magnitude of what each module reads and makes."""
        with torch.inference_mode():
            self._forward([tuple(map(int, window)) for window in ids], self._watch_absmax)
        return self.absmax

    def head(self, features: np.ndarray, prompt_end: bool = False) -> np.ndarray:
        """features: [n, H] -> [n, V]."""
        config = self.checkpoint.config
        with torch.inference_mode():
            hidden = torch.from_numpy(np.ascontiguousarray(features)).to(self.dtype)
            logits = self.linear(config.head_weight, hidden)
            cap = config.final_logit_softcapping
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
            return logits.float().numpy()

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Apply a stored matrix [out, in], a block of its rows at a time: x [..., in] -> [..., out]."""
        count, width = self.checkpoint.tensors[name].shape
        step = max(1, BLOCK_BYTES // (4 * width))
        out = torch.empty((*x.shape[:-1], count), dtype=self.dtype)
        for start in range(0, count, step):
            stop = min(start + step, count)
            weight = self._matrix(self.checkpoint.rows(name, start, stop))
            if self.weighting == "w8a16" and not name.endswith("router.proj.weight"):
                quantization = patched_module("quantization_vacc")
                out[..., start:stop] = quantization.QuantizedLinearPerChannel(*quantization.quantize_rows(weight))(x)
            else:
                out[..., start:stop] = nn.functional.linear(x, weight)
        return out

    def embedded(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n, H] of the table as the class has to have them, which multiplies them by its own square root."""
        checkpoint, size = self.checkpoint, self.checkpoint.config.hidden_size
        if self.kind == "hf" and self.embed_scale != "exact":
            rounded = patched_module("layers_vacc").rounded_sqrt(size, torch.float32, self.embed_scale)
            rows = (rows * (rounded / float(np.float32(size**0.5)))).astype(np.float32)
        scale = checkpoint.embedding_scale()
        if scale is not None:  # the model multiplies by the root itself
            root = patched_module("layers_vacc").rounded_sqrt(size, torch.float32, self.embed_scale)
            rows = (rows * (scale.astype(np.float64) / root)).astype(np.float32)
        return rows

    def modules(
        self, case: Case, row: int, wanted: Callable[[str], bool], *, keep: Callable[[str, np.ndarray], None]
    ) -> None:
        """Run one row and hand over what modules read and make, in the order they run.

        Args:
            wanted: is asked for each name, `MODULE.out` or `MODULE.in`.
            keep: called with the name and a float32 array [positions, features].
        """
        config = self.checkpoint.config
        turned = not config.architecture.positions_first

        def kept(name: str, value: torch.Tensor) -> None:
            if config.altup is not None and value.ndim == 4 and value.shape[0] == config.altup.streams:
                value = value.permute(1, 2, 0, 3)  # streams come first in both classes
            keep(name, _flat(value, turned))

        def watch(model: nn.Module) -> None:
            for name, module in model.named_modules():
                name = f"model.{name}"
                if wanted(f"{name}.in"):
                    module.register_forward_pre_hook(_hand_over_input(f"{name}.in", kept), with_kwargs=True)
                if wanted(f"{name}.out"):
                    module.register_forward_hook(_hand_over_output(f"{name}.out", kept))

        with torch.inference_mode():
            self._forward([case.sequence(row)], watch)

    def _forward(self, sequences: Sequence[Sequence[int]], watch: Callable[[nn.Module], None]) -> torch.Tensor:
        """Hidden states [rows, longest, H] of token sequences."""
        used = self._rows_in_use({token for sequence in sequences for token in sequence})
        index = {token: i for i, token in enumerate(used)}
        longest = max(map(len, sequences))
        ids, real = (torch.zeros((len(sequences), longest), dtype=torch.int64) for _ in range(2))
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor([index[token] for token in sequence])
            real[i, : len(sequence)] = 1
        mask = {"attention_mask": real} if self.checkpoint.config.architecture.encoder else {}
        model = self._streamed(used)
        watch(model)
        for number, layer in enumerate(model.layers, 1):
            layer.register_forward_hook(lambda *_, number=number: self._passed(number, len(model.layers)))
        return model(input_ids=ids, use_cache=False, **mask).last_hidden_state

    def _passed(self, number: int, count: int) -> None:
        """Give memory back behind a layer, and tell how far the run is."""
        give_memory_back()
        if self.progress is not None:
            self.progress(number, count)

    def _rows_in_use(self, tokens: set[int]) -> list[int]:
        """Rows of the token table that the model is to have, in order."""
        return sorted(tokens)

    def _streamed(self, used: Sequence[int]) -> nn.Module:
        """The decoder stack, which reads its weights when it needs them; its table holds the rows `used`."""
        model = self._build(len(used))
        for layer in self.checkpoint.config.layers:
            _stream_experts(self, model, layer)
        for name, module in list(model.named_modules()):
            if is_linear(name):
                model.set_submodule(name, StreamedLinear(self, f"model.{name}.weight", module))
        cpu_offload(model, torch.device("cpu"), offload_buffers=True, state_dict=Weights(self, used))
        return model

    def _build(self, vocab_size: int) -> nn.Module:
        """The decoder stack on the meta device, with a table of `vocab_size` rows."""
        config = self.checkpoint.config
        if self.kind == "patched":
            changes = {**self._tables(vocab_size), "embed_scale": self.embed_scale}
            causal = patched_causal(config, **changes).to(self.dtype).eval()
            if self.weighting == "w8a16":
                causal = causal.quantize(8, embeddings=True)
            return causal.model
        from transformers import AutoModel

        with init_empty_weights(include_buffers=False):
            # no padding token, whose row a cut-down table need not have
            stock = stock_config(config, **self._tables(vocab_size))
            model = AutoModel.from_config(stock, attn_implementation="eager", dtype=self.dtype)
        return model.eval()

    def _tables(self, rows: int) -> dict[str, Any]:
        """Keys of a config whose tables have so many rows."""
        tables = {"vocab_size": rows, "pad_token_id": None}
        vectors = self.checkpoint.config.per_layer
        return tables | {"vocab_size_per_layer_input": rows} if vectors is not None and vectors.rows else tables

    def _matrix(self, values: np.ndarray) -> torch.Tensor:
        weight = torch.from_numpy(values).to(self.dtype)
        return weight.bfloat16().float() if self.weighting == "bf16" else weight

    def _watch(self, model: nn.Module) -> None:
        self._watch_absmax(model)
        watch_choices(model, self.checkpoint.config.layers, self.chosen)

    def _watch_absmax(self, model: nn.Module) -> None:
        """Record the largest magnitude of what linears and norms read and modules make, as `MODULE.in` and `.out`."""
        for name, module in model.named_modules():
            name = f"model.{name}"
            if isinstance(module, nn.Identity):  # in the place of a norm that VaultGemma has not, nor has its graph
                continue
            if is_linear(name) or name.endswith(NORMS):
                module.register_forward_pre_hook(_remember_input(f"{name}.in", self.absmax), with_kwargs=True)
            if (
                name.endswith((*LINEARS, *NORMS, "act_fn", "embed_tokens", "embed_tokens_per_layer"))
                or name.rpartition(".")[2].isdigit()
            ):
                module.register_forward_hook(_remember_output(f"{name}.out", self.absmax))
        for layer in (layer for layer in self.checkpoint.config.layers if layer.scalar):
            number = float(self.checkpoint.rows(f"{layer.prefix}{layer.scalar}", 0, 1)[0])
            if number:  # the stream in front of the layer's number
                hook = _remember_output(f"{layer.prefix}unscaled", self.absmax, 1 / number)
                model.layers[layer.index].register_forward_hook(hook)


def is_linear(name: str) -> bool:
    """Whether a module, by its path in a stack or a causal LM, is a linear with a matrix worth streaming."""
    return name.endswith(LINEARS) or name.rpartition(".")[0].endswith(NUMBERED)


class StreamedLinear(nn.Module):
    """Stands in for a linear of either class: the same product, without ever holding the whole matrix."""

    def __init__(self, source: TorchSource, name: str, replaced: nn.Module) -> None:
        super().__init__()
        if getattr(replaced, "bias", None) is not None:
            raise NotBuiltError(
                f"{name}: linears with a bias are not compared in this version", next_step="report it: no Gemma has one"
            )
        self.source, self.name = source, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, in] -> [batch, seq, out]."""
        return self.source.linear(self.name, x)


class StreamedStack:
    """Stands in for the matrices of all experts [experts, out, in]: each is read when its tokens come.

    Args:
        name: of the tensor; rows: of a matrix.
    """

    def __init__(self, source: TorchSource, name: str, rows: int) -> None:
        self.source, self.name, self.rows = source, name, rows

    def __getitem__(self, expert: Any) -> torch.Tensor:
        """The matrix [out, in] of an expert."""
        start = int(expert) * self.rows
        weight = self.source._matrix(self.source.checkpoint.rows(self.name, start, start + self.rows))
        if self.source.weighting != "w8a16":
            return weight
        codes, scale = patched_module("quantization_vacc").quantize_rows(weight)
        return codes * scale[:, None]


def _stream_experts(source: TorchSource, model: nn.Module, layer: LayerSpec) -> None:
    """Take the matrices of experts out of a layer of either class; its code indexes what stands in for them."""
    if layer.experts is None:
        return
    for name, (_, rows, _) in layer.experts.stacks(layer.hidden_size).items():
        owner, _, last = f"{layer.prefix}{name}".removeprefix("model.").rpartition(".")
        module = model.get_submodule(owner)
        delattr(module, last)
        setattr(module, last, StreamedStack(source, f"{layer.prefix}{name}", rows))


class Weights(Mapping[str, torch.Tensor]):
    """Norms and the cut-down table, as the model asks for them; nothing is kept.

    Args:
        used: token ids that the table holds, in order.
    """

    def __init__(self, source: TorchSource, used: Sequence[int]) -> None:
        self.source, self.used = source, used

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == f"{PER_LAYER_TABLE}.weight".removeprefix("model."):
            return self._per_layer_table()
        if not name.startswith("embed_tokens."):
            stored = f"model.{name}"
            rows = self.source.checkpoint.rows(stored, 0, self.source.checkpoint.tensors[stored].shape[0])
            return torch.from_numpy(rows).to(self.source.dtype)
        if self.source.weighting != "w8a16":
            return self._table()
        quantized, scale = patched_module("quantization_vacc").quantize_rows(self._table())
        return scale if name.endswith(".scale") else quantized

    def _table(self) -> torch.Tensor:
        checkpoint = self.source.checkpoint
        rows = np.concatenate([checkpoint.rows(EMBEDDING_WEIGHT, token, token + 1) for token in self.used])
        return self.source._matrix(self.source.embedded(rows))

    def _per_layer_table(self) -> torch.Tensor:
        """Rows in use of the table of per-layer vectors, as the class has to have them."""
        source, config = self.source, self.source.checkpoint.config
        name = f"{PER_LAYER_TABLE}.weight"
        known = source.checkpoint.tensors[name].shape[0]
        own = [token if token < known else 0 for token in self.used]
        rows = np.concatenate([source.checkpoint.rows(name, token, token + 1) for token in own])
        if source.kind == "hf" and source.embed_scale != "exact" and config.per_layer is not None:
            size = config.per_layer.size
            rounded = patched_module("layers_vacc").rounded_sqrt(size, torch.float32, source.embed_scale)
            rows = (rows * (rounded / float(np.float32(size**0.5)))).astype(np.float32)
        return source._matrix(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.source.checkpoint.tensors)


def _first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value[0]


def _flat(value: torch.Tensor, turned: bool) -> np.ndarray:
    """[1, positions, ...] -> [positions, features]; of four dimensions [1, heads, positions, D] where `turned`.

    What has two has them already: routers and experts of transformers' class take all tokens in a row.
    """
    if value.ndim == 2:
        return value.float().numpy()
    if value.ndim == 4 and turned:
        value = value.transpose(1, 2)
    return value[0].reshape(value.shape[1], -1).float().numpy()


def _remember(name: str, found: dict[str, float], values: torch.Tensor) -> None:
    low, high = values.aminmax()
    found[name] = float(np.max([found.get(name, 0.0), float(high), -float(low)]))  # NaN stays NaN


def _remember_output(name: str, found: dict[str, float], factor: float = 1.0) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _remember(name, found, factor * _first_tensor(getattr(output, "last_hidden_state", output)))

    return hook


def _remember_input(name: str, found: dict[str, float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        _remember(name, found, _first_tensor(args[0] if args else kwargs["hidden_states"]))

    return hook


def _hand_over_output(name: str, keep: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep(name, _first_tensor(output))

    return hook


def _hand_over_input(name: str, keep: Callable[[str, torch.Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(name, _first_tensor(args[0] if args else kwargs["hidden_states"]))

    return hook
