"""Which tensors of a file make one matrix together, and which way they are packed.

Tensors are believed: a module that has codes is read as codes and one that has floats as floats, whatever config.json
says. Where the two differ, a note says so; scales that are not read are named in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_deploy.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, gptq
from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, MisfitError, QuantizedWeight
from gemma_deploy.checkpoint.quantized.settings import (
    AWQ,
    BITSANDBYTES,
    COMPRESSED,
    COMPRESSED_STATUS,
    DECOMPRESSED_STATUS,
    GPTQ,
    KEY,
    METHODS,
    Claim,
)
from gemma_deploy.checkpoint.safetensors_reader import SafetensorsFile, readable
from gemma_deploy.checkpoint.stored import Stored

WEIGHT = "weight"
Parts = dict[str, Stored[SafetensorsFile]]
# What stands behind a module's path, and is no model's tensor.
OF_GPTQ = (*gptq.NEEDED, "g_idx")
OF_COMPRESSED = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *(
        "weight_global_scale",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
    ),
)
OF_BITSANDBYTES = (
    *(bitsandbytes.ABSMAX, bitsandbytes.VALUES, bitsandbytes.NESTED, bitsandbytes.NESTED_VALUES),
    *(bitsandbytes.STATE + kind for kind in ("nf4", "fp4")),
    *(bitsandbytes.ROW_MAXIMA, "weight_format"),
)
ALL = (*OF_GPTQ, *OF_COMPRESSED, *OF_BITSANDBYTES)


@dataclass(frozen=True)
class Modules:
    """The matrices of a file by the name that they would have as floats, and the tensors that are no part of any.

    Args:
        plain: name -> open file of tensors that stand alone, of whatever format.
        parts: matrix -> its tensors, by what stands behind the module's path.
        claim: what config.json says.
        unread: tensors beside floats that are not read.
    """

    plain: Mapping[str, Any]
    parts: Mapping[str, Parts]
    claim: Claim | None = None
    unread: tuple[str, ...] = ()
    built: dict[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything there is."""
        return (*self.plain, *(name for name in self.parts if name not in self.plain))

    def shape_of(self, name: str) -> list[int]:
        """Of a tensor, or of the codes of a matrix as they lie in the file."""
        if name not in self.parts:
            return list(self.plain[name].entries[name].shape)
        return list(next(iter(self.parts[name].values())).entry.shape)

    def place(self, name: str) -> Stored[Any] | QuantizedWeight:
        """What a tensor or matrix is read from.

        Raises:
            MisfitError: its tensors do not fit each other, or what config.json says of them.
        """
        if name not in self.parts:
            return Stored(self.plain[name], name)
        if name not in self.built:
            found = _build(name, self.parts[name], self.claim)
            _check_claim(found, self.claim)
            if isinstance(found, CodedMatrix):
                found.order()  # raises where it names groups that there are not
            self.built[name] = found
        return self.built[name]

    def twice(self, used: Iterable[str]) -> list[str]:
        """Matrices that are there as floats and as codes."""
        return [
            f"twice: {name} is there as floats and as codes"
            for name in used
            if name in self.plain and name in self.parts
        ]

    def problems(self, used: Iterable[str]) -> list[str]:
        """What keeps all of it from being read: two ways of packing in one model."""
        ways = Counter(_way(self.parts[name], self.claim) for name in used if name in self.parts)
        found = []
        if len(ways) > 1:
            told = ", ".join(f"{count} matrices of {way}" for way, count in ways.items())
            found.append(f"two quantizations in one file: {told}")
        if self.claim is not None and self.claim.status == COMPRESSED_STATUS and self.unread:
            found.append(
                f"{self.unread[0]} lies beside a weight of floats ({len(self.unread)} so), and config.json says "
                f"quantization_status {COMPRESSED_STATUS}: whether those are weights or codes cannot be told"
            )
        return found

    def notes(self, used: Mapping[str, str], matrices: int) -> list[str]:
        """What a user should know.

        Args:
            used: name of the model -> name here, of the tensors that are read; matrices: linears of the model.
        """
        claim, notes = self.claim, []
        coded = {name: self.built[here] for name, here in used.items() if here in self.built}
        if coded:
            kinds = Counter(one.described for one in coded.values())
            told = "; ".join(f"{count} matrices are {kind}" for kind, count in kinds.items())
            linears = sum(".layers." in name for name in coded)
            rest = "" if linears == matrices else f"; {matrices - linears} of {matrices} linears are floats"
            notes.append(f"the weights arrive quantized: {told}{rest}")
            notes += self._contradictions(used)
        elif claim is not None:
            status = f", quantization_status {claim.status}" if claim.status else ""
            notes.append(
                f"config.json says {claim.method}{status}, but the tensors are floats: they are read as they are"
            )
        if self.unread:
            applied = claim is not None and claim.status == DECOMPRESSED_STATUS
            why = (
                f", as quantization_status {DECOMPRESSED_STATUS} says that they are applied already" if applied else ""
            )
            notes.append(
                f"{len(self.unread)} scales and zero points beside weights that are floats are not read{why}: "
                f"{self.unread[0]}{' and others' if len(self.unread) > 1 else ''}"
            )
        if claim is not None and claim.rounds_activations:
            notes.append(
                "the weights alone are read: config.json asks for rounded activations as well (input_activations)"
            )
        return notes

    def _contradictions(self, used: Mapping[str, str]) -> list[str]:
        if self.claim is None:
            return []
        ignored = [one for one in self.claim.ignored if f"{one}.{WEIGHT}" in self.built]
        if not ignored:
            return []
        return [f"config.json lists {ignored[0]} as not quantized, but it has codes: they are read ({len(ignored)} so)"]


