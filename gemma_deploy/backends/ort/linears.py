"""The kernels of linears.

block: MatMulNBits, which rounds activations to 8 bits in blocks of input channels (accuracy level 4; the others are a
hundred times slower on a CPU). integer: activations as 8-bit codes with one scale per token, then one integer product;
`wide` ones are codes of 16 bits, the high and the low half multiplied apart, x = s (high + low / 254). dense: matrices
that are no codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.ort.nodes import MICROSOFT, Nodes
from gemma_deploy.backends.ort.weights import Weights, largest_block

INT8_ACTIVATIONS = 4  # accuracy_level
LARGEST_CODE, LOW_STEPS = 127, 254  # of a code; the low half's steps in one of the high half's
SMALLEST = 1e-30  # magnitude of a token of zeros, so that nothing is divided by zero
BITS = {"uint8": 8, "uint4": 4}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def product_of(module: str) -> str:
    """What reads the same input as a linear, it among them: its own path, or that of several."""
    path, _, name = module.rpartition(".")
    return f"{path}." + next((fused for fused, parts in FUSED.items() if name in parts), name)


class Matrix:
    """The matrix of one linear, or of several that read the same input, or some rows of one.

    Args:
        weights: of the graph; modules: paths, in the order in which they lie in the file.
        name: of the initializers; block: input channels that share a scale of the activations, at most.
        part: rows [start, stop) of the only module.
    """

    def __init__(
        self, weights: Weights, modules: Sequence[str], name: str, block: int, part: tuple[int, int] | None = None
    ) -> None:
        self.weights, self.name, self.part = weights, name, part
        self.codes = [f"{module}.weight" for module in modules]
        self.scales = [f"{module}.scale" for module in modules]
        self.rows, self.columns = weights.shape(self.codes, part)
        self.dense = weights.dtype(self.codes[0]) not in BITS
        self.bits = BITS.get(weights.dtype(self.codes[0]), 0)
        self.per_row = not self.dense and len(weights.shape(self.scales)) == 1
        if self.per_row:
            self.block = largest_block(self.columns, block)
        elif not self.dense:
            self.block = self.columns // weights.shape(self.scales)[1]

    @property
    def integer(self) -> bool:
        """Whether integer products can read it: codes of 8 bits with one scale per row."""
        return self.per_row and self.bits == 8

    def product(self, nodes: Nodes, x: ir.Value, out: str) -> ir.Value:
        """x: [..., in] -> [..., out], by the block kernel; of floats, by a plain product."""
        if self.dense:
            matrix = self.weights.view(self.codes, f"{self.name}.weight", part=self.part)
            return nodes.one("FusedMatMul", [x, matrix], out, domain=MICROSOFT, transB=1)
        blocks = self.columns // self.block
        shape = (self.rows, blocks, self.block * self.bits // 8)
        codes = self.weights.view(self.codes, f"{self.name}.blocks", shape, ir.DataType.UINT8, part=self.part)
        scales = self.weights.block_scales(self.scales, self.name, blocks, self.part)
        return nodes.one(
            "MatMulNBits",
            [x, codes, scales],
            out,
            domain=MICROSOFT,
            K=self.columns,
            N=self.rows,
            bits=self.bits,
            block_size=self.block,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def integer_product(self, nodes: Nodes, tokens: Tokens, out: str, scaled: bool = True) -> ir.Value:
        """[..., out].

        Args:
            scaled: multiply by the tokens' scales; else the result is smaller by them.
        """
        matrix = self.weights.transposed(self.codes, self.name)
        scales, zero = self.weights.view(self.scales, f"{self.name}.scale"), nodes.constant(np.uint8(128), "uint8.128")

        def product(codes: ir.Value, step: float, made: str) -> ir.Value:
            inputs = [codes, matrix, nodes.scalar(step), scales, zero]
            return nodes.one("MatMulIntegerToFloat", inputs, made, domain=MICROSOFT)

        total = product(tokens.high, 1 / LARGEST_CODE, f"{self.name}.product")
        if tokens.low is not None:
            rest = product(tokens.low, 1 / (LARGEST_CODE * LOW_STEPS), f"{self.name}.low_product")
            total = nodes.one("Add", [total, rest], f"{self.name}.sum")
        return nodes.one("Mul", [total, tokens.scale], out) if scaled else total


@dataclass(frozen=True)
class Tokens:
    """Activations as codes with zero point 128: x = scale * (high / 127 + low / (127 * 254)).

    Attributes:
        scale: [..., 1] largest magnitude of each token.
    """

    high: ir.Value
    low: ir.Value | None
    scale: ir.Value


def rounded_tokens(nodes: Nodes, x: ir.Value, name: str, wide: bool) -> Tokens:
    """Round half to even, with a scale for each token.

    Args:
        x: [..., channels] float32; wide: to 16 bits.
    """
    absmax = nodes.one("ReduceMax", [nodes.one("Abs", [x], f"{name}.magnitude"), nodes.numbers(-1)], f"{name}.absmax")
    scale = nodes.one("Max", [absmax, nodes.scalar(SMALLEST)], f"{name}.token_scale")
    even = nodes.one("Div", [x, scale], f"{name}.even")
    step, zero = nodes.scalar(1 / LARGEST_CODE), nodes.constant(np.uint8(128), "uint8.128")
    high = nodes.one("QuantizeLinear", [even, step, zero], f"{name}.high")
    if not wide:
        return Tokens(high, None, scale)
    read = nodes.one("DequantizeLinear", [high, step, zero], f"{name}.read")
    rest = nodes.one("Sub", [even, read], f"{name}.rest")
    low = nodes.one("QuantizeLinear", [rest, nodes.scalar(1 / (LARGEST_CODE * LOW_STEPS)), zero], f"{name}.low")
    return Tokens(high, low, scale)
