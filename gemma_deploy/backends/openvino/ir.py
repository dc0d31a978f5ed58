"""Writes OpenVINO's XML, version 11: layers, their ports, and edges; weights lie in another file.

https://docs.openvino.ai/2026/documentation/openvino-ir-format/operation-sets.html has the operations. Shapes are left
out: OpenVINO works them out when it reads the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

import numpy as np

from gemma_deploy.dtypes import BY_NAME, OPENVINO
from gemma_deploy.params.layout import Place

ELEMENTS = {name: element for element, name in OPENVINO.items()}
# The set of operations that each was made in; of others the first.
OPSETS = {
    "Assign": 6, "BitwiseAnd": 13, "Broadcast": 3, "Gather": 8, "Gelu": 7, "Range": 4, "ReadValue": 6,
    "ScaledDotProductAttention": 13, "ShapeOf": 3, "Slice": 8, "SoftMax": 8,
}  # fmt: skip
DECOMPRESSION = '<rt_info><attribute name="decompression" version="0"/></rt_info>'
CONSTANT_BYTES = 8  # each constant begins at a multiple
Scalar = int | float | bool


@dataclass(frozen=True)
class Value:
    """What a layer gives: its number, and the number of its output port."""

    layer: int
    port: int


class Constants:
    """Small constants, which lie one behind the other in the parameter file; equal ones lie there once."""

    def __init__(self) -> None:
        self._offsets: dict[bytes, int] = {}
        self.content = b""

    def offset(self, array: np.ndarray) -> int:
        """Where the bytes of an array lie among them."""
        data = array.tobytes()
        if data not in self._offsets:
            self._offsets[data] = len(self.content)
            self.content += data + bytes(-len(data) % CONSTANT_BYTES)
        return self._offsets[data]


class Network:
    """A model in the making.

    Args:
        name: of the model; at: where constants begin in the file of weights.
    """

    def __init__(self, name: str, *, at: int = 0) -> None:
        self.constants = Constants()
        self._name, self._at = name, at
        self._layers: list[str] = []
        self._edges: list[str] = []

    def node(
        self,
        kind: str,
        inputs: Sequence[Value],
        name: str = "",
        *,
        tensor: str = "",
        extra: str = "",
        data: Mapping[str, object] = {},
    ) -> Value:
        """A layer of one output.

        Args:
            name: of the layer; tensor: of what it gives, for whoever asks for it; extra: XML behind `data`.
            data: attributes.
        """
        number = len(self._layers)
        self._edges += [
            f'<edge from-layer="{one.layer}" from-port="{one.port}" to-layer="{number}" to-port="{port}"/>'
            for port, one in enumerate(inputs)
        ]
        attributes = "".join(f" {key}={quoteattr(_text(value))}" for key, value in data.items())
        ports = "".join(f'<port id="{port}"/>' for port in range(len(inputs)))
        named = f" names={quoteattr(tensor)}" if tensor else ""
        given = (
            "" if kind == "Result" else f'<output><port id="{len(inputs)}" precision="UNSPECIFIED"{named}/></output>'
        )
        self._layers.append(
            f'<layer id="{number}" name={quoteattr(name or f"{kind}_{number}")} type="{kind}" '
            f'version="opset{OPSETS.get(kind, 1)}">'
            + (f"<data{attributes}/>" if attributes else "")
            + extra
            + (f"<input>{ports}</input>" if inputs else "")
            + given
            + "</layer>"
        )
        return Value(number, len(inputs))

    def parameter(self, name: str, dtype: str, rank: int) -> Value:
        """An input of free lengths."""
        shape = ",".join(["?"] * rank)
        return self.node("Parameter", (), name, tensor=name, data={"shape": shape, "element_type": ELEMENTS[dtype]})

    def stored(self, place: Place, shape: Sequence[int] | None = None) -> Value:
        """A tensor of the file of weights, in whatever shape its elements are read; its own by default."""
        lies = place.shape if shape is None else shape
        return self._const(place.name, place.dtype, lies, offset=place.offset, size=place.nbytes)

    def constant(self, value: Scalar | Sequence[Scalar] | np.ndarray, dtype: str = "int64") -> Value:
        """A small constant."""
        array = np.asarray(value, np.dtype(BY_NAME[dtype].numpy))
        return self._const("", dtype, array.shape, offset=self._at + self.constants.offset(array), size=array.nbytes)

    def converted(self, value: Value, dtype: str = "float32", *, weight: bool = False) -> Value:
        """In another dtype; of a weight that is to stay as it is until it is read."""
        extra = DECOMPRESSION if weight else ""
        return self.node("Convert", [value], extra=extra, data={"destination_type": ELEMENTS[dtype]})

    def text(self, options: Mapping[str, object]) -> str:
        """The XML.

        Args:
            options: of the runtime, where whoever compiles the model says nothing else.
        """
        said = "".join(f"<{key} value={quoteattr(_text(value))}/>" for key, value in options.items())
        return (
            f'<?xml version="1.0"?>\n<net name={quoteattr(self._name)} version="11">\n<layers>\n'
            + "\n".join(self._layers)
            + "\n</layers>\n<edges>\n"
            + "\n".join(self._edges)
            + f"\n</edges>\n<rt_info><runtime_options>{said}</runtime_options></rt_info>\n</net>\n"
        )

    def _const(self, name: str, dtype: str, shape: Sequence[int], *, offset: int, size: int) -> Value:
        data = {"element_type": ELEMENTS[dtype], "shape": _text(shape), "offset": offset, "size": size}
        return self.node("Const", (), name, data=data)


def _text(value: object) -> str:
    """Of an attribute."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)
