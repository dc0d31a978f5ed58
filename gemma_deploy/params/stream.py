"""One tensor from the checkpoint to its place in the file: read a row block, check, convert, hash, write.

Blocks are small enough to stay in the processor's cache and all buffers are reused, so that memory stays flat. What is
written does not depend on the block size. Runs in worker threads; torch is imported when the first block comes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_deploy.checkpoint import WeightSource
from gemma_deploy.dtypes import BLOCK, BY_NAME
from gemma_deploy.params import blocks, panels
from gemma_deploy.params.constants import constant_rows
from gemma_deploy.params.plan import ParamSpec
from gemma_deploy.params.table import ParamRow
from gemma_deploy.quantization.rtn import quantize_rows_, row_scales, sqnr_db

if TYPE_CHECKING:
    import torch

READ_BYTES = 1 << 20
RAW_DTYPES = ("bfloat16", "float16", "float32")  # the others (GGUF blocks, float64) are read as float32


@dataclass(frozen=True)
class WriteJob:
    """What is made in one go: a tensor (int8: with its scale), and where each part goes."""

    name: str
    specs: tuple[ParamSpec, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the job writes."""
        return sum(spec.nbytes for spec in self.specs)


class BadTensorError(Exception):
    """A weight that cannot be stored; the message names tensor and row."""


class Buffers:
    """Scratch memory of one worker thread, grown to the largest block and reused."""

    def __init__(self) -> None:
        """Nothing is allocated yet."""
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor that is valid until the same use is taken again."""
        import torch

        count = math.prod(shape)
        flat = self._flat.get((use, dtype))
        if flat is None or flat.numel() < count:
            flat = self._flat[use, dtype] = torch.empty(count, dtype=dtype)
        return flat[:count].view(shape)


class Sink:
    """Writes one tensor front to back at its offset, hashing on the way; a transposed one when all of it is there."""

    def __init__(self, fd: int, spec: ParamSpec, offset: int, *, wrote: Callable[[int], None]) -> None:
        """Begin at `offset` of the open file `fd`."""
        self.fd, self.spec, self.offset, self.wrote = fd, spec, offset, wrote
        self.digest, self.done, self.transposed = hashlib.sha256(), 0, 0
        self.low = spec.nbytes // 2  # where the next bytes of the second plane go
        self.waiting: list[torch.Tensor] = []  # rows of a panel that is not full
        self.taken = 0  # numbers

    def write_rows(self, block: torch.Tensor, buffers: Buffers) -> None:
        """Append rows of the source [rows, columns], floats or signed codes; of a transposed tensor they are columns.

        A transposed tensor is written when all of it is there; of a stack of matrices each in turn.
        """
        if self.spec.panels is not None:
            self._write_panels(as_stored(block, self.spec))
            return
        if not self.spec.transposed:
            self.write(as_stored(block, self.spec))
            return
        columns, rows = self.spec.shape[-2:]
        while len(block):
            whole = buffers.take("transposed", (columns, rows), block.dtype)
            part, block = block[: rows - self.transposed], block[rows - self.transposed :]
            start, self.transposed = self.transposed, self.transposed + len(part)
            whole[:, start : self.transposed] = part.T
            if self.transposed == rows:
                self.write(as_stored(whole, self.spec))
                self.transposed = 0

    def _write_panels(self, block: torch.Tensor) -> None:
        """Append the panels that rows fill; those of the last panel when all are there."""
        import torch

        self.taken += block.numel()
        rows = torch.cat([*self.waiting, block]) if self.waiting else block
        full = len(rows) if self.taken == math.prod(self.spec.plain) else len(rows) // panels.ROWS * panels.ROWS
        self.waiting = [] if full == len(rows) else [rows[full:].clone()]
        if full and self.spec.planes and block.is_floating_point():
            self.write(panels.padded_rows(rows[:full], self.spec.shape))
        elif full and self.spec.planes:
            high, low = panels.pack_planes(rows[:full].contiguous(), self.spec.shape)
            self.write(high)
            self.low = self._put(low, self.low)
        elif full:
            self.write(panels.pack(rows[:full].contiguous(), self.spec.dtype, self.spec.shape))

    def write(self, block: torch.Tensor) -> None:
        """Append a contiguous block."""
        import torch

        self.digest.update(block.reshape(-1).view(torch.uint8).numpy().data)
        self.done = self._put(block, self.done)

    def _put(self, block: torch.Tensor, at: int) -> int:
        """Write a contiguous block `at` bytes behind the tensor's first: where it ends."""
        import torch

        data = block.reshape(-1).view(torch.uint8).numpy().data
        self.wrote(len(data))
        while data:
            count = os.pwrite(self.fd, data, self.offset + at)
            at, data = at + count, data[count:]
        return at

    def _hash_second_plane(self) -> None:
        """From the file, as it comes behind the first one there; a device that keeps nothing gives nothing."""
        while data := os.pread(self.fd, min(READ_BYTES, self.low - self.done), self.offset + self.done):
            self.digest.update(data)
            self.done += len(data)
        self.done = self.low

    def row(self, sqnr: float | None = None, energy: float | None = None) -> ParamRow:
        """The finished tensor's table row."""
        spec = self.spec
        if spec.planes and "int" in spec.dtype:
            self._hash_second_plane()
        assert self.done == spec.nbytes, f"{spec.name}: wrote {self.done} of {spec.nbytes} bytes"
        digest = self.digest.hexdigest()
        return ParamRow(spec.name, spec.dtype, spec.shape, self.offset, self.done, digest, spec.kind, sqnr, energy)


