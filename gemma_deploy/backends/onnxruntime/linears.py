"""The kernels of linears.

integer: activations as 8-bit codes with one scale per token, times the codes of the weights, which lie [in, out] in the
file; those of 14 bits are codes of 14 bits in two halves, rows of one product, x = s (high + low / 126) / 63. Each half
is so small that u8 times s8 does not saturate where a processor without VNNI adds pairs in 16 bits (2 * 127 * 127).
block: MatMulNBits, which rounds activations to 8 bits in blocks of input channels (accuracy level 4; the others are a
hundred times slower on a CPU). dense: matrices that are no codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import input_groups
from gemma_deploy.backends.onnxruntime.nodes import Nodes
from gemma_deploy.backends.onnxruntime.weights import Weights, largest_block
from gemma_deploy.dtypes import BY_NAME
from gemma_deploy.names import MICROSOFT

INT8_ACTIVATIONS = 4  # accuracy_level
STEPS, HALF_STEPS = 127, 63  # largest code of an activation, and of either half of one of 14 bits
SMALLEST = 1e-30  # magnitude of a token of zeros, so that nothing is divided by zero


def product_of(module: str) -> str:
    """What reads the same input as a linear, it among them: its own path, or that of several."""
    for group in (group for group in input_groups() if group.fused):
        for reader in group.readers:
            if module.endswith(f".{reader}"):
                return module.removesuffix(reader) + group.fused
    return module


class Matrix:
    """The matrix of one linear, or of several that read the same input, or some rows of one.

    Args:
        weights: of the graph; modules: paths, in the order in which they lie in the file.
        name: of the initializers; block: input channels that share a scale of the activations, at most.
        part: rows [start, stop) of the only module.
    """

    def __init__(
        self, weights: Weights, modules: Sequence[str], name: str, *, block: int, part: tuple[int, int] | None = None
    ) -> None:
        self.weights, self.name, self.part = weights, name, part
        self.codes = [f"{module}.weight" for module in modules]
        self.scales = [f"{module}.scale" for module in modules]
        dtype = weights.dtype(self.codes[0])
        self.integer = dtype == "int8"  # signed codes are those of integer products
        self.rows, self.columns = weights.shape(self.codes, part)[:: -1 if self.integer else 1]
        self.bits = 8 if self.integer else BY_NAME[dtype].bits if dtype in ("uint8", "uint4") else 0
        self.dense = not self.bits
        self.per_row = not self.dense and len(weights.shape(self.scales)) == 1
        if self.per_row:
            self.block = largest_block(self.columns, block)
        elif not self.dense:
            self.block = self.columns // weights.shape(self.scales)[1]

    def product(self, nodes: Nodes, x: ir.Value, out: str) -> ir.Value:
        """x: [..., in] -> [..., out], by the block kernel; of floats, by a plain product."""
        if self.dense:
            matrix = self.weights.view(self.codes, f"{self.name}.weight", part=self.part)
            return nodes.one("FusedMatMul", [x, matrix], out, domain=MICROSOFT, transB=1)
        blocks = self.columns // self.block
        shape = (self.rows, blocks, self.block * self.bits // 8)
        codes = self.weights.view(self.codes, f"{self.name}.blocks", shape, dtype=ir.DataType.UINT8, part=self.part)
        scales = self.weights.block_scales(self.scales, self.name, blocks, part=self.part)
        return self.block_product(nodes, x, codes, scales=scales, bits=self.bits, out=out)

    def block_product(
        self, nodes: Nodes, x: ir.Value, codes: ir.Value, *, scales: ir.Value, bits: int, out: str
    ) -> ir.Value:
        """[..., in] -> [..., out] of codes uint8 [out, blocks, bytes] and scales [out, blocks]."""
        return nodes.one(
            "MatMulNBits",
            [x, codes, scales],
            out,
            domain=MICROSOFT,
            K=self.columns,
            N=self.rows,
            bits=bits,
            block_size=self.block,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def chosen_rows(self, nodes: Nodes, ids: ir.Value, out: str) -> ir.Value:
        """ids: [...] -> rows [..., in] of a table of codes, in float32."""
        shape = (self.rows, self.columns * self.bits // 8)
        codes = self.weights.view(self.codes, self.codes[0], shape, dtype=ir.DataType.UINT8)
        scales = self.weights.block_scales(self.scales, self.name, self.columns // self.block)
        return nodes.one(
            "GatherBlockQuantized", [codes, ids, scales], out, domain=MICROSOFT,
            bits=self.bits, block_size=self.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def integer_product(self, nodes: Nodes, tokens: Tokens, out: str) -> ir.Value:
        """The product of rounded activations with transposed codes, float32 [B, S, out]."""
        codes, scales = self.weights.view(self.codes, self.codes[0]), self.weights.view(self.scales, self.scales[0])
        inputs = [tokens.codes, codes, nodes.scalar(1 / tokens.steps), scales, tokens.zero_point]
        total = nodes.one("MatMulIntegerToFloat", inputs, f"{self.name}.product", domain=MICROSOFT)
        if not tokens.in_14_bits:
            return nodes.one("Mul", [total, tokens.scale], out)
        return summed_halves(nodes, tokens, total, name=self.name, out=out)


@dataclass(frozen=True)
class Tokens:
    """Activations as codes: x = scale * (codes - zero_point) / steps, the sum of both halves where they have 14 bits.

    Attributes:
        codes: uint8 [B, S, channels], or, of 14 bits, [B, S, 2, channels], high and low half; zero_point: uint8 scalar.
        scale: [B, S, 1] largest magnitude of each token, or, of 14 bits, [B, S, 1, 2].
        steps: codes on either side of the zero point.
    """

    codes: ir.Value
    zero_point: ir.Value
    scale: ir.Value
    steps: int
    in_14_bits: bool


def summed_halves(nodes: Nodes, tokens: Tokens, total: ir.Value, *, name: str, out: str) -> ir.Value:
    """What both halves [B, S, 2, out] of 14-bit codes make, [B, S, out]."""
    both = nodes.one("MatMul", [tokens.scale, total], f"{name}.both")
    return nodes.one("Squeeze", [both, nodes.numbers(2)], out)


def rounded_tokens(nodes: Nodes, x: ir.Value, name: str, *, in_14_bits: bool) -> Tokens:
    """Round half to even, with a scale for each token.

    Args:
        x: [B, S, channels] float32; name: of what reads it; in_14_bits: to 14 bits.
    """
    steps = HALF_STEPS if in_14_bits else STEPS
    absmax = nodes.one("ReduceMax", [nodes.one("Abs", [x], f"{name}.magnitude"), nodes.numbers(-1)], f"{name}.absmax")
    scale = nodes.one("Max", [absmax, nodes.scalar(SMALLEST)], f"{name}.token_scale")
    even = nodes.one("Div", [x, scale], f"{name}.even")
    step, zero = nodes.scalar(1 / steps), nodes.constant(np.uint8(steps + 1), f"uint8.{steps + 1}")
    if not in_14_bits:
        return Tokens(nodes.one("QuantizeLinear", [even, step, zero], f"{name}.high"), zero, scale, steps, in_14_bits)
    even = nodes.one("Unsqueeze", [even, nodes.numbers(2)], f"{name}.row")
    high = nodes.one("QuantizeLinear", [even, step, zero], f"{name}.high")
    read = nodes.one("DequantizeLinear", [high, step, zero], f"{name}.read")
    rest = nodes.one("Sub", [even, read], f"{name}.rest")
    low = nodes.one("QuantizeLinear", [rest, nodes.scalar(1 / (2 * steps * steps)), zero], f"{name}.low")
    codes = nodes.one("Concat", [high, low], f"{name}.codes", axis=2)
    halves = nodes.constant(np.array([1, 1 / (2 * steps)], np.float32), "float32.halves")
    scale = nodes.one("Unsqueeze", [scale, nodes.numbers(2)], f"{name}.scale_row")
    return Tokens(codes, zero, nodes.one("Mul", [scale, halves], f"{name}.half_scales"), steps, in_14_bits)
