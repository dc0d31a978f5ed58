"""Tiny checkpoints whose linears are packed as quantizers pack them, written code by code from their layouts.

Nothing here is shared with the program: words are put together bit by bit. `Packed` keeps what went in, so that tests
compare with the codes themselves and with their product in float64.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_deploy.testing import write_tiny_checkpoint

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "int32": "I32",
    "int8": "I8",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "BF16",
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packed:
    """One matrix: unsigned codes and zero points, what a code stands for, and the group of each column."""

    codes: np.ndarray  # [out, in]
    zeros: np.ndarray  # [out, groups]
    scales: np.ndarray  # [out, groups] float64, exact in 16 bits
    groups: np.ndarray  # [in]

    @property
    def exact(self) -> np.ndarray:
        """w = (code - zero point) * scale, [out, in] float64."""
        return (self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups]


def bfloat16(values):
    """Round to bfloat16, half to even: the bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits):
    """bfloat16 -> float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def quantize(weight, *, bits=4, size=None, symmetric=True, scale_bits="bfloat16", order=None):
    """To nearest, a scale for each row and group of `size` columns; `order` deals columns to groups (act order)."""
    out, columns = weight.shape
    count = 1 if size is None else columns // size
    groups = np.arange(columns) // (columns // count)
    if order is not None:
        groups = groups[order]
    low, high = np.zeros((out, count)), np.zeros((out, count))
    for group in range(count):
        part = weight[:, groups == group]
        low[:, group], high[:, group] = part.min(1), part.max(1)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    scales = np.maximum(-low, high) / (middle - 1) if symmetric else (high - low) / top
    scales = scales.astype(np.float16).astype(np.float64) if scale_bits == "float16" else widened(bfloat16(scales))
    zeros = np.full((out, count), middle) if symmetric else np.clip(np.round(-low / scales), 1, top).astype(int)
    codes = np.clip(np.round(weight / scales[:, groups]) + zeros[:, groups], 0, top).astype(int)
    codes[0, :2] = 0, top  # the whole range, -8 of symmetric codes too
    return Packed(codes, zeros, scales, groups)


def words_along(codes, bits):
    """[rows, n] codes -> int32 [rows, n * bits / 32], the first code of a word in its lowest bits."""
    each = 32 // bits
    rows, count = codes.shape
    words = np.zeros((rows, -(-count // each)), np.uint64)
    for at in range(count):
        words[:, at // each] |= codes[:, at].astype(np.uint64) << np.uint64(bits * (at % each))
    return words.astype(np.uint32).view(np.int32)


def gptq(packed, *, bits, version, with_order=True, **changes):
    """`qweight`, `qzeros`, `scales`, `g_idx` of AutoGPTQ."""
    stored = (packed.zeros - (version == "gptq")) & ((1 << bits) - 1)
    tensors = {
        "qweight": words_along(packed.codes, bits).T.copy(),
        "qzeros": words_along(stored.T, bits),
        "scales": packed.scales.T.astype(np.float16),
    }
    return tensors | ({"g_idx": packed.groups.astype(np.int32)} if with_order else {})


def awq(packed):
    """`qweight`, `qzeros`, `scales` of AutoAWQ's gemm."""

    def packed_outputs(codes):  # [n, out] -> [n, out / 8]
        words = np.zeros((len(codes), codes.shape[1] // 8), np.uint64)
        for word in range(words.shape[1]):
            for place, output in enumerate(AWQ_ORDER):
                words[:, word] |= codes[:, 8 * word + output].astype(np.uint64) << np.uint64(4 * place)
        return words.astype(np.uint32).view(np.int32)

    return {
        "qweight": packed_outputs(packed.codes.T),
        "qzeros": packed_outputs(packed.zeros.T),
        "scales": packed.scales.T.astype(np.float16),
    }


def compressed(packed, *, bits, symmetric=True, with_order=False):
    """`weight_packed` and what goes with it, of compressed-tensors."""
    tensors = {
        "weight_packed": words_along(packed.codes, bits),
        "weight_scale": bfloat16(packed.scales),
        "weight_shape": np.array(packed.codes.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words_along(packed.zeros.T, bits).T.copy()
    if with_order:
        tensors["weight_g_idx"] = packed.groups.astype(np.int32)
    return tensors


def compressed_int8(packed):
    """`weight` int8 of compressed-tensors' int-quantized."""
    return {"weight": (packed.codes - 128).astype(np.int8), "weight_scale": bfloat16(packed.scales)}


def read_floats(directory: Path):
    """Name -> (bits as stored, float32) of the tensors of a checkpoint that are bfloat16."""
    data = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, info in header.items():
        if info.get("dtype") == "BF16":
            first, last = (8 + length + one for one in info["data_offsets"])
            bits = np.frombuffer(data[first:last], np.uint16).reshape(info["shape"])
            found[name] = bits, widened(bits).astype(np.float32)
    return found


def write_tensors(directory: Path, tensors, kinds=DTYPES) -> None:
    """model.safetensors; uint16 are the bits of bfloat16."""
    header, blobs, at = {}, [], 0
    for name, value in tensors.items():
        blob = np.ascontiguousarray(value).tobytes()
        kind = kinds[str(value.dtype)]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def is_linear(name):
    return "_proj." in name


def write_quantized(
    directory: Path, pack, config, *, model_type="gemma3_text", only=is_linear, kinds=DTYPES, **changes
):
    """A checkpoint whose chosen matrices are packed.

    Args:
        pack: weight [out, in] -> (Packed or None, tensors by what stands behind the module's path).
        config: `quantization_config`; only: whether a matrix is packed, by its name; changes: of config.json.

    Returns:
        What was packed, by the name of the matrix.
    """
    write_tiny_checkpoint(directory, model_type, **changes)
    tensors, packed = {}, {}
    for name, (bits, values) in read_floats(directory).items():
        if not only(name):
            tensors[name] = bits
            continue
        packed[name], parts = pack(values)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": value for suffix, value in parts.items()}
    write_tensors(directory, tensors, kinds)
    raw = json.loads((directory / "config.json").read_text())
    if config is not None:
        raw["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(raw))
    return packed


def compressed_config(bits, size, *, symmetric=True, format="pack-quantized", **more):
    weights = {"num_bits": bits, "group_size": size, "strategy": "group" if size else "channel", "type": "int"}
    scheme = {"targets": ["Linear"], "weights": weights | {"symmetric": symmetric}}
    return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": {"group_0": scheme}, "ignore": ["lm_head"]} | more  # fmt: skip


def dealt(columns, seed=3):
    """An act order: which column goes where."""
    return np.random.default_rng(seed).permutation(columns)


# name -> (pack, quantization_config): every form that is read as codes.
def _gptq(bits=4, size=32, symmetric=True, version="gptq", order=False):
    def pack(weight):
        dealing = dealt(weight.shape[1]) if order else None
        one = quantize(weight, bits=bits, size=size, symmetric=symmetric, scale_bits="float16", order=dealing)
        return one, gptq(one, bits=bits, version=version)

    said = {"quant_method": "gptq", "bits": bits, "group_size": size or -1, "sym": symmetric, "desc_act": order}
    return pack, said | {"checkpoint_format": version}


def _awq(symmetric):
    def pack(weight):
        one = quantize(weight, size=32, symmetric=symmetric, scale_bits="float16")
        return one, awq(one)

    return pack, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": not symmetric, "version": "gemm"}


def _compressed(bits=4, size=32, symmetric=True, order=False):
    def pack(weight):
        dealing = dealt(weight.shape[1]) if order else None
        one = quantize(weight, bits=bits, size=size, symmetric=symmetric, order=dealing)
        return one, compressed(one, bits=bits, symmetric=symmetric, with_order=order)

    return pack, compressed_config(bits, size, symmetric=symmetric)


def _compressed_int8():
    def pack(weight):
        one = quantize(weight, bits=8)
        return one, compressed_int8(one)

    return pack, compressed_config(8, None, format="int-quantized")


FORMS = {
    "gptq": _gptq(),
    "gptq_v2": _gptq(version="gptq_v2"),
    "gptq-asymmetric": _gptq(symmetric=False),
    "gptq_v2-asymmetric": _gptq(symmetric=False, version="gptq_v2"),
    "gptq-act-order": _gptq(symmetric=False, order=True),
    "gptq-int8": _gptq(bits=8, size=None),
    "awq": _awq(False),
    "awq-symmetric": _awq(True),
    "compressed-int4": _compressed(),
    "compressed-int4-asymmetric": _compressed(symmetric=False),
    "compressed-act-order": _compressed(symmetric=False, order=True),
    "compressed-packed-int8": _compressed(bits=8, size=None),
    "compressed-int8": _compressed_int8(),
}
