"""Small checkpoints with chosen values, and NumPy's word on what the parameter file must hold."""

import json

import numpy as np

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.testing import write_tiny_checkpoint

NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}


def tiny(path, model_type="gemma", **changes):
    return Checkpoint.open(write_tiny_checkpoint(path, model_type, **changes))


def read_raw(path):
    """Tensors of a safetensors file by NumPy alone: {name: (dtype, array; bfloat16 as uint16)}."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        start, stop = (end + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[start:stop], NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        out[name] = (entry["dtype"], array)
    return out


def widen(dtype, array):
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.astype(np.float32)


def to_bf16_bits(w):
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def patch_value(directory, name, index, value, file="model.safetensors"):
    """Overwrite one element of a tensor on disk (bfloat16 or float32)."""
    path = directory / file
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:end])[name]
    flat = np.ravel_multi_index(index, entry["shape"])
    encoded = np.array([value], np.float32)
    encoded = (encoded.view(np.uint32) >> 16).astype(np.uint16) if entry["dtype"] == "BF16" else encoded
    at = end + entry["data_offsets"][0] + int(flat) * encoded.itemsize
    data[at : at + encoded.itemsize] = encoded.tobytes()
    path.write_bytes(data)
