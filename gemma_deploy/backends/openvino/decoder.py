"""The whole decoder as OpenVINO's runtimes want it: caches are its own state, and every token has its logits.

input_ids, attention_mask, position_ids [B,*] int64, beam_idx [B] int32 -> logits [B,S,V] float32. The mask covers what
is in the cache as well; rows may be padded on the left. `beam_idx` says which row of the cache each row goes on from.

What OpenVINO has a kernel for is written as it looks for it: norms, rotary embeddings, attention with a cache, codes
that stay codes. A layer with a window masks in the form that openvino-genai's paged attention reads the window from,
which drops every other mask (`gpt_oss_sliding_window_pattern` of its state_management_pattern.cpp). Scores that are
capped are computed step by step, as no operator does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.architectures import EXACT_GELU, LayerSpec
from gemma_deploy.backends.openvino.ir import Constants, Network, Value
from gemma_deploy.names import COLUMN_SCALE, EMBEDDING, HEAD, NORM
from gemma_deploy.params.constants import inverse_frequencies
from gemma_deploy.params.layout import Place
from gemma_deploy.params.naming import CONSTANTS

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import ModelConfig

PARTS = ("key", "value")
NORMED = "hidden_states"  # what the LM head reads
BLOCKED = float(np.finfo(np.float32).min)  # added to scores of what is not seen; not infinite: of padding all are
SEQUENCE = 1 << 62  # an end behind every end


def build_decoder(
    config: ModelConfig, places: Iterable[Place], *, embed_scale: float, options: Mapping[str, object]
) -> tuple[str, Constants]:
    """The XML of a model, and the constants that it finds in the parameter file.

    Args:
        places: tensors of the parameter file; without `CONSTANTS` among them what is said of these is wrong.
        embed_scale: by which rows of the table are multiplied, where the file has no factor for each column.
        options: of the runtime, where whoever compiles the model says nothing else.
    """
    made = Decoder(config, places, embed_scale=embed_scale)
    made.build()
    return made.net.text(options), made.net.constants


class Decoder:
    """The model in the making."""

    def __init__(self, config: ModelConfig, places: Iterable[Place], *, embed_scale: float) -> None:
        self.config, self.embed_scale = config, embed_scale
        self.places = {place.name: place for place in places}
        constants = self.places.get(CONSTANTS)
        self.net = Network(config.architecture.name, at=constants.offset if constants else 0)
        self.rotary: dict[str, tuple[Value, Value]] = {}
        self.masks: dict[int | None, Value] = {}

    def build(self) -> None:
        """Embedding, layers, head."""
        net, config = self.net, self.config
        self.ids, self.mask, self.positions = (
            net.parameter(name, "int64", 2) for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.rows = net.parameter("beam_idx", "int32", 1)
        self._lengths()
        hidden, caches = self._embedded(), list[tuple[str, Value]]()
        for layer in config.layers:
            for branch in layer.branches:
                normed = self._norm(hidden, f"{layer.prefix}{branch.norm}")
                if branch.attends:
                    made, *present = self._attention(layer, normed)
                    caches += zip((self._variable(layer, part) for part in PARTS), present, strict=True)
                else:
                    made = self._mlp(layer, normed)
                made = self._linear(made, f"{layer.prefix}{branch.output}")
                if branch.post_norm:
                    made = self._norm(made, f"{layer.prefix}{branch.post_norm}")
                hidden = net.node("Add", [hidden, made])
        logits = self._logits(self._norm(hidden, NORM, tensor=NORMED))
        for name, value in caches:
            net.node("Assign", [value], data={"variable_id": name})
        net.node("Result", [logits], "logits")

    def _lengths(self) -> None:
        """Rows, new tokens and all positions, each [1] int64."""
        net = self.net
        first, zero = net.constant(0), net.constant([0])
        shape, whole = (net.node("ShapeOf", [one], data={"output_type": "i64"}) for one in (self.ids, self.mask))
        self.batch = net.node("Gather", [shape, zero, first])
        self.new, self.total = (net.node("Gather", [one, net.constant([1]), first]) for one in (shape, whole))

    def _embedded(self) -> Value:
        """[B,S,H]: rows of codes are looked up as codes."""
        net, place = self.net, self.places[f"{EMBEDDING}.weight"]
        indices, axis = net.converted(self.ids, "int32"), net.constant(0)
        codes = net.stored(place)
        found = net.node("Gather", [codes, indices, axis])
        if place.dtype != "float32":
            found = net.converted(found)
        scale = self.places.get(f"{EMBEDDING}.scale")
        if scale is not None:
            groups = scale.shape[1] if len(scale.shape) > 1 else 1
            scales = net.stored(scale, (scale.shape[0], groups))
            factor = net.node("Gather", [scales, indices, axis])
            if scale.dtype != "float32":
                factor = net.converted(factor)
            if groups > 1:
                found = self._reshaped(found, (0, 0, groups, -1))
                factor = net.node("Unsqueeze", [factor, net.constant([-1])])
            found = net.node("Multiply", [found, factor])
            if groups > 1:
                found = self._reshaped(found, (0, 0, -1))
        columns = self.places.get(COLUMN_SCALE)
        factor = net.constant(self.embed_scale, "float32") if columns is None else net.stored(columns)
        return net.node("Multiply", [found, factor], EMBEDDING)

    def _norm(self, value: Value, module: str, *, tensor: str = "") -> Value:
        """X / sqrt(mean(x^2) + eps) times the gain."""
        net, place = self.net, self.places[f"{module}.weight"]
        square = net.node("Power", [value, net.constant(2.0, "float32")])
        mean = net.node("ReduceMean", [square, net.constant([-1])], data={"keep_dims": True})
        raised = net.node("Add", [mean, net.constant(self.config.rms_norm_eps, "float32")])
        root = net.node("Divide", [net.constant(1.0, "float32"), net.node("Sqrt", [raised])])
        gain = net.stored(place)
        if self.config.architecture.norm_offset:
            gain = net.node("Add", [gain, net.constant(self.config.architecture.norm_offset, "float32")])
        normed = net.node("Multiply", [value, root])
        return net.node("Multiply", [normed, gain], module, tensor=tensor)

    def _linear(self, value: Value, module: str, *, weight: str = "", tensor: str = "") -> Value:
        """The product with the rows of a matrix."""
        matrix = self._matrix(weight or f"{module}.weight")
        data = {"transpose_a": False, "transpose_b": True}
        return self.net.node("MatMul", [value, matrix], module, tensor=tensor, data=data)

    def _matrix(self, name: str) -> Value:
        """A weight as float32 [rows, columns]; OpenVINO keeps what is stored and computes this as it multiplies."""
        net, place, scale = self.net, self.places[name], self.places.get(f"{name.removesuffix('.weight')}.scale")
        if scale is None:
            stored = net.stored(place)
            return stored if place.dtype == "float32" else net.converted(stored, weight=True)
        rows, columns = place.shape
        groups = scale.shape[1] if len(scale.shape) > 1 else 1
        lies = (rows, groups, columns // groups) if groups > 1 else (rows, columns)
        codes = net.converted(net.stored(place, lies))
        factor = net.stored(scale, (*lies[:-1], 1))
        if scale.dtype != "float32":
            factor = net.converted(factor)
        scaled = net.node("Multiply", [codes, factor])
        return self._reshaped(scaled, (rows, columns)) if groups > 1 else scaled

    def _attention(self, layer: LayerSpec, normed: Value) -> tuple[Value, Value, Value]:
        """[B,S,heads * D], and keys and values [B,Hk,T,D] with those that were there."""
        net, path, norms = self.net, layer.prefix, dict(layer.head_norms)
        attention = next(branch for branch in layer.branches if branch.attends)
        query, makers = attention.entry.observed, dict(layer.caches)
        queries = self._heads(layer, normed, query, count=layer.heads)
        key = self._heads(layer, normed, makers["key"], count=layer.kv_heads)
        value = self._heads(layer, normed, makers["value"], count=layer.kv_heads)
        if query in norms:
            queries = self._norm(queries, f"{path}{norms[query]}")
        if makers["key"] in norms:
            key = self._norm(key, f"{path}{norms[makers['key']]}")
        queries, key = self._rotated(layer, queries), self._rotated(layer, key)
        keys, values = (
            net.node("Concat", [self._past(layer, part), new], data={"axis": -2})
            for part, new in zip(PARTS, (key, value), strict=True)
        )
        seen = [self._repeated(layer, one) for one in (keys, values)]
        mask, scale = self._seen(layer.window), net.constant(layer.attention_scale, "float32")
        if self.config.attn_logit_softcapping is None:
            attended = net.node(
                "ScaledDotProductAttention", [queries, *seen, mask, scale], f"{path}attention", data={"causal": False}
            )
        else:
            scores = net.node("MatMul", [queries, seen[0]], data={"transpose_a": False, "transpose_b": True})
            scores = self._capped(net.node("Multiply", [scores, scale]), self.config.attn_logit_softcapping)
            shares = net.node("SoftMax", [net.node("Add", [scores, mask])], data={"axis": -1})
            attended = net.node("MatMul", [shares, seen[1]], data={"transpose_a": False, "transpose_b": False})
        attended = self._transposed(attended)
        return self._reshaped(attended, (0, 0, layer.heads * layer.head_dim)), keys, values

    def _heads(self, layer: LayerSpec, value: Value, linear: str, *, count: int) -> Value:
        """[B,heads,S,D]."""
        made = self._linear(value, f"{layer.prefix}{linear}")
        return self._transposed(self._reshaped(made, (0, 0, count, layer.head_dim)))

    def _past(self, layer: LayerSpec, part: str) -> Value:
        """The state of a layer before the step, [B,Hk,*,D]; nothing at first."""
        net, sizes = self.net, (layer.kv_heads, 0, layer.head_dim)
        shape = net.node("Concat", [self.batch, *(net.constant([one]) for one in sizes)], data={"axis": 0})
        empty = net.node("Broadcast", [net.constant(0.0, "float32"), shape], data={"mode": "numpy"})
        data = {
            "variable_id": self._variable(layer, part),
            "variable_type": "f32",
            "variable_shape": f"?,{layer.kv_heads},?,{layer.head_dim}",
        }
        state = net.node("ReadValue", [empty], data=data)
        return net.node("Gather", [state, self.rows, net.constant(0)])

    def _variable(self, layer: LayerSpec, part: str) -> str:
        """As optimum-intel calls a state."""
        return f"past_key_values.{layer.index}.{part}present.{layer.index}.{part}"

    def _repeated(self, layer: LayerSpec, value: Value) -> Value:
        """[B,Hk,T,D] -> [B,heads,T,D]: each as often as query heads read it."""
        if layer.heads == layer.kv_heads:
            return value
        net, times = self.net, layer.heads // layer.kv_heads
        value = net.node("Unsqueeze", [value, net.constant(2)])
        value = net.node("Broadcast", [value, net.constant([1, 1, times, 1, 1])], data={"mode": "bidirectional"})
        return self._reshaped(value, (0, layer.heads, -1, layer.head_dim))

    def _rotated(self, layer: LayerSpec, value: Value) -> Value:
        """X cos + (-second half, first half) sin."""
        net, half = self.net, layer.head_dim // 2
        cosine, sine = self._angles(layer)
        first, second = self._sliced(value, 0, half), self._sliced(value, half, SEQUENCE)
        second = net.node("Multiply", [second, net.constant(-1.0, "float32")])
        turned = net.node("Concat", [second, first], data={"axis": -1})
        return net.node("Add", [net.node("Multiply", [value, cosine]), net.node("Multiply", [turned, sine])])

    def _angles(self, layer: LayerSpec) -> tuple[Value, Value]:
        """Cosines and sines [B,1,S,D] of a kind of layers."""
        if layer.kind not in self.rotary:
            net, one = self.net, self.net.constant(1)
            frequencies = inverse_frequencies(layer.rope, layer.head_dim).numpy()[None, :, None]
            positions = net.converted(net.node("Unsqueeze", [self.positions, one]))
            data = {"transpose_a": False, "transpose_b": False}
            angles = net.node("MatMul", [net.constant(frequencies, "float32"), positions], data=data)
            angles = net.node("Transpose", [angles, net.constant([0, 2, 1])])
            both = net.node("Concat", [angles, angles], data={"axis": -1})
            made = (net.node("Unsqueeze", [net.node(kind, [both]), one]) for kind in ("Cos", "Sin"))
            self.rotary[layer.kind] = next(made), next(made)
        return self.rotary[layer.kind]

    def _seen(self, window: int | None) -> Value:
        """What is added to scores, [B,1,S,T]: 0 of what a query sees."""
        if window not in self.masks:
            net = self.net
            flat = net.constant([], "int64")
            total, new = (
                net.node("Reshape", [one, flat], data={"special_zero": False}) for one in (self.total, self.new)
            )
            zero, one, yes = net.constant(0), net.constant(1), net.constant(True, "bool")
            range_type = {"output_type": "i64"}
            keys = net.node("Range", [zero, total, one], data=range_type)
            queries = net.node("Range", [net.node("Subtract", [total, new]), total, one], data=range_type)
            queries = net.node("Unsqueeze", [queries, net.constant([0, 1, 3])])
            keys = net.node("Unsqueeze", [keys, net.constant([0, 1, 2])])
            seen = net.node("LessEqual", [keys, queries])
            if window is not None:
                inside = net.node("Greater", [keys, net.node("Add", [queries, net.constant(-window)])])
                seen = net.node("BitwiseAnd", [net.node("BitwiseAnd", [yes, inside]), seen])
            seen = net.node("BitwiseAnd", [yes, seen])
            real = net.node("Unsqueeze", [net.converted(self.mask, "bool"), net.constant([1, 2])])
            seen = net.node("BitwiseAnd", [seen, real])
            shape = net.node("Concat", [self.batch, net.constant([1]), self.new, self.total], data={"axis": 0})
            seen = net.node("Broadcast", [seen, shape], data={"mode": "bidirectional"})
            parts = net.constant(0.0, "float32"), net.constant(BLOCKED, "float32")
            added = net.node("Select", [seen, *parts])
            self.masks[window] = self._sliced(added, 0, self.total)
        return self.masks[window]

    def _mlp(self, layer: LayerSpec, normed: Value) -> Value:
        """act(gate) * up."""
        mlp = next(branch for branch in layer.branches if not branch.attends)
        gate, up = (self._linear(normed, f"{layer.prefix}{name}") for name in mlp.entry.readers)
        mode = "ERF" if self.config.hidden_activation == EXACT_GELU else "TANH"
        return self.net.node("Multiply", [self.net.node("Gelu", [gate], data={"approximation_mode": mode}), up])

    def _logits(self, normed: Value) -> Value:
        cap = self.config.final_logit_softcapping
        name = "" if cap is not None else "logits"
        logits = self._linear(normed, HEAD, weight=self.config.head_weight, tensor=name)
        return logits if cap is None else self._capped(logits, cap, tensor="logits")

    def _capped(self, value: Value, cap: float, *, tensor: str = "") -> Value:
        net, most = self.net, self.net.constant(cap, "float32")
        bent = net.node("Tanh", [net.node("Divide", [value, most])])
        return net.node("Multiply", [bent, most], tensor=tensor)

    def _reshaped(self, value: Value, shape: tuple[int, ...]) -> Value:
        return self.net.node("Reshape", [value, self.net.constant(shape)], data={"special_zero": True})

    def _transposed(self, value: Value) -> Value:
        """Heads and positions in the place of each other."""
        return self.net.node("Transpose", [value, self.net.constant([0, 2, 1, 3])])

    def _sliced(self, value: Value, start: int, stop: int | Value) -> Value:
        """Of the last dimension."""
        net = self.net
        end = stop if isinstance(stop, Value) else net.constant([stop])
        return net.node("Slice", [value, net.constant([start]), end, net.constant([1]), net.constant([-1])])