def run_job(
    job: WriteJob, source: WeightSource, fd: int, *, buffers: Buffers, block_bytes: int, wrote: Callable[[int], None]
) -> list[ParamRow]:
    """Write one job's tensors.

    Args:
        job: what to write.
        source: the checkpoint.
        fd: the file, open for writing.
        buffers: this thread's scratch memory.
        block_bytes: source bytes per row block; at least one row is taken.
        wrote: told the bytes of each block; may raise to stop the work.

    Raises:
        BadTensorError: a value is NaN, infinite, or too large for the dtype it goes to.
    """
    sinks = [Sink(fd, spec, offset, wrote=wrote) for spec, offset in zip(job.specs, job.offsets, strict=True)]
    spec = job.specs[0]
    if spec.kind == "constant":
        return [_write_constant(sinks[0], buffers, block_bytes)]
    if spec.kind in ("stored", "taken_over"):
        write = _write_stored_blocks if BY_NAME[spec.dtype].block else _write_stored
        return [write(sinks[0], source, buffers, block_bytes)]
    checked = _checked_blocks(source, spec, buffers, block_bytes)
    if spec.kind in ("int8_per_channel", "int4_per_group"):
        return _write_codes(sinks, checked, buffers)
    return [_write_cast(sinks[0], checked, buffers)]


def _write_constant(sink: Sink, buffers: Buffers, block_bytes: int) -> ParamRow:
    spec = sink.spec
    for start, stop in _spans(spec.plain[0], 4 * math.prod(spec.shape[1:]), block_bytes):
        sink.write_rows(_narrow(constant_rows(spec, start, stop), spec, buffers), buffers)
    return sink.row()


def _write_stored(sink: Sink, source: WeightSource, buffers: Buffers, block_bytes: int) -> ParamRow:
    import torch

    spec = sink.spec
    info = source.tensors[spec.source or spec.name]
    row_bytes = info.nbytes // info.shape[0]
    for start, stop in _row_spans(spec.rows or ((0, info.shape[0]),), row_bytes, block_bytes):
        block = torch.from_numpy(source.raw_rows(info.name, start, stop))
        if spec.kind == "taken_over" and block.is_floating_point() and not bool(block.isfinite().all()):
            raise BadTensorError(f"{info.name}: a scale in rows {start} to {stop - 1} is NaN or infinite")
        block = _columns(block, spec, buffers)
        sink.write_rows(block, buffers)
    return _row_of(sink)


def _row_of(sink: Sink) -> ParamRow:
    """Of what was quantized before."""
    error = sink.spec.output_error
    return sink.row(error.sqnr_db, float(f"{error.energy:.7g}")) if error else sink.row()


