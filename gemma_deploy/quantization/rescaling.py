"""Powers of two that keep a model inside float16, chosen from measured maxima.

Every tensor between two operators may be stored divided by 2**e without losing a bit, where the next operator undoes
it: a norm absorbs any scale (its eps is divided by 4**e), a linear takes the difference of its input's and output's e
into its weight, the residual stream carries one e from the embedding to the last norm, and the attention's scale
factor takes those of queries and keys. Nothing undoes a scale of what GELU reads: where that does not fit, the MLP's
inside is computed in float32 (`wide`).

Arrays and numbers only: knows no torch, no graph, no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_deploy.checkpoint import ModelConfig

FP16_MAX = 65504.0
HEADROOM = 4.0  # demanded by the gate, of other text than the calibration's
MARGIN = 2.0  # on top of it when the exponents are chosen
MLP = "mlp"


@dataclass(frozen=True)
class Rescaling:
    """How each tensor of a float16 graph is stored.

    Args:
        exponents: `MODULE.in` or `MODULE.out` -> e; the tensor is stored divided by 2**e. Absent: 0.
        wide: what is computed in float32 beside what always is: "mlp" (gate, up and their product), or nothing.
        absmax: largest magnitudes measured, of the true tensors.
    """

    exponents: Mapping[str, int] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    absmax: Mapping[str, float] = field(default_factory=dict)

    def of(self, point: str) -> int:
        """The exponent of a tensor."""
        return self.exponents.get(point, 0)

    def linear_shift(self, linear: str) -> int:
        """Its weight is multiplied by two to this power."""
        return self.of(f"{linear}.in") - self.of(f"{linear}.out")

    @property
    def residual(self) -> int:
        """Exponent of the embedding's output and of the stream it starts."""
        return self.of("model.embed_tokens.out")

    def is_wide(self, point: str) -> bool:
        """Whether a tensor is float32 in the graph."""
        inner = (".mlp.gate_proj.out", ".mlp.act_fn.out", ".mlp.up_proj.out")
        return (MLP in self.wide and point.endswith(inner)) or point == "model.norm.out"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, zeros left out."""
        nonzero = {point: e for point, e in self.exponents.items() if e}
        return {"exponents": nonzero, "wide": list(self.wide), "absmax": dict(self.absmax)}

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> Rescaling:
        """What an artifact was built with: nothing, unless it is float16."""
        return cls.from_json(manifest["rescaling"]) if manifest.get("rescaling") else cls()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Rescaling:
        """The inverse of `to_json`."""
        return cls(dict(record["exponents"]), tuple(record["wide"]), dict(record["absmax"]))


def choose(config: ModelConfig, maxima: Mapping[str, float]) -> Rescaling:
    """The smallest exponents with which every tensor stays `HEADROOM` x `MARGIN` below float16's largest number.

    Args:
        maxima: `MODULE.in` or `MODULE.out` -> largest magnitude, measured in float32.
    """
    return _Chooser(config, maxima).choose()


def needed(absmax: float) -> int:
    """The smallest e >= 0 with absmax / 2**e * HEADROOM * MARGIN <= 65504."""
    over = absmax * HEADROOM * MARGIN / FP16_MAX
    return max(0, math.ceil(math.log2(over))) if over > 0 else 0


class _Chooser:
    def __init__(self, config: ModelConfig, maxima: Mapping[str, float]) -> None:
        self.config, self.absmax = config, maxima
        self.four_norms = config.model_type != "gemma"
        self.qk_norm = config.model_type == "gemma3_text"
        self.exponents: dict[str, int] = {}
        self.wide: set[str] = set()

    def choose(self) -> Rescaling:
        layers = [f"model.layers.{i}" for i in range(self.config.num_hidden_layers)]
        stream = ["model.embed_tokens.out"]
        for layer in layers:
            stream += [f"{layer}.out", f"{layer}.{self._middle}.in"]
            branches = (
                ("post_attention_layernorm.out", "post_feedforward_layernorm.out")
                if self.four_norms
                else ("self_attn.o_proj.out", "mlp.down_proj.out")
            )
            stream += [f"{layer}.{branch}" for branch in branches]
        residual = max(self._need(point) for point in stream)
        self.exponents |= dict.fromkeys(stream, residual)
        for layer in layers:
            self.exponents[f"{layer}.input_layernorm.in"] = residual
            self._attention(layer)
            self._mlp(layer)
        self.exponents["model.norm.in"] = residual
        return Rescaling(dict(self.exponents), tuple(sorted(self.wide)), dict(self.absmax))

    @property
    def _middle(self) -> str:
        return "pre_feedforward_layernorm" if self.four_norms else "post_attention_layernorm"

    def _need(self, point: str) -> int:
        return needed(self.absmax[point])

    def _attention(self, layer: str) -> None:
        e, attention = self.exponents, f"{layer}.self_attn"
        normed = self._need(f"{layer}.input_layernorm.out")
        e |= dict.fromkeys((f"{attention}.{name}_proj.in" for name in "qkv"), normed)
        e[f"{layer}.input_layernorm.out"] = normed
        for name in ("q", "k"):
            e[f"{attention}.{name}_proj.out"] = self._need(f"{attention}.{name}_proj.out")
            if self.qk_norm:
                e[f"{attention}.{name}_norm.in"] = e[f"{attention}.{name}_proj.out"]
                e[f"{attention}.{name}_norm.out"] = self._need(f"{attention}.{name}_norm.out")
        # Probabilities weigh the values: their sum is no larger than the largest value.
        values = max(self._need(f"{attention}.v_proj.out"), self._need(f"{attention}.o_proj.in"))
        e[f"{attention}.v_proj.out"] = e[f"{attention}.o_proj.in"] = values
        if self.four_norms:
            made = self._need(f"{attention}.o_proj.out")
            e[f"{attention}.o_proj.out"] = e[f"{layer}.post_attention_layernorm.in"] = made

    def _mlp(self, layer: str) -> None:
        e, mlp = self.exponents, f"{layer}.mlp"
        normed = self._need(f"{layer}.{self._middle}.out")
        e |= dict.fromkeys((f"{layer}.{self._middle}.out", f"{mlp}.gate_proj.in", f"{mlp}.up_proj.in"), normed)
        if self._need(f"{mlp}.gate_proj.out"):  # GELU is not linear: nothing undoes a scale
            self.wide.add(MLP)
        product = max(self._need(f"{mlp}.up_proj.out"), self._need(f"{mlp}.down_proj.in"))
        e[f"{mlp}.up_proj.out"] = e[f"{mlp}.down_proj.in"] = product
        if self.four_norms:
            made = self._need(f"{mlp}.down_proj.out")
            e[f"{mlp}.down_proj.out"] = e[f"{layer}.post_feedforward_layernorm.in"] = made
