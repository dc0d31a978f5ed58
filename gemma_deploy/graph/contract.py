"""Names, dtypes and shapes at the border of the static graphs (design 4.3), written once.

| graph | inputs | outputs |
| --- | --- | --- |
| iter0 | input_ids, attention_mask, position_ids [B,P] | logits [B,1,V], present.{i}.key/value [B,Hk,P,D] |
| iter1 | input_ids, position_ids [B,1], attention_mask [B,C+1], past_key_values.{i}.key/value [B,Hk,C,D] | logits [B,1,V],
present.{i}.key/value [B,Hk,1,D] |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemma_deploy.checkpoint.config import ModelConfig

Scheme = Literal["fp32", "bf16", "fp16", "w8a16"]
GRAPHS = ("iter0", "iter1")
PREFILL, DECODE = GRAPHS


@dataclass(frozen=True)
class Port:
    """One graph input or output."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphContract:
    """Sizes of a pair of static graphs.

    Args:
        batch: B; prefill: P, length of iter0; context: C, cache slots of iter1.
        cache_dtype: of past_key_values and present: float16 in fp16 artifacts, float32 in all others.
    """

    batch: int
    prefill: int
    context: int
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    cache_dtype: str

    @classmethod
    def of(cls, config: ModelConfig, scheme: Scheme, batch: int, prefill: int, context: int) -> GraphContract:
        """Contract of `config` compiled as `scheme`."""
        return cls(
            batch=batch,
            prefill=prefill,
            context=context,
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            cache_dtype="float16" if scheme == "fp16" else "float32",
        )

    def inputs(self, graph: str) -> tuple[Port, ...]:
        """Inputs of `iter0` or `iter1`, in order."""
        seq = self.prefill if graph == PREFILL else 1
        keys = self.prefill if graph == PREFILL else self.context + 1
        ports = [
            Port("input_ids", "int64", (self.batch, seq)),
            Port("attention_mask", "int64", (self.batch, keys)),
            Port("position_ids", "int64", (self.batch, seq)),
        ]
        if graph == DECODE:
            ports += self._cache("past_key_values", self.context)
        return tuple(ports)

    def outputs(self, graph: str) -> tuple[Port, ...]:
        """Outputs of `iter0` or `iter1`, in order."""
        logits = Port("logits", "float32", (self.batch, 1, self.vocab_size))
        return (logits, *self._cache("present", self.prefill if graph == PREFILL else 1))

    def to_json(self) -> dict[str, Any]:
        """Sizes and ports, for the manifest."""
        graphs = {
            graph: {
                "inputs": [asdict(port) for port in self.inputs(graph)],
                "outputs": [asdict(port) for port in self.outputs(graph)],
            }
            for graph in GRAPHS
        }
        return {**asdict(self), "graphs": graphs}

    def _cache(self, prefix: str, length: int) -> list[Port]:
        shape = (self.batch, self.kv_heads, length, self.head_dim)
        return [
            Port(f"{prefix}.{i}.{part}", self.cache_dtype, shape)
            for i in range(self.layers)
            for part in ("key", "value")
        ]