def group(files: Mapping[str, SafetensorsFile], claim: Claim | None) -> Modules:
    """Put tensors together.

    Args:
        files: name of a tensor -> the open file that holds it.
    """
    beside: dict[str, dict[str, str]] = {}
    for name in files:
        suffix = next((one for one in ALL if name.endswith(f".{one}")), None)
        if suffix is not None:
            beside.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = name
    plain, parts, unread = dict(files), {}, []
    for module, names in beside.items():
        weight = f"{module}.{WEIGHT}"
        if weight in files:
            entry = files[weight].entries[weight]
            if readable(entry.dtype):
                # Floats and codes of one matrix are both kept under its name, and told as a tensor that is there twice.
                if not {"qweight", "weight_packed"} & names.keys():
                    unread += list(names.values())
                    for name in names.values():
                        del plain[name]
                    continue
            else:
                names = {WEIGHT: weight, **names}
        if not _has_codes(names):
            continue
        for name in names.values():
            del plain[name]
        parts[weight] = {suffix: Stored(files[name], name) for suffix, name in names.items()}
    return Modules(plain, parts, claim, tuple(unread))


def _has_codes(names: Mapping[str, str]) -> bool:
    return bool({"qweight", "weight_packed", WEIGHT} & names.keys())


def _way(parts: Parts, claim: Claim | None) -> str:
    """The method by the names alone; those of GPTQ and AWQ are alike."""
    if "qweight" in parts:
        return claim.method if claim is not None and claim.method in (GPTQ, AWQ) else f"{GPTQ} or {AWQ}"
    if compressed_tensors.PACKED in parts or compressed_tensors.SCALE in parts:
        return COMPRESSED
    return BITSANDBYTES


def _build(name: str, parts: Parts, claim: Claim | None) -> QuantizedWeight:
    way = _way(parts, claim)
    floating = [part.name for part in parts.values() if part.entry.dtype.startswith("float8")]
    if floating:
        raise MisfitError(
            f"{floating[0]} holds fp8 numbers: int4 and int8 codes are read, and floats of 16 bits or more"
        )
    if way not in METHODS:
        raise MisfitError(f"{name} has codes ({parts['qweight'].name}), and config.json no {KEY} that says how")
    builders: Mapping[str, Callable[[], QuantizedWeight]] = {
        GPTQ: lambda: gptq.GptqMatrix(name, _with(name, parts, gptq.NEEDED), version=claim.format if claim else ""),
        AWQ: lambda: awq.AwqMatrix(name, _with(name, parts, gptq.NEEDED)),
        COMPRESSED: lambda: compressed_tensors.CompressedMatrix(name, parts),
        BITSANDBYTES: lambda: _bitsandbytes(name, parts),
    }
    _check_dtypes(name, parts, way)
    return builders[way]()


def _bitsandbytes(name: str, parts: Parts) -> QuantizedWeight:
    if bitsandbytes.ROW_MAXIMA in parts:
        return bitsandbytes.RowMatrix(name, parts)
    return bitsandbytes.ValueMatrix(name, parts)


def _with(name: str, parts: Parts, needed: tuple[str, ...]) -> Parts:
    missing = [one for one in needed if one not in parts]
    if missing:
        raise MisfitError(f"{name}: {' and '.join(missing)} missing beside {', '.join(parts)}")
    return {**{one: parts[one] for one in needed}, **parts}


def _check_dtypes(name: str, parts: Parts, way: str) -> None:
    """Codes are whole numbers, scales are floats."""
    integers = {
        GPTQ: {"qweight": "int32", "qzeros": "int32", "g_idx": "int32"},
        AWQ: {"qweight": "int32", "qzeros": "int32", "g_idx": "int32"},
        COMPRESSED: {"weight_packed": "int32", WEIGHT: "int8", "weight_g_idx": "int32"},
        BITSANDBYTES: {WEIGHT: "int8"} if bitsandbytes.ROW_MAXIMA in parts else {},
    }[way]
    floats = ("scales", "weight_scale", bitsandbytes.ROW_MAXIMA, bitsandbytes.VALUES, bitsandbytes.NESTED)
    wrong = [
        f"{part.name} is {part.entry.dtype}, expected {integers[suffix]}"
        for suffix, part in parts.items()
        if suffix in integers and part.entry.dtype != integers[suffix]
    ]
    wrong += [
        f"{part.name} is {part.entry.dtype}, expected a float"
        for suffix, part in parts.items()
        if suffix in floats and not readable(part.entry.dtype)
    ]
    if wrong:
        raise MisfitError(f"{name}: {'; '.join(wrong)}")


def _check_claim(found: QuantizedWeight, claim: Claim | None) -> None:
    """Bits and groups of a matrix are among those that config.json names."""
    if claim is None or not isinstance(found, CodedMatrix) or not claim.forms:
        return
    own = (found.bits, found.groupsize)
    said = [(bits, None if size == found.shape[1] else size) for bits, size in claim.forms]
    if own not in said:
        forms = " or ".join(f"int{bits} {f'in groups of {size}' if size else 'per row'}" for bits, size in said)
        raise MisfitError(f"{found.name}: its tensors are {found.described}, config.json says {forms}")
    if claim.is_asymmetric and compressed_tensors.ZERO_POINT not in {_last(part.name) for part in found.parts}:
        raise MisfitError(f"{found.name}: config.json says symmetric: false, and there is no weight_zero_point")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
