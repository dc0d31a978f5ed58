"""Codes and scales of a checkpoint that go into an artifact as they are, and those that cannot.

An artifact takes a matrix over where its own form holds the same numbers: codes of as many bits or more, a scale for
each row, or for groups that divide the checkpoint's. Everything else is dequantized, once, and treated as floats.
Calibrated schemes choose codes themselves and take nothing over.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemma_deploy.checkpoint import Checkpoint, TensorInfo, WeightSource
from gemma_deploy.checkpoint.expected import never_coded
from gemma_deploy.checkpoint.quantized.matrix import CodedMatrix, QuantizedWeight
from gemma_deploy.schemes import KEPT_W8, TABLES, Codes, Scheme, Storage

CHOSEN = "the scheme chooses codes of its own"
FLOATS = "the scheme stores floats"
ENCODER = "codes of an encoder are not taken over in this version"
GROUPS = (128, 64, 32)  # that both back ends have kernels for


def verdicts(checkpoint: Checkpoint, scheme: Scheme, storage: Storage) -> dict[str, str | None]:
    """Matrix that arrives quantized -> None where it is taken over, else why it is dequantized."""
    found: dict[str, str | None] = {}
    floats = never_coded(checkpoint.config)
    for name, weight in checkpoint.quantized.items():
        form = storage.of(name.removesuffix(".weight"))
        if checkpoint.config.architecture.encoder:
            found[name] = ENCODER
        elif not scheme.codes or form is None or name in floats:
            found[name] = FLOATS
        elif scheme.calibrated:
            found[name] = CHOSEN
        else:
            found[name] = weight.why_not(form)
    return found


def taken_over(checkpoint: Checkpoint, scheme: Scheme, storage: Storage) -> dict[str, Codes]:
    """Matrices whose codes and scales an artifact takes, and the form in which it has them."""
    forms = {name: storage.of(name.removesuffix(".weight")) for name in checkpoint.quantized}
    return {
        name: form
        for name, why in verdicts(checkpoint, scheme, storage).items()
        if why is None and (form := forms[name]) is not None
    }


def arrived(checkpoint: Checkpoint, scheme: Scheme, storage: Storage) -> list[dict[str, Any]]:
    """What became of the matrices that arrived quantized, for the manifest: a row for each form and verdict."""
    counted = Counter(
        (checkpoint.quantized[name].described, why) for name, why in verdicts(checkpoint, scheme, storage).items()
    )
    return [
        {"form": form, "matrices": count, "taken_over": why is None, "why": why}
        for (form, why), count in counted.items()
    ]


def storage_like(
    quantized: Mapping[str, QuantizedWeight],
    storage: Storage,
    *,
    groups: bool,
    kept: bool,
    table: bool,
    channels: Sequence[int],
) -> Storage:
    """The storage that takes over as much of a checkpoint's codes as it can.

    Args:
        storage: what it is without them.
        groups, kept, table: whether the groups of linears, the kinds that keep 8 bits, and the table's form are free.
        channels: input channels of the linears, of one rank.
    """
    linears = {name: weight for name, weight in quantized.items() if ".layers." in name}
    if groups:
        storage = replace(storage, linears=replace(storage.linears, groupsize=_groups(linears, storage, channels)))
    if kept and storage.linears.bits == 4:
        storage = replace(storage, kept_w8=_kept(linears, storage))
    others = [weight for name, weight in quantized.items() if ".layers." not in name]
    if table and others and all(isinstance(weight, CodedMatrix) for weight in others):
        sizes = {weight.groupsize for weight in others if isinstance(weight, CodedMatrix)}
        name = next((f"int8_g{size}" for size in GROUPS if sizes == {size}), None)
        storage = replace(storage, table=TABLES[name]) if name else storage
    return storage


def _groups(linears: Mapping[str, QuantizedWeight], storage: Storage, channels: Sequence[int]) -> int | None:
    """The largest groups that divide those of all matrices; the scheme's own where there are none."""
    own = storage.linears.groupsize
    coded = [one for one in linears.values() if isinstance(one, CodedMatrix) and one.order() is None]
    sizes = {one.groupsize for one in coded if one.groupsize is not None}
    if not coded:
        return own
    if not sizes:
        return None
    fitting = [size for size in GROUPS if all(width % size == 0 for width in (*sizes, *channels))]
    return fitting[0] if fitting else own


def _kept(linears: Mapping[str, QuantizedWeight], storage: Storage) -> tuple[str, ...]:
    """Kinds that have 8 bits: those whose codes 4 do not hold, and the scheme's own where they are no codes of 4."""
    four, eight = storage.linears, replace(storage.linears, bits=8)
    wide: dict[str, bool] = {}
    for name, weight in linears.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        needs = weight.why_not(four) is not None
        wide[kind] = wide.get(kind, False) or (needs and weight.why_not(eight) is None)
    if not wide or all(wide.values()):
        return storage.kept_w8
    default = [kind for kind in storage.kept_w8 if kind in KEPT_W8 and kind not in wide]
    return tuple(dict.fromkeys([*default, *(kind for kind, needed in wide.items() if needed)]))


class TakenOver:
    """A `WeightSource` over another one, with codes and scales in the place of matrices that are taken over.

    Args:
        source: everything else, and what the codes dequantize to.
        quantized: the weights as they arrived; forms: those that are taken over, in the artifact's form.
    """

    def __init__(
        self, source: WeightSource, quantized: Mapping[str, QuantizedWeight], forms: Mapping[str, Codes]
    ) -> None:
        self.source, self.path, self.config = source, source.path, source.config
        self._forms = forms
        self._coded: dict[str, CodedMatrix] = {}
        self._scales: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = dict(source.tensors)
        for name, form in forms.items():
            weight = quantized[name]
            assert isinstance(weight, CodedMatrix)
            scales = f"{name.removesuffix('.weight')}.scale"
            shape = form.scale_shape(weight.shape)
            self._coded[name], self._scales[scales] = weight, name
            self.tensors[name] = replace(self.tensors[name], dtype="int8", nbytes=math.prod(weight.shape))
            self.tensors[scales] = TensorInfo(scales, shape, "float32", weight.file.path, 4 * math.prod(shape))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as float32."""
        return self.raw_rows(name, start, stop) if name in self._scales else self.source.rows(name, start, stop)

    def raw_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same rows as they are stored: codes int8, scales float32."""
        if name in self._coded:
            return self._coded[name].taken_codes(start, stop)
        if name in self._scales:
            matrix = self._scales[name]
            return self._coded[matrix].taken_scales(self._forms[matrix], start, stop)
        return self.source.raw_rows(name, start, stop)

    def weights_fingerprint(self) -> str:
        """Of the source and of what is taken over."""
        taken = " ".join(f"{name} {form}" for name, form in sorted(self._forms.items()))
        return hashlib.sha256(f"{self.source.weights_fingerprint()} {taken}".encode()).hexdigest()

    def embedding_scale(self) -> np.ndarray | None:
        """The source's."""
        return self.source.embedding_scale()
