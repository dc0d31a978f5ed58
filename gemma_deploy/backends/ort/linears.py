"""The kernels of linears.

block: MatMulNBits, which rounds activations to 8 bits in blocks of input channels (accuracy level 4; the others are a
hundred times slower on a CPU). integer: activations as 8-bit codes with one scale per token, then one integer product;
`wide` ones are codes of 16 bits, the high and the low half multiplied apart, x = s (high + low / 254). dense: matrices
that are no codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from gemma_deploy.backends.ort.nodes import MICROSOFT, Nodes
from gemma_deploy.backends.ort.options import Kernels
from gemma_deploy.backends.ort.weights import Weights, blocks_of, largest_block

INT8_ACTIVATIONS = 4  # accuracy_level
LARGEST_CODE, LOW_STEPS = 127, 254  # of a code; the low half's steps in one of the high half's
SMALLEST = 1e-30  # magnitude of a token of zeros, so that nothing is divided by zero
BITS = {"uint8": 8, "uint4": 4}


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def product_of(module: str) -> str:
    """The product that computes a linear, alone or with others."""
    path, _, name = module.rpartition(".")
    return f"{path}." + next((fused for fused, parts in FUSED.items() if name in parts), name)


class Linear:
    """One or more linears that read the same input, as one product.

    Args:
        weights: of the graph; modules: paths, in the order in which they lie in the file.
        name: of what the file holds for them together; out: of the product.
    """

    def __init__(
        self, weights: Weights, modules: Sequence[str], name: str, kernels: Kernels, out: str | None = None
    ) -> None:
        self.weights, self.modules, self.name, self.kernels = weights, tuple(modules), name, kernels
        self.out = out or f"{name}.out"
        self.codes = [f"{module}.weight" for module in modules]
        self.scales = [f"{module}.scale" for module in modules]
        self.rows, self.columns = weights.shape(self.codes)
        self.dense = weights.dtype(self.codes[0]) not in BITS

    @property
    def per_row(self) -> bool:
        """Whether the codes have one scale per row, as an integer product wants it."""
        return not self.dense and len(self.weights.shape(self.scales)) == 1

    def __call__(self, nodes: Nodes, x: ir.Value, integer: bool = False) -> ir.Value:
        """x: [..., in] -> [..., out].

        Args:
            integer: with a scale per token, where the codes allow it.
        """
        if self.dense:
            return self._dense(nodes, x)
        if integer and self.per_row and self.bits == 8:
            return self._integer(nodes, x)
        return self._block(nodes, x)

    @property
    def bits(self) -> int:
        """Of a code."""
        return BITS[self.weights.dtype(self.codes[0])]

    @property
    def block(self) -> int:
        """Input channels in a block of MatMulNBits."""
        if self.per_row:
            return largest_block(self.columns, self.kernels.block)
        return self.columns // self.weights.shape(self.scales)[1]

    def _dense(self, nodes: Nodes, x: ir.Value) -> ir.Value:
        matrix = self.weights.view(self.codes, f"{self.name}.weight")
        return nodes.one("FusedMatMul", [x, matrix], self.out, domain=MICROSOFT, transB=1)

    def packed(self) -> ir.Value:
        """Codes [out, blocks, bytes of a block]."""
        blocks = blocks_of(self.columns, self.block)
        shape = (self.rows, blocks, self.block * self.bits // 8)
        return self.weights.view(self.codes, f"{self.name}.blocks", shape, ir.DataType.UINT8)

    def _block(self, nodes: Nodes, x: ir.Value) -> ir.Value:
        scales = self.weights.block_scales(self.scales, self.name, blocks_of(self.columns, self.block))
        return nodes.one(
            "MatMulNBits",
            [x, self.packed(), scales],
            self.out,
            domain=MICROSOFT,
            K=self.columns,
            N=self.rows,
            bits=self.bits,
            block_size=self.block,
            accuracy_level=INT8_ACTIVATIONS,
        )

    def _integer(self, nodes: Nodes, x: ir.Value) -> ir.Value:
        name, matrix = self.name, self.weights.transposed(self.codes, self.name)
        scales = self.weights.view(self.scales, f"{self.name}.scale")
        magnitude = nodes.one("Abs", [x], f"{name}.magnitude")
        absmax = nodes.one("ReduceMax", [magnitude, nodes.numbers(-1)], f"{name}.absmax", keepdims=1)
        token = nodes.one("Max", [absmax, nodes.scalar(SMALLEST)], f"{name}.token_scale")
        even = nodes.one("Div", [x, token], f"{name}.even")
        step, zero = nodes.scalar(1 / LARGEST_CODE), nodes.constant(np.uint8(128), "uint8.128")

        def product(codes: ir.Value, step: ir.Value, made: str) -> ir.Value:
            inputs = [codes, matrix, step, scales, zero]
            return nodes.one("MatMulIntegerToFloat", inputs, f"{name}.{made}", domain=MICROSOFT)

        high = nodes.one("QuantizeLinear", [even, step, zero], f"{name}.high")
        total = product(high, step, "product")
        if set(self.modules) & set(self.kernels.wide):
            read = nodes.one("DequantizeLinear", [high, step, zero], f"{name}.read")
            rest = nodes.one("Sub", [even, read], f"{name}.rest")
            low_step = nodes.scalar(1 / (LARGEST_CODE * LOW_STEPS))
            low = nodes.one("QuantizeLinear", [rest, low_step, zero], f"{name}.low")
            total = nodes.one("Add", [total, product(low, low_step, "low_product")], f"{name}.sum")
        return nodes.one("Mul", [total, token], self.out)
