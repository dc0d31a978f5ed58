"""A layer's experts: of many small MLPs each token's chosen few, in a Loop over those that some token chose.

MoE and QMoE of ONNX Runtime have no GeGLU on a CPU, and pack all experts into memory of their own when a session is
opened. Here every turn of the loop gathers one expert's matrices from the file, which a session maps, and multiplies
the rows of the tokens that chose it: of one token k experts are read, of a prompt each expert that is reached, once.

Codes lie [experts, in, out], pairs of 4 bits along the outputs, and are the right operand of integer products, which
need no packing: MatMulNBits on what was gathered takes ten times as long. Activations are codes of 14 bits, or of 8
where calibration found them fit for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.backends.onnxruntime.linears import Tokens, rounded_tokens, summed_halves
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.parts import DecoderParts
from gemma_deploy.backends.onnxruntime.weights import Weights
from gemma_deploy.names import MICROSOFT

FOUR_BITS, MIDDLE = 4, 8  # of a code, whose zero is the middle


class ExpertMatrices:
    """One matrix of every expert of a layer.

    Args:
        weights: of the graph; module: path, `model.layers.N.experts.down_proj`; outputs, inputs: of one matrix.
        in_14_bits: activations are codes of 14 bits, not 8.
    """

    def __init__(self, weights: Weights, module: str, *, outputs: int, inputs: int, in_14_bits: bool) -> None:
        self.weights, self.module, self.outputs, self.inputs = weights, module, outputs, inputs
        self.in_14_bits = in_14_bits
        self.bits = {"int8": 8, "uint4": 4}.get(weights.dtype(module), 0)
        scales = weights.shape([f"{module}.scale"]) if self.bits else ()
        self.groups = scales[1] if len(scales) == 3 else 0  # of input channels with scales of their own; 0: whole rows

    def product(self, nodes: Nodes, x: ir.Value | Tokens, expert: ir.Value) -> ir.Value:
        """[1, n, in] of one expert -> [1, n, out].

        Args:
            x: floats, or codes where the matrices are codes; expert: its number, a scalar.
        """
        if isinstance(x, Tokens):
            return self._integer_product(nodes, x, expert)
        matrix = self._of(nodes, self.weights.view([self.module], self.module), expert, "weight")
        return nodes.one("FusedMatMul", [x, matrix], f"{self.module}.out", domain=MICROSOFT, transB=1)

    def readable(self, nodes: Nodes, x: ir.Value) -> ir.Value | Tokens:
        """Floats [1, n, in] as a product takes them: rounded where the matrices are codes."""
        return rounded_tokens(nodes, x, self.module, in_14_bits=self.in_14_bits) if self.bits else x

    def _integer_product(self, nodes: Nodes, x: Tokens, expert: ir.Value) -> ir.Value:
        name, count, groups = self.module, self.weights.shape([self.module])[0], self.groups
        packed = self.bits == FOUR_BITS
        shape = [count, *([groups, self.inputs // groups] if groups else [self.inputs]), self.outputs // (1 + packed)]
        stored = ir.DataType.UINT8 if packed else ir.DataType.INT8
        codes = self._of(nodes, self.weights.view([name], name, shape, dtype=stored), expert, "codes")
        lies = [count, *([groups, 1] if groups else []), self.outputs]
        scales = self._of(nodes, self.weights.view([f"{name}.scale"], f"{name}.scale", lies), expert, "scale")
        rows = x.codes
        if groups:  # [1, n, 2, in], or without halves [1, n, in] -> [groups, rows, in / groups]
            apart = nodes.one("Reshape", [rows, nodes.numbers(-1, groups, self.inputs // groups)], f"{name}.groups")
            rows = nodes.one("Transpose", [apart], f"{name}.group_rows", perm=[1, 0, 2])
        if packed:
            sums = self._packed_sums(nodes, rows, codes, scales=scales, x=x)
        else:
            sums = self._sums(nodes, rows, codes, scales=scales, x=x)
        if groups or packed:
            halves = [2] if x.in_14_bits else []
            sums = nodes.one("Reshape", [sums, nodes.numbers(1, -1, *halves, self.outputs)], f"{name}.halves")
        if not x.in_14_bits:
            return nodes.one("Mul", [sums, x.scale], f"{name}.out")
        return summed_halves(nodes, x, sums, name=name, out=f"{name}.out")

    def _of(self, nodes: Nodes, stored: ir.Value, expert: ir.Value, what: str) -> ir.Value:
        """One expert's part of what is stored of all."""
        return nodes.one("Gather", [stored, expert], f"{self.module}.one_{what}", axis=0)

    def _packed_sums(self, nodes: Nodes, rows: ir.Value, codes: ir.Value, *, scales: ir.Value, x: Tokens) -> ir.Value:
        """`_sums` of two codes in a byte, [..., out / 2, 2]: the first is the low half."""
        name = self.module
        low, high = self._halves(nodes, codes)
        most, last, two = nodes.numbers(np.iinfo(np.int64).max), nodes.numbers(-1), nodes.numbers(2)
        made = []
        for first, (which, half) in enumerate((("even", low), ("odd", high))):
            own = nodes.one("Slice", [scales, nodes.numbers(first), most, last, two], f"{name}.{which}_scale")
            sums = self._sums(nodes, rows, half, scales=own, x=x, which=f".{which}")
            made.append(nodes.one("Unsqueeze", [sums, last], f"{name}.{which}.column"))
        return nodes.one("Concat", made, f"{name}.pairs", axis=-1)

    def _halves(self, nodes: Nodes, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Low and high halves of bytes, by sums in float32 that are exact.

        BitwiseAnd and BitShift take several times as long: they run on one processor and a byte at a time.
        high = round(byte / 16 - 7.5 / 16), never halfway between two numbers; low = byte - 16 high.
        """
        one, zero = nodes.scalar(1.0), nodes.constant(np.uint8(0), "uint8.0")
        sixteenth, shift, first = nodes.scalar(1 / 16), nodes.scalar(7.5 / 16), nodes.constant(np.uint8(1), "uint8.1")
        high = nodes.one(
            "QLinearAdd", [codes, sixteenth, zero, zero, shift, first, one, zero], f"{self.module}.high_codes",
            domain=MICROSOFT,
        )  # fmt: skip
        low = nodes.one(
            "QLinearAdd", [codes, one, zero, high, nodes.scalar(-16.0), zero, one, zero], f"{self.module}.low_codes",
            domain=MICROSOFT,
        )  # fmt: skip
        return low, high

    def _sums(
        self, nodes: Nodes, rows: ir.Value, codes: ir.Value, *, scales: ir.Value, x: Tokens, which: str = ""
    ) -> ir.Value:
        """Integer products times scales, groups added up."""
        inputs: list[ir.Value | None] = [rows, codes, nodes.scalar(1 / x.steps), scales, x.zero_point]
        if self.bits == FOUR_BITS:
            inputs.append(nodes.constant(np.uint8(MIDDLE), f"uint8.{MIDDLE}"))
        sums = nodes.one("MatMulIntegerToFloat", inputs, f"{self.module}{which}.product", domain=MICROSOFT)
        if self.groups:
            sums = nodes.one("ReduceSum", [sums, nodes.numbers(0)], f"{self.module}{which}.sums", keepdims=0)
        return sums


@dataclass(frozen=True)
class _Choice:
    """What the router says of each of T tokens.

    Attributes:
        experts: [T, k] int64; shares: [T, k] float32, by which their results are multiplied.
        reached: [U] int64, experts that some token chose, in ascending order.
    """

    experts: ir.Value
    shares: ir.Value
    reached: ir.Value


def expert_modules(layer: LayerSpec) -> tuple[str, ...]:
    """Paths of the experts' matrices of a layer."""
    return () if layer.experts is None else tuple(f"{layer.prefix}{name}" for name in layer.experts.stacks(1))


class ExpertParts(DecoderParts):
    """The nodes of layers with experts."""

    def _beside_experts(self, layer: LayerSpec, *, dense: ir.Value, residual: ir.Value) -> ir.Value:
        """[B,S,H]: what the dense MLP makes and what the experts make, each normed, added up.

        Args:
            dense: [B,S,H] of the MLP; residual: [B,S,H], which router and experts read.
        """
        experts, path, nodes = layer.experts, layer.prefix, self.nodes
        assert experts is not None
        first = self._norm(dense, f"{path}{experts.dense_post_norm}")
        choice = self._choice(layer, residual)
        made = self._sum_of_chosen(layer, self._norm(residual, f"{path}{experts.norm}"), choice)
        if self.dtype != ir.DataType.FLOAT:
            made = nodes.one("Cast", [made], f"{path}{experts.module}.half", to=self.dtype.value)
        shape = nodes.one("Shape", [residual], f"{path}{experts.module}.shape")
        made = nodes.one("Reshape", [made, shape], f"{path}{experts.module}.out")
        second = self._norm(made, f"{path}{experts.post_norm}")
        return nodes.one("Add", [first, second], f"{path}{experts.module}.beside")

    def _choice(self, layer: LayerSpec, residual: ir.Value) -> _Choice:
        """Softmax of router(rms(r) * scale / sqrt(H)): the k largest, made to add up to 1, times their scales."""
        experts, nodes, weights = layer.experts, self.nodes, self.weights
        assert experts is not None
        module, scale = f"{layer.prefix}{experts.router}", f"{layer.prefix}{experts.expert_scale}"
        gain = weights.scaled(f"{layer.prefix}{experts.router_scale}", layer.hidden_size**-0.5)
        x = nodes.one(
            "RMSNormalization", [residual, gain], f"{module}.in",
            axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip
        flat = nodes.one("Reshape", [x, nodes.numbers(-1, layer.hidden_size)], f"{module}.tokens")
        if self.dtype != ir.DataType.FLOAT:
            flat = nodes.one("Cast", [flat], f"{module}.wide", to=ir.DataType.FLOAT.value)
        matrix = weights.view([f"{module}.weight"], f"{module}.weight")  # float32, whatever the others are
        likely = nodes.one(
            "Softmax", [nodes.one("Gemm", [flat, matrix], f"{module}.out", transB=1)], f"{module}.softmax"
        )
        k = nodes.numbers(experts.chosen)
        most, chosen = nodes.many("TopK", [likely, k], [f"{module}.most", f"{module}.chosen_experts"], axis=-1)
        total = nodes.one("ReduceSum", [most, nodes.numbers(-1)], f"{module}.total", keepdims=1)
        own = nodes.one("Gather", [weights.view([scale], scale), chosen], f"{module}.own_scale", axis=0)
        shares = nodes.one("Mul", [nodes.one("Div", [most, total], f"{module}.even"), own], f"{module}.shares")
        return _Choice(chosen, shares, nodes.one("Unique", [chosen], f"{module}.reached", sorted=1))

    def _sum_of_chosen(self, layer: LayerSpec, x: ir.Value, choice: _Choice) -> ir.Value:
        """[B,S,H] -> [T,H] float32: what each token's experts make, times their shares, added up."""
        experts, nodes, hidden = layer.experts, self.nodes, layer.hidden_size
        assert experts is not None
        name = f"{layer.prefix}{experts.module}"
        gate_up, down = (
            ExpertMatrices(
                self.weights, f"{layer.prefix}{tensor}", outputs=outputs, inputs=inputs,
                in_14_bits=f"{layer.prefix}{tensor}" in self.kernels.in_14_bits,
            )
            for tensor, (_, outputs, inputs) in experts.stacks(hidden).items()
        )  # fmt: skip
        flat = nodes.one("Reshape", [x, nodes.numbers(-1, hidden)], f"{name}.tokens")
        nothing = nodes.one("ConstantOfShape", [nodes.one("Shape", [flat], f"{name}.size")], f"{name}.nothing")
        rows = gate_up.readable(nodes, nodes.one("Unsqueeze", [flat, nodes.numbers(0)], f"{name}.rows"))
        times = nodes.one("Size", [choice.reached], f"{name}.times")
        turn, more, before = _loop_values(name, hidden)
        inner = Nodes(nodes.initializers)
        expert = inner.one("Gather", [choice.reached, turn], f"{name}.expert", axis=0)
        token, share = _tokens_of(inner, name, choice, expert)
        product = self._activated(inner, name, gate_up.product(inner, _rows(inner, rows, token, name), expert))
        made = down.product(inner, down.readable(inner, product), expert)
        made = inner.one("Squeeze", [made, inner.numbers(0)], f"{name}.one")
        if self.dtype != ir.DataType.FLOAT:
            made = inner.one("Cast", [made], f"{name}.wide", to=ir.DataType.FLOAT.value)
        part = inner.one("Mul", [made, share], f"{name}.part")
        places = inner.one("Unsqueeze", [token, inner.numbers(1)], f"{name}.places")
        after = inner.one("ScatterND", [before, places, part], f"{name}.after", reduction="add")
        go_on = inner.one("Identity", [more], f"{name}.go_on")
        for given, made in ((before, after), (more, go_on)):
            made.type, made.shape = given.type, given.shape
        body = ir.Graph([turn, more, before], [go_on, after], nodes=inner.nodes, name=f"{name}.body")
        yes = nodes.constant(np.bool_(True), "bool.true")
        return nodes.one("Loop", [times, yes, nothing], f"{name}.sum", body=body)

    def _activated(self, nodes: Nodes, name: str, gate_up: ir.Value) -> ir.Value:
        """[1, n, 2 I], gate first -> gelu(gate) * up, [1, n, I]."""
        gate, up = nodes.many("Split", [gate_up], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
        active = nodes.one("Gelu", [gate], f"{name}.act_fn.out", approximate=self._approximate)
        return nodes.one("Mul", [active, up], f"{name}.product")


def _loop_values(name: str, hidden: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What a turn of the loop is given: its number, whether it goes on, the sums [T,H] so far."""
    kinds = (("turn", ir.DataType.INT64, ()), ("more", ir.DataType.BOOL, ()),
             ("before", ir.DataType.FLOAT, ("tokens", hidden)))  # fmt: skip
    turn, more, before = (
        ir.Value(name=f"{name}.{what}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        for what, dtype, shape in kinds
    )
    return turn, more, before


def _tokens_of(nodes: Nodes, name: str, choice: _Choice, expert: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Tokens [n] that chose an expert, and its share of each, [n, 1]."""
    chose = nodes.one("Equal", [choice.experts, expert], f"{name}.chose")
    places = nodes.one("Transpose", [nodes.one("NonZero", [chose], f"{name}.where")], f"{name}.pairs", perm=[1, 0])
    share = nodes.one("GatherND", [choice.shares, places], f"{name}.share")
    token = nodes.one("Gather", [places, nodes.constant(np.int64(0), "int64.zero")], f"{name}.token", axis=1)
    return token, nodes.one("Unsqueeze", [share, nodes.numbers(1)], f"{name}.share_column")


def _rows(nodes: Nodes, x: ir.Value | Tokens, token: ir.Value, name: str) -> ir.Value | Tokens:
    """Those of some tokens, [1, n, ...]."""
    if not isinstance(x, Tokens):
        return nodes.one("Gather", [x, token], f"{name}.own_rows", axis=1)
    codes = nodes.one("Gather", [x.codes, token], f"{name}.own_codes", axis=1)
    scale = nodes.one("Gather", [x.scale, token], f"{name}.own_scale", axis=1)
    return replace(x, codes=codes, scale=scale)