def _write_stored_blocks(sink: Sink, source: WeightSource, buffers: Buffers, block_bytes: int) -> ParamRow:
    """Codes and their scales, which the source has apart, together."""
    import torch

    spec = sink.spec
    name = spec.source or spec.name
    scales = f"{name.removesuffix('.weight')}.scale"
    rows, columns = spec.shape
    for start, stop in _spans(rows, columns, block_bytes):
        codes, chosen = (torch.from_numpy(source.raw_rows(one, start, stop)) for one in (name, scales))
        chosen = chosen.float()
        if not torch.equal(chosen, chosen.half().float()):
            raise BadTensorError(f"{scales}: a scale in rows {start} to {stop - 1} is no number of float16")
        sink.write(blocks.encode(codes, chosen, spec.dtype))
    return _row_of(sink)


def as_stored(block: torch.Tensor, spec: ParamSpec) -> torch.Tensor:
    """What the file has of a block: floats as they are, signed codes in the spec's form; of panels signed ones."""
    if spec.panels is not None:
        return block
    if BY_NAME[spec.dtype].packed:
        packed = pack_int4(block)
        return packed ^ 0x88 if spec.dtype == "uint4" else packed
    if spec.dtype == "uint8":
        import torch

        return block.contiguous().view(torch.uint8) ^ 0x80
    return block.contiguous()


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 [rows, columns] in [-8, 7] -> uint8 [rows, columns / 2], the first of a pair in the low half."""
    import torch

    pairs = codes.contiguous().view(torch.int16) & 0x0F0F  # of little-endian bytes: the first code is the low one
    return pairs.bitwise_or_(pairs >> 4).to(torch.uint8)


def _write_cast(sink: Sink, checked: Iterator[tuple[torch.Tensor, torch.Tensor]], buffers: Buffers) -> ParamRow:
    for block, _ in checked:
        if sink.spec.added:
            block = block.float() + sink.spec.added
        sink.write_rows(_narrow(_columns(block, sink.spec, buffers), sink.spec, buffers), buffers)
    return sink.row()


def _columns(block: torch.Tensor, spec: ParamSpec, buffers: Buffers) -> torch.Tensor:
    """The columns of the block that are written, contiguous."""
    if spec.columns is None:
        return block
    part = block[:, slice(*spec.columns)]
    return buffers.take("columns", tuple(part.shape), block.dtype).copy_(part)


def _write_codes(
    sinks: list[Sink], checked: Iterator[tuple[torch.Tensor, torch.Tensor]], buffers: Buffers
) -> list[ParamRow]:
    import torch

    from gemma_deploy.quantization.scales import SEARCHED_QMAX, as_dtype, choose_scales  # imports torch

    weight, scales = sinks[0], sinks[-1]  # one, where codes lie behind their scales
    kind = BY_NAME[weight.spec.dtype]
    qmax = (1 << (kind.bits - 1)) - 1
    # Of a row; each is quantized like a row.
    if kind.block:
        rows, groups = weight.spec.shape[0], weight.spec.shape[1] // BLOCK
    else:
        lies = scales.spec.plain
        groups = lies[-2] if scales.spec.transposed else math.prod(lies[len(weight.spec.plain) - 1 :])
        rows = math.prod(lies) // groups
    signal, error = torch.empty(rows).double(), torch.empty(rows).double()  # of each row, however blocks were cut
    start = 0
    for block, absmax in checked:
        part = slice(start, start := start + len(block))
        grouped = (len(block) * groups, block.shape[1] // groups)
        in_float32 = block if block.dtype == torch.float32 else buffers.take("wide", tuple(block.shape), torch.float32)
        in_float32.copy_(block)
        q = buffers.take("out", tuple(block.shape), torch.int8)
        scratch = buffers.take("scratch", grouped, torch.float32)
        if qmax > SEARCHED_QMAX:
            chosen = row_scales(absmax.float() if groups == 1 else in_float32.view(grouped).abs().amax(1))
        else:
            chosen = choose_scales(in_float32.view(grouped), qmax)[:, 0].contiguous()
        chosen = as_dtype(chosen, "float16" if kind.block else scales.spec.dtype)
        powers = quantize_rows_(in_float32.view(grouped), chosen, q.view(grouped), scratch=scratch, qmax=qmax)
        signal[part], error[part] = (power.view(-1, groups).sum(1) for power in powers)
        if kind.block:
            weight.write(blocks.encode(q, chosen.view(-1, groups), kind.name))
            continue
        apart = scales.spec.panels is not None or scales.spec.transposed
        chosen = _narrow(chosen, scales.spec, buffers)
        scales.write_rows(chosen.view(-1, groups) if apart else chosen, buffers)
        weight.write_rows(_columns(q, weight.spec, buffers), buffers)
    energy = float(signal.numpy().sum())
    sqnr = sqnr_db(energy, float(error.numpy().sum()))
    made = weight.row(None if sqnr is None else round(sqnr, 4), float(f"{energy:.7g}"))
    return [made] if kind.block else [made, scales.row()]


def _narrow(block: torch.Tensor, spec: ParamSpec, buffers: Buffers) -> torch.Tensor:
    """The block in the spec's dtype; through float32, which is exact and faster than 16 bit to 16 bit."""
    import torch

    target: torch.dtype = getattr(torch, spec.dtype)
    if block.dtype == target:
        return block
    if block.dtype != torch.float32 and target != torch.float32:
        block = buffers.take("wide", tuple(block.shape), torch.float32).copy_(block)
    return buffers.take("out", tuple(block.shape), target).copy_(block)


