"""The table of dtypes against ONNX, ONNX Runtime, safetensors and NumPy themselves."""

import json
from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from safetensors.torch import save

from gemma_deploy.dtypes import BY_NAME, BY_ONNX, BY_ONNXRUNTIME, BY_SAFETENSORS, ROWS, DtypeName, StoredDtype

ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e4m3": "FLOAT8E4M3FN", "float8_e5m2": "FLOAT8E5M2"}
TORCH_NAMES = {"float8_e4m3": "float8_e4m3fn"}
PACKED = [row.name for row in ROWS if row.packed]
UNPACKED = [row.name for row in ROWS if not row.packed]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_onnx_calls_it_so(row):
    assert getattr(onnx.TensorProto, ONNX_NAMES.get(row.name, row.name.upper())) == row.onnx
    assert BY_ONNX[row.onnx] is BY_NAME[row.name] is row


@pytest.mark.parametrize("name", UNPACKED)
def test_safetensors_calls_it_so_and_its_elements_are_as_large(name):
    tensor = torch.zeros(3, dtype=getattr(torch, TORCH_NAMES.get(name, name)))
    data = save({"x": tensor})
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]
    row = BY_SAFETENSORS[entry["dtype"]]
    start, stop = entry["data_offsets"]
    assert row.name == name
    assert row.itemsize * 3 == stop - start
    assert np.dtype(row.numpy).itemsize == row.itemsize


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_a_session_calls_it_so(name):
    row = BY_NAME[name]
    ports = [helper.make_tensor_value_info(one, row.onnx, [2]) for one in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert BY_ONNXRUNTIME[session.get_inputs()[0].type] is row


def test_four_bits_lie_in_bytes():
    assert PACKED == ["int4", "uint4"]
    assert {BY_NAME[name].safetensors for name in PACKED} == {"U8"}
    assert BY_SAFETENSORS["U8"].name == "uint8"


def test_dtypes_of_files_and_graphs_are_rows():
    assert set(get_args(StoredDtype)) < set(get_args(DtypeName)) < set(BY_NAME)
