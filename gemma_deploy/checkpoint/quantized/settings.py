"""What `quantization_config` of a config.json says; where the tensors say otherwise, they are believed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KEY = "quantization_config"
COMPRESSED, GPTQ, AWQ, BITSANDBYTES = "compressed-tensors", "gptq", "awq", "bitsandbytes"
METHODS = (COMPRESSED, GPTQ, AWQ, BITSANDBYTES)
# What compressed-tensors says of its tensors: packed, or weights again, whose scales may still lie beside them.
COMPRESSED_STATUS, DECOMPRESSED_STATUS = "compressed", "decompressed"
GPTQ_FORMATS = ("gptq", "gptq_v2")
AWQ_FORMATS = ("gemm",)
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense", "fakequant")


@dataclass(frozen=True)
class Claim:
    """A `quantization_config`.

    Args:
        method: `quant_method`, one of METHODS.
        raw: all its keys.
    """

    method: str
    raw: Mapping[str, Any]

    @property
    def format(self) -> str:
        """How the method's codes are packed, in its own words."""
        if self.method == GPTQ:
            said = self.raw.get("checkpoint_format", self.raw.get("format", GPTQ))
            return "marlin" if self.raw.get("is_marlin_format") is True else str(said)
        if self.method == AWQ:
            return str(self.raw.get("version", self.raw.get("format", "gemm"))).lower()
        return str(self.raw.get("format", ""))

    @property
    def status(self) -> str | None:
        """Of compressed-tensors: whether the tensors are packed."""
        found = self.raw.get("quantization_status")
        return found if isinstance(found, str) else None

    @property
    def forms(self) -> tuple[tuple[int, int | None], ...]:
        """(bits, columns of a group or None) of the matrices, as far as it says them; () where it does not."""
        if self.method in (GPTQ, AWQ):
            if self.raw.get("dynamic"):  # other forms for some modules
                return ()
            bits = self.raw.get("bits", self.raw.get("w_bit"))
            size = self.raw.get("group_size", self.raw.get("q_group_size"))
            if type(bits) is not int or type(size) is not int:
                return ()
            return ((bits, size if size > 0 else None),)
        if self.method != COMPRESSED:
            return ()
        found = []
        for weights in self._weights():
            bits, size = weights.get("num_bits"), weights.get("group_size")
            if type(bits) is not int:
                return ()
            found.append((bits, size if type(size) is int and size > 0 else None))
        return tuple(found)

    @property
    def rounds_activations(self) -> bool:
        """Whether the model's linears are to round their inputs, which only the weights of are read here."""
        groups = self.raw.get("config_groups")
        schemes = groups.values() if isinstance(groups, dict) else ()
        return any(isinstance(one, dict) and one.get("input_activations") for one in schemes)

    @property
    def is_asymmetric(self) -> bool:
        """Whether every matrix has zero points of its own, in compressed-tensors."""
        weights = list(self._weights())
        return bool(weights) and all(one.get("symmetric") is False for one in weights)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Modules that are said not to be quantized, by name; patterns are left out."""
        keys = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
        lists = (self.raw.get(key) for key in keys)
        names = [name for one in lists if isinstance(one, list) for name in one if isinstance(name, str)]
        return tuple(name for name in names if not name.startswith("re:"))

    def _weights(self) -> Iterator[Mapping[str, Any]]:
        groups = self.raw.get("config_groups")
        for scheme in groups.values() if isinstance(groups, dict) else ():
            if isinstance(scheme, dict) and isinstance(scheme.get("weights"), dict):
                yield scheme["weights"]


def claim_of(raw: Mapping[str, Any]) -> Claim | None:
    """What a config.json says, or the text model's part of it; None where it says nothing, or what is refused."""
    inner = raw.get("text_config")
    said = raw.get(KEY) or (inner.get(KEY) if isinstance(inner, dict) else None)
    if not isinstance(said, dict) or not said or problem_of(said) is not None:
        return None
    return Claim(said["quant_method"], said)


def problem_of(said: object) -> tuple[object, str] | None:
    """Why a `quantization_config` cannot be read: what it has, and what was expected; None where it can."""
    if not isinstance(said, dict):
        return said, "an object"
    method = said.get("quant_method")
    if method not in METHODS:
        return f"already quantized ({method})", f"{', '.join(METHODS)}, or bf16, fp16 or fp32 weights"
    claim = Claim(method, said)
    known = {GPTQ: GPTQ_FORMATS, AWQ: AWQ_FORMATS, COMPRESSED: COMPRESSED_FORMATS}.get(method)
    if claim.format == "float-quantized":
        return (
            "float-quantized (fp8 weights)",
            "int4 or int8 codes: quantize the bf16 checkpoint, or dequantize it first",
        )
    if known is not None and claim.format not in known:
        return f"{method} codes packed as {claim.format!r}", f"one of {', '.join(known)}"
    return None