def _checked_blocks(
    source: WeightSource, spec: ParamSpec, buffers: Buffers, block_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks [rows, cols] as stored, with each row's largest magnitude [rows].

    Magnitudes are compared as integers: without its sign bit a float orders like an integer, with infinity and NaN
    above every number, so one fast pass finds the maximum and everything that is no number.
    """
    import torch

    name = spec.source or spec.name
    info = source.tensors[name]
    raw = info.dtype in RAW_DTYPES
    dtype: torch.dtype = getattr(torch, info.dtype) if raw else torch.float32
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    mask = torch.iinfo(integer).max
    finite = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(integer))
    floats = not ("int" in spec.dtype or BY_NAME[spec.dtype].block)
    largest = torch.finfo(getattr(torch, spec.dtype) if floats else torch.float32).max
    cols = math.prod(info.shape[1:])
    bad = _BadRows(name, spec.dtype, largest)
    for start, stop in _row_spans(spec.rows or ((0, info.shape[0]),), cols * dtype.itemsize, block_bytes):
        array = (source.raw_rows if raw else source.rows)(name, start, stop)
        block = torch.from_numpy(array).view(dtype).view(stop - start, cols)
        bits = buffers.take("bits", (stop - start, cols), integer)
        top = torch.bitwise_and(block.view(integer), mask, out=bits).amax(1)
        absmax = top.view(dtype)
        bad.look(start, top > finite, absmax.float())
        if not bad.count:
            yield block, absmax
    bad.refuse()


class _BadRows:
    """Rows with a value that cannot be stored: all are counted, the first is named."""

    def __init__(self, name: str, dtype: str, largest: float) -> None:
        self.name, self.dtype, self.largest = name, dtype, largest
        self.count, self.first = 0, ""

    def look(self, start: int, not_finite: torch.Tensor, absmax: torch.Tensor) -> None:
        wrong = not_finite.logical_or(absmax.float() > self.largest)
        count = int(wrong.sum())
        if count and not self.count:
            row = int(wrong.nonzero()[0])
            value = abs(float(absmax[row]))
            what = "NaN" if math.isnan(value) else "infinity" if math.isinf(value) else f"magnitude {value:g}"
            over = f", too large for {self.dtype} (at most {self.largest:g})" if math.isfinite(value) else ""
            self.first = f"{self.name}: row {start + row} holds {what}{over}"
        self.count += count

    def refuse(self) -> None:
        if self.count:
            raise BadTensorError(self.first + (f"; {self.count} rows are affected" if self.count > 1 else ""))


def _row_spans(blocks: Sequence[tuple[int, int]], row_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    for first, last in blocks:
        for start, stop in _spans(last - first, row_bytes, block_bytes):
            yield first + start, first + stop


def _spans(rows: int, row_bytes: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, block_bytes // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
