"""Powers of two that keep a model inside float16, chosen from measured maxima.

Every tensor between two operators may be stored divided by 2**e without losing a bit, where the next operator undoes
it: a norm absorbs any scale (its eps is divided by 4**e), a linear takes the difference of its input's and output's e
into its weight, the residual stream carries one e from the embedding to the last norm, and the attention's scale
factor takes those of queries and keys. Of several streams all carry one exponent, and what attention reads is added
to the stream and carries it as well; what mixes streams and compares their sizes is float32. Vectors that layers add
carry one exponent for all layers, which the projection behind them undoes. Nothing undoes a scale of what GELU reads:
where that does not fit, the inside of the MLP, or what is between a layer's two linears of vectors, is computed in
float32.

Arrays and numbers only: knows no torch, no graph, no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_deploy.architectures import AltUp, Branch, Experts, LayerSpec, PerLayerTable, inner_modules
from gemma_deploy.bounds import Exponent, Point
from gemma_deploy.names import FP16_MAX, NORM, PER_LAYER_TABLE, STREAM_PROJECTION, STREAM_UNEMBED, TOKEN_PROJECTION

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

OF_VECTORS = "per_layer_input"  # in `Rescaling.wide`
OF_EXPERTS = "experts"  # in `Rescaling.wide` wherever there are some
OF_STREAMS = "altup"  # likewise
_OF_EXPERTS = re.compile(rf"model\.layers\.\d+\.((router|experts)\..*|{Experts.norm}\.out|{Experts.post_norm}\.in)")
_OF_STREAMS = re.compile(rf"model\.layers\.\d+\.altup\..*|({STREAM_PROJECTION}|{STREAM_UNEMBED})\.\d+\.(in|out)")
_GATED = re.compile(r"model\.layers\.\d+\.(ple_block\.)?(per_layer_input_gate|act_fn)\.out")
_BEHIND = (f"{NORM}.out", f"{TOKEN_PROJECTION}.in", f"{TOKEN_PROJECTION}.out")
HEADROOM = 4.0  # demanded by the gate, of other text than the calibration's
MARGIN = 2.0  # on top of it when the exponents are chosen


@dataclass(frozen=True)
class Rescaling:
    """How each tensor of a float16 graph is stored.

    Args:
        exponents: `MODULE.in` or `MODULE.out` -> e; the tensor is stored divided by 2**e. Absent: 0.
        wide: branches whose inside is computed in float32 (the name is that of manifests): "mlp" (gate, up and their
            product), "per_layer_input" (gate of the vectors, and its product with them), "experts" (and what chooses
            them), "altup" (what mixes streams, projections of streams and their sizes, statistics of sparse gates), or
            none.
        absmax: largest magnitudes measured, of the true tensors.
    """

    exponents: Mapping[str, Exponent] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    absmax: Mapping[Point, float] = field(default_factory=dict)

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

    def is_in_float32(self, point: str) -> bool:
        """Whether a tensor is float32 in the graph."""
        inner = tuple(f".{name}.out" for branch in self.wide for name in inner_modules(branch))
        if OF_VECTORS in self.wide and _GATED.fullmatch(point):
            return True
        if OF_EXPERTS in self.wide and _OF_EXPERTS.fullmatch(point) and not point.endswith("router.norm.in"):
            return True
        if OF_STREAMS in self.wide and _OF_STREAMS.fullmatch(point):
            return True
        return point.endswith(inner) or point in _BEHIND

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, zeros left out."""
        nonzero = {point: e for point, e in self.exponents.items() if e}
        return {"exponents": nonzero, "wide": list(self.wide), "absmax": dict(self.absmax)}

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
        self.exponents: dict[str, int] = {}
        self.in_float32: set[str] = set()

    def choose(self) -> Rescaling:
        stream = ["model.embed_tokens.out"]
        for layer in self.config.layers:
            stream.append(f"{layer.prefix}out")
            stream += [f"{layer.prefix}unscaled"] if layer.scalar else []
            stream += [f"{layer.prefix}{branch.norm}.in" for branch in layer.branches[1:]]
            stream += [f"{layer.prefix}{branch.post_norm or branch.output}.out" for branch in layer.branches]
            if (add := layer.per_layer) is not None:
                stream += [f"{layer.prefix}{add.gate}.in", f"{layer.prefix}{add.norm}.out"]
            if (beside := layer.laurel) is not None:
                entered = f"{layer.prefix}{layer.branches[0].norm}"  # reads what is expected of the stream
                stream += [f"{entered}.in", f"{entered}.out", f"{layer.prefix}{beside.norm}.out"]
        if (table := self.config.per_layer) is not None:  # a norm behind the projection undoes the stream's scale
            stream += [f"{table.projection}.in", f"{table.projection}.out", f"{table.norm}.in"]
        residual = max(self._need(point) for point in stream)
        self.exponents |= dict.fromkeys(stream, residual)
        for layer in self.config.layers:
            self.exponents[f"{layer.prefix}{layer.branches[0].norm}.in"] = residual
            for branch in layer.branches:
                self._branch(layer, branch)
            if layer.experts is not None:
                self._experts(layer, layer.experts, residual)
            if layer.altup is not None:
                self._streams(layer, layer.altup, residual)
        if table is not None:
            self._vectors(table)
        self.exponents["model.norm.in"] = residual
        return Rescaling(dict(self.exponents), tuple(sorted(self.in_float32)), dict(self.absmax))

    def _vectors(self, table: PerLayerTable) -> None:
        """The vectors of all layers, and what each layer makes of its own."""
        adding = [(layer.prefix, layer.per_layer) for layer in self.config.layers if layer.per_layer is not None]
        points = [f"{table.norm}.out", *([f"{PER_LAYER_TABLE}.out"] if table.rows else [])]
        points += [f"{at}{add.projection}.in" for at, add in adding]
        self.exponents |= dict.fromkeys(points, max(map(self._need, points)))
        for at, add in adding:
            made = self._need(f"{at}{add.projection}.out")
            self.exponents |= dict.fromkeys((f"{at}{add.projection}.out", f"{at}{add.norm}.in"), made)
            if self._need(f"{at}{add.gate}.out"):
                self.in_float32.add(OF_VECTORS)

    def _need(self, point: str) -> int:
        return needed(self.absmax[point])

    def _branch(self, layer: LayerSpec, branch: Branch) -> None:
        e, at = self.exponents, layer.prefix
        # LAuReL adds what attention reads to the stream.
        beside = branch.attends and layer.laurel is not None
        normed = self.exponents[f"{at}{branch.norm}.out"] if beside else self._need(f"{at}{branch.norm}.out")
        e |= dict.fromkeys((f"{at}{reader}.in" for reader in branch.entry.readers), normed)
        e[f"{at}{branch.norm}.out"] = normed
        if branch.attends:
            self._scores(layer, least=normed if beside else 0)
        elif any(self._need(f"{at}{reader}.out") for reader in branch.entry.readers if reader != branch.exit.maker):
            self.in_float32.add(branch.module)  # GELU is not linear: nothing undoes a scale
        # What the last linear reads is as large as its maker's rows: probabilities weigh values, and their sum is no
        # larger than the largest; in the MLP a product takes the scale of one of its factors.
        read = f"{at}{branch.output}.in"
        if branch.exit.maker is None:  # values have a norm of their own, and are no larger than the root of head_dim
            e[read] = 0
        else:
            made = f"{at}{branch.exit.maker}.out"
            e[made] = e[read] = max(self._need(made), self._need(read))
        if branch.post_norm:
            added = self._need(f"{at}{branch.output}.out")
            e[f"{at}{branch.output}.out"] = e[f"{at}{branch.post_norm}.in"] = added

    def _streams(self, layer: LayerSpec, altup: AltUp, residual: int) -> None:
        """What carries streams along is float32; LAuReL's two linears are as any, and its norm's result is added."""
        e, at, beside, attention = self.exponents, layer.prefix, layer.laurel, layer.branches[0]
        assert beside is not None
        self.in_float32.add(OF_STREAMS)
        e[f"{at}{altup.norm}.in"] = residual
        projections = (f"{name}.{i}" for name in (STREAM_PROJECTION, STREAM_UNEMBED) for i in range(altup.streams - 1))
        e |= dict.fromkeys((f"{one}.{end}" for one in projections for end in ("in", "out")), residual)
        e[f"{at}{beside.left}.in"] = e[f"{at}{attention.norm}.out"]
        low = max(residual, self._need(f"{at}{beside.left}.out"), self._need(f"{at}{beside.right}.in"))
        made = max(residual, self._need(f"{at}{beside.right}.out"))
        e |= {f"{at}{beside.left}.out": low, f"{at}{beside.right}.in": low}
        e |= {f"{at}{beside.right}.out": made, f"{at}{beside.norm}.in": made}

    def _experts(self, layer: LayerSpec, experts: Experts, residual: int) -> None:
        """Beside the MLP, in float32: norms read the stream, and what both make is added up in front of another one."""
        e, at, mlp = self.exponents, layer.prefix, layer.branches[-1]
        self.in_float32.add(OF_EXPERTS)
        e[f"{at}{experts.norm}.in"] = e[f"{at}{experts.router_norm}.in"] = residual
        e[f"{at}{experts.dense_post_norm}.in"] = e[f"{at}{mlp.output}.out"]
        summed = (f"{experts.dense_post_norm}.out", f"{experts.post_norm}.out", f"{mlp.post_norm}.in")
        e |= dict.fromkeys((f"{at}{point}" for point in summed), max(self._need(f"{at}{point}") for point in summed))

    def _scores(self, layer: LayerSpec, least: int) -> None:
        """Queries and keys, and the norms of their heads.

        Args:
            least: exponent of what they are made of; with it, stored weights are no larger than the model's.
        """
        e, at, norms = self.exponents, layer.prefix, dict(layer.head_norms)
        for linear in layer.scoring:
            e[f"{at}{linear}.out"] = max(least, self._need(f"{at}{linear}.out"))
            if norm := norms.get(linear):
                e[f"{at}{norm}.in"] = e[f"{at}{linear}.out"]
                e[f"{at}{norm}.out"] = self._need(f"{at}{norm}.out")
        if layer.value_norm:
            maker = dict(layer.caches)["value"]
            e[f"{at}{maker}.out"] = e[f"{at}{layer.value_norm}.in"] = max(least, self._need(f"{at}{maker}.out"))
