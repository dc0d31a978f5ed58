"""A graph of the static pair -> a function of TVM's Relax, whose parameters are the graph's inputs, then its weights.

TVM's own reader of ONNX takes an operator for the standard one of its name, whatever its domain, and reads weights
into the program; both would be wrong here. Operators are those that the traced pair has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx, topi

from gemma_deploy.backends.tvm.kernels import Product, softmax
from gemma_deploy.errors import NotBuiltError

LINEAR = "QuantizedLinearPerChannel"
op = relax.op
GELU_ROOT, GELU_CUBE = (tirx.const(number, "float32") for number in (math.sqrt(2 / math.pi), 0.044715))

UNARY: dict[str, Callable[[Any], Any]] = {
    "Cos": op.cos,
    "Identity": lambda x: x,
    "Neg": op.negative,
    "Not": op.logical_not,
    "Sigmoid": op.sigmoid,
    "Sin": op.sin,
    "Sqrt": op.sqrt,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": op.add,
    "And": op.logical_and,
    "Div": op.divide,
    "Equal": op.equal,
    "Greater": op.greater,
    "Less": op.less,
    "LessOrEqual": op.less_equal,
    "Max": op.maximum,
    "Min": op.minimum,
    "Mul": op.multiply,
    "Or": op.logical_or,
    "Sub": op.subtract,
}


def weights_of(model: ir.Model) -> list[ir.Value]:
    """Initializers that lie in the parameter file, in the order of a function's parameters."""
    return [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]


