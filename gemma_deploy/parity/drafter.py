"""What is measured of a drafter: logits and following states, on keys and values and states drawn at random.

The reference is transformers' own class. Its weights are read when they are needed, a block of a matrix at a time, as
reference.py does it for decoders; the logits of an ordered table are those of the whole one, of which the class
computes some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload, init_empty_weights
from torch import nn

from gemma_deploy.architectures import FULL, SLIDING, LayerType
from gemma_deploy.architectures.drafting import CENTROIDS, TOKEN_ORDERING
from gemma_deploy.checkpoint import ModelConfig, WeightSource
from gemma_deploy.graph.contract import SHARED_KV
from gemma_deploy.names import HEAD
from gemma_deploy.parity.metrics import Comparison, Metrics
from gemma_deploy.parity.reference import LINEARS, StreamedLinear, TorchSource
from gemma_deploy.patched import configured

WINDOWS = 5  # positions there are, where the context holds them
STEPS = 4  # guesses in a row
AROUND = ("pre_projection", "post_projection")


@dataclass(frozen=True)
class DraftCase:
    """What a drafter is asked.

    Args:
        positions: T, that have keys and values.
        shared: kind -> keys and values [1,Hk,T,D] float32.
        tokens: of each guess in a row, the embedding of the token in front of it [backbone].
        state: [backbone] of the position in front of the first.
    """

    name: str
    positions: int
    shared: Mapping[LayerType, tuple[np.ndarray, np.ndarray]]
    tokens: tuple[np.ndarray, ...]
    state: np.ndarray

    def feeds(self) -> dict[str, np.ndarray]:
        """Keys and values as inputs of the graph."""
        pairs = self.shared.items()
        return {
            f"{SHARED_KV}.{kind}.{part}": pair[at] for kind, pair in pairs for at, part in enumerate(("key", "value"))
        }


Steps = list[tuple[np.ndarray, np.ndarray]]  # logits [V] and following state [backbone] of each guess


def draft_cases(config: ModelConfig, context: int) -> list[DraftCase]:
    """A case behind the window, one of a single position, and one that fills the window exactly."""
    assert config.drafting is not None
    rng, window, backbone = np.random.default_rng(0), config.sliding_window or 1, config.drafting.backbone
    cases = []
    for name, wanted in (("windows", WINDOWS * window + 3), ("one position", 1), ("a window", window)):
        positions = min(wanted, context - 1)
        shared: dict[LayerType, tuple[np.ndarray, np.ndarray]] = {}
        for layer in config.templates:
            shape = (1, layer.kv_heads, positions, layer.head_dim)
            keys, values = (rng.standard_normal(shape, np.float32) for _ in range(2))
            shared[layer.kind] = keys, values
        tokens = tuple(rng.standard_normal(backbone, np.float32) for _ in range(STEPS))
        cases.append(DraftCase(name, positions, shared, tokens, rng.standard_normal(backbone, np.float32)))
    return cases


class DrafterSource:
    """transformers' own class on a checkpoint's weights, in float32.

    Args:
        weights: an open checkpoint, or the weights of an artifact.
    """

    def __init__(self, weights: WeightSource) -> None:
        self.weights, self.matrices = weights, TorchSource(weights, "hf")
        self._model = self._built()

    def run(self, cases: Sequence[DraftCase]) -> list[Steps]:
        """Every guess of every case."""
        with torch.inference_mode():
            return [self._steps(case) for case in cases]

    def _steps(self, case: DraftCase) -> Steps:
        state, made = case.state, []
        shared = {kind: tuple(torch.from_numpy(one) for one in pair) for kind, pair in case.shared.items()}
        for kind in (FULL, SLIDING):  # the class looks at the length of both, whatever its layers are
            shared.setdefault(kind, next(iter(shared.values())))
        for token in case.tokens:
            out = self._model(
                inputs_embeds=torch.from_numpy(np.concatenate([token, state]))[None, None],
                position_ids=torch.tensor([[case.positions]]),
                attention_mask=torch.ones(1, case.positions, dtype=torch.int64),
                shared_kv_states=shared,
            )
            logits, state = (value[0, 0].numpy().copy() for value in (out.logits, out.last_hidden_state))
            made.append((logits, state))
        return made

    def _built(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = self.weights.config
        made = configured(AutoConfig.for_model, stock_keys(config))
        with init_empty_weights(include_buffers=False), all_reading(made.text_config):
            model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
        for name, module in list(model.named_modules()):
            if name.endswith(LINEARS) or name in AROUND:
                model.set_submodule(name, StreamedLinear(self.matrices, f"{name}.weight", module))
        model.set_submodule(HEAD, StreamedLinear(self.matrices, config.head_weight, model.lm_head))
        if model.masked_embedding is not None:
            model.set_submodule("masked_embedding", _OrderedLogits(self))
        for module in (model.pre_projection, model.lm_head):
            module.weight = torch.empty(0)  # the class asks where it lies, and hands the head's on
        del model.model.embed_tokens
        cpu_offload(model, torch.device("cpu"), offload_buffers=True, state_dict=_Weights(self.weights))
        return model


@contextmanager
def all_reading(text_config: Any) -> Iterator[None]:
    """Let transformers build layers that all read keys and values from elsewhere.

    transformers 5.23 looks for a layer among the assistant's own that makes them, and raises where there is none
    (findings/transformers-gemma4-assistant-cannot-be-built.sh): its classes ask for this property alone.
    """
    kind, name = type(text_config), "kv_sharing_modes"
    own = vars(kind).get(name)
    setattr(kind, name, property(lambda config: ["reuse"] * config.num_hidden_layers))
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)


class _OrderedLogits(nn.Module):
    """Gemma4AssistantMaskedEmbedder with logits of the whole table, of which those of the chosen groups are kept."""

    def __init__(self, source: DrafterSource) -> None:
        super().__init__()
        self.source = source

    def forward(self, hidden_states: torch.Tensor, lm_head_weight: torch.Tensor) -> torch.Tensor:
        """[1,1,H] -> [1,1,V]."""
        weights, matrices = self.source.weights, self.source.matrices
        config = weights.config
        assert config.drafting is not None
        groups = torch.topk(matrices.linear(CENTROIDS, hidden_states), k=config.drafting.chosen, dim=-1).indices
        order = torch.from_numpy(weights.rows(TOKEN_ORDERING, 0, config.vocab_size)).long()
        chosen = order.view(config.drafting.centroids, -1)[groups.flatten()].flatten()
        logits = matrices.linear(config.head_weight, hidden_states)
        kept = logits[..., chosen]
        return torch.full_like(logits, kept.min().item() - 1.0).index_copy_(-1, chosen, kept)


class _Weights(Mapping[str, torch.Tensor]):
    """Norms and numbers, as the model asks for them."""

    def __init__(self, weights: WeightSource) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.weights.rows(name, 0, self.weights.tensors[name].shape[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.tensors)

    def __len__(self) -> int:
        return len(self.weights.tensors)


def stock_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of transformers' own config class of a drafter."""
    row, raw = config.architecture, dict(config.raw)
    outer = {key: raw.pop(key) for key in row.around if key in raw}
    raw = {key: value for key, value in raw.items() if key not in ("auto_map", "architectures", "model_type")}
    inner = {**raw, "model_type": row.text_type, "num_kv_shared_layers": config.num_hidden_layers}
    tied = config.tie_word_embeddings
    return {"model_type": row.transformers_type, "text_config": inner, "tie_word_embeddings": tied, **outer}


def compared(reference: Sequence[Steps], test: Sequence[Steps]) -> tuple[list[Metrics], list[float]]:
    """Of every case: logits compared, and the largest difference of states relative to the largest state."""
    metrics, states = [], []
    for ours, theirs in zip(reference, test, strict=True):
        comparison = Comparison()
        for (logits, _), (other, _) in zip(ours, theirs, strict=True):
            comparison.add(logits, other)
        metrics.append(comparison.result())
        largest = max(1.0, max(float(np.abs(state).max()) for _, state in ours))
        apart = max(float(np.abs(state - other).max()) for (_, state), (_, other) in zip(ours, theirs, strict=True))
        states.append(apart / largest)
    return metrics, states