class Lowering:
    """One graph in the making.

    Args:
        builder: of the module that the function goes to; name: of the function; model: the graph.
    """

    def __init__(self, builder: relax.BlockBuilder, name: str, model: ir.Model) -> None:
        self._builder, self._name, self._model = builder, name, model
        self._values: dict[str, Any] = {}
        self._transposed: dict[str, str] = {}  # a value -> that of which it is the matrices transposed

    def build(self) -> None:
        """Add the function to the module.

        Raises:
            NotBuiltError: the graph has operators that this does not know, all of them told.
        """
        graph = self._model.graph
        self._refuse_unknown()
        parameters = []
        for value in [*graph.inputs, *weights_of(self._model)]:
            self._values[_name(value)] = made = relax.Var(_identifier(_name(value)), _tensor_type(value))
            parameters.append(made)
        with self._builder.function(self._name, parameters):
            with self._builder.dataflow():
                for node in graph:
                    self._node(node)
                outputs = [self._builder.emit_output(self._values[_name(value)]) for value in graph.outputs]
            self._builder.emit_func_output(relax.Tuple(outputs))

    def _refuse_unknown(self) -> None:
        known = {*UNARY, *BINARY, *(name.removeprefix("_on_") for name in dir(self) if name.startswith("_on_"))}
        unknown = sorted({node.op_type for node in self._model.graph} - known)
        if unknown:
            raise NotBuiltError(
                f"{self._name}.onnx has operators that backend.type tvm does not lower",
                where="export stage",
                problems=unknown,
                next_step="write backend.type: tvm_vacc or onnxruntime",
            )

    def _node(self, node: ir.Node) -> None:
        result = _name(node.outputs[0])
        if node.op_type in UNARY:
            made = UNARY[node.op_type](self._value(node, 0))
        elif node.op_type in BINARY:
            made = BINARY[node.op_type](self._value(node, 0), self._value(node, 1))
        else:
            made = getattr(self, f"_on_{node.op_type}")(node)
        self._values[result] = made if isinstance(made, relax.Var) else self._builder.emit(made)

    def _value(self, node: ir.Node, index: int) -> Any:
        """An input: computed before, a parameter, or a constant of the graph."""
        value = node.inputs[index]
        assert value is not None
        found = self._values.get(_name(value))
        if found is None:
            array = _constant(value)
            found = self._values[_name(value)] = relax.const(array, array.dtype.name)
        return found

    def _shape(self, value: Any) -> tuple[int, ...]:
        return tuple(int(size) for size in self._builder.normalize(value).ty.shape)

    def _on_Cast(self, node: ir.Node) -> Any:
        return op.astype(self._value(node, 0), ir.DataType(_integer(node, "to")).numpy().name)

    def _on_Concat(self, node: ir.Node) -> Any:
        return op.concat([self._value(node, index) for index in range(len(node.inputs))], axis=_integer(node, "axis"))

    def _on_CumSum(self, node: ir.Node) -> Any:
        return op.cumsum(self._value(node, 0), axis=int(_numbers(node, 1)[0]))

    def _on_Expand(self, node: ir.Node) -> Any:
        value = self._value(node, 0)
        return op.broadcast_to(value, np.broadcast_shapes(self._shape(value), tuple(_numbers(node, 1))))

    def _on_Gather(self, node: ir.Node) -> Any:
        return op.take(self._value(node, 0), self._value(node, 1), axis=_integer(node, "axis", 0), mode="clip")

    def _on_Gelu(self, node: ir.Node) -> Any:
        approximate = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        value = self._value(node, 0)
        return self._builder.call_te(_gelu_tanh, value) if approximate == "tanh" else op.nn.gelu(value)

    def _on_MatMul(self, node: ir.Node) -> Any:
        second = node.inputs[1]
        assert second is not None
        source = self._transposed.get(_name(second))
        other = self._value(node, 1) if source is None else self._values[source]
        return self._product(self._value(node, 0), other, transposed=source is not None)

    def _on_Pow(self, node: ir.Node) -> Any:
        value, exponent = self._value(node, 0), node.inputs[1]
        assert exponent is not None
        squared = exponent.const_value is not None and _constant(exponent).tolist() == 2.0
        return op.multiply(value, value) if squared else op.power(value, self._value(node, 1))

    def _on_QuantizedLinearPerChannel(self, node: ir.Node) -> Any:
        return self._product(*(self._value(node, index) for index in range(3)), transposed=True)

    def _on_Reciprocal(self, node: ir.Node) -> Any:
        return op.divide(relax.const(1.0, "float32"), self._value(node, 0))

    def _on_ReduceMean(self, node: ir.Node) -> Any:
        axes = [int(axis) for axis in _numbers(node, 1)]
        return op.mean(self._value(node, 0), axes, keepdims=bool(_integer(node, "keepdims", 1)))

    def _on_Reshape(self, node: ir.Node) -> Any:
        value = self._value(node, 0)
        sizes = [int(size) for size in _numbers(node, 1)]
        known = math.prod(size for size in sizes if size != -1)
        whole = math.prod(self._shape(value))
        return op.reshape(value, [whole // known if size == -1 else size for size in sizes])

    def _on_Slice(self, node: ir.Node) -> Any:
        begin, end, axes, steps = (_numbers(node, index) for index in range(1, 5))
        value = self._value(node, 0)
        sizes = self._shape(value)
        end = [min(int(last), sizes[int(axis)]) for last, axis in zip(end, axes, strict=True)]
        return op.strided_slice(
            value, [int(one) for one in axes], [int(one) for one in begin], end, list(map(int, steps))
        )

    def _on_Softmax(self, node: ir.Node) -> Any:
        """Along the last axis."""
        value = self._value(node, 0)
        *left, size = self._shape(value)
        flat = self._builder.emit(op.reshape(value, (math.prod(left), size)))
        called = self._builder.add_func(softmax(math.prod(left), size), "softmax")
        made = self._builder.emit(op.call_tir(called, [flat], relax.TensorType((math.prod(left), size), "float32")))
        return op.reshape(made, (*left, size))

    def _on_Tanh(self, node: ir.Node) -> Any:
        return self._builder.call_te(topi.fast_tanh, self._value(node, 0))

    def _on_Transpose(self, node: ir.Node) -> Any:
        order = list(node.attributes["perm"].as_ints())
        rest = list(range(len(order) - 2))
        first = node.inputs[0]
        assert first is not None
        if order == [*rest, len(order) - 1, len(order) - 2]:
            self._value(node, 0)
            self._transposed[_name(node.outputs[0])] = _name(first)
        return op.permute_dims(self._value(node, 0), order)

    def _on_Unsqueeze(self, node: ir.Node) -> Any:
        return op.expand_dims(self._value(node, 0), [int(axis) for axis in _numbers(node, 1)])

    def _on_Where(self, node: ir.Node) -> Any:
        return op.where(*(self._value(node, index) for index in range(3)))

    def _product(self, value: Any, other: Any, scale: Any = None, *, transposed: bool) -> Any:
        """[..., m, k] with [..., n, k], or with [..., k, n]."""
        left, right = self._shape(value), self._shape(other)
        batch, matrices = math.prod(left[:-2]), math.prod(right[:-2])
        n, k = right[-2:] if transposed else right[:-3:-1]
        rows = left[-2] if len(left) > 1 else 1
        if matrices == 1:  # all rows meet the same matrix
            batch, rows = 1, batch * rows
        elif batch != matrices:
            raise NotBuiltError(
                f"{self._name}.onnx multiplies {list(left)} by {list(right)}",
                where="export stage",
                next_step="write backend.type: tvm_vacc or onnxruntime",
            )
        of = Product(
            batch, rows, n, k, matrices == 1, self._builder.normalize(other).ty.dtype, scale is not None, transposed
        )
        called = self._builder.add_func(of.built(), "linear" if scale is not None else "product")
        arguments = [op.reshape(value, (batch, rows, k)), op.reshape(other, (matrices, *right[-2:]))]
        arguments = [self._builder.emit(one) for one in arguments]
        out = relax.TensorType((batch, rows, n), "float32")
        made = self._builder.emit(op.call_tir(called, [*arguments, *([scale] if scale is not None else [])], out))
        return op.reshape(made, (*left[:-1], n))


def _gelu_tanh(x: Any) -> Any:
    """X / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element."""
    inner = te.compute(x.shape, lambda *i: GELU_ROOT * (x(*i) + GELU_CUBE * x(*i) * x(*i) * x(*i)))
    bent = topi.fast_tanh(inner)
    return te.compute(x.shape, lambda *i: x(*i) * tirx.const(0.5, "float32") * (bent(*i) + tirx.const(1.0, "float32")))


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _tensor_type(value: ir.Value) -> Any:
    assert value.shape is not None
    assert value.dtype is not None
    return relax.TensorType(list(value.shape.numpy()), value.dtype.numpy().name)


def _constant(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    found: np.ndarray = value.const_value.numpy()
    return found


def _numbers(node: ir.Node, index: int) -> Sequence[int]:
    value = node.inputs[index]
    assert value is not None
    numbers: list[int] = np.atleast_1d(_constant(value)).tolist()
    return numbers


def _integer(node: ir.Node, name: str, default: int | None = None) -> int:
    if default is not None and name not in node.attributes:
        return default
    return node.attributes[name].as_int()
