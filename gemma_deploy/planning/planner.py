"""A checkpoint and a device file become rows: what every back end and precision takes, and how fast it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.job import Job
from gemma_deploy.partition import division_problems, recommended_points
from gemma_deploy.planning import PRECISIONS
from gemma_deploy.planning.choices import LARGEST_KL, MEASURED_KL, Choice, Wanted, open_choice
from gemma_deploy.planning.device import GPU, Device
from gemma_deploy.planning.sizes import Sizes, sizes_of
from gemma_deploy.planning.speeds import Speed, speed_of

MOST_DEVICES = 64  # that are tried, to say how many a model would take
CPU_CODES = "onnxruntime"
DIVIDES = ("tvm_vacc", "vllm")  # back ends that divide a model among devices


@dataclass(frozen=True)
class Row:
    """A choice and what is known of it.

    Args:
        refused: why it is not built, a sentence; "" where it is.
        fits: on the devices that are there; None where nobody has said how much memory they have.
        kl: mean KL to float32 of the 270M, None where it was not measured; kl_where: it was.
    """

    choice: Choice
    refused: str = ""
    sizes: Sizes | None = None
    fits: bool | None = None
    speed: Speed | None = None
    kl: float | None = None
    kl_where: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        if self.sizes is not None:
            plain["sizes"]["total"] = self.sizes.total
        return {
            **plain,
            "choice": {**plain["choice"], "points": list(self.choice.points)},
            "devices": self.choice.devices,
        }


@dataclass(frozen=True)
class Plan:
    """All rows for one device.

    Args:
        proposed: the one to start with, None where none fits.
    """

    checkpoint: Checkpoint
    device: Device
    wanted: Wanted
    rows: tuple[Row, ...]
    proposed: Row | None


def make_plan(
    checkpoint: Checkpoint,
    device: Device,
    wanted: Wanted,
    *,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
) -> Plan:
    """Every precision of every back end of a device. No weight is read.

    Args:
        backends: those to look at; all of the device's by default; precisions: likewise, all of `PRECISIONS`.
    """
    rows = tuple(
        _row(checkpoint, device, wanted, Choice(backend, precision))
        for backend in backends or device.backends
        for precision in precisions or PRECISIONS
    )
    return Plan(checkpoint, device, wanted, rows, propose(rows))


def _row(checkpoint: Checkpoint, device: Device, wanted: Wanted, choice: Choice) -> Row:
    job = open_choice(checkpoint, choice, wanted)
    if device.kind == GPU and choice.backend == CPU_CODES and PRECISIONS[choice.precision][0] == "int8":
        return Row(choice, refused="its kernels of codes are a CPU's: take floats, or vllm")
    if isinstance(job, str):
        return Row(choice, refused=job)
    placed, divided, sizes = _placed(job, checkpoint, device, wanted, choice)
    room = device.room_bytes
    fits = None if room is None else sizes.total <= room and placed.devices <= device.count
    kl, where = MEASURED_KL.get((choice.backend, choice.precision), (None, ""))
    return Row(placed, "", sizes, fits, speed_of(divided, placed, wanted, device=device), kl, where)


def _placed(
    job: Job, checkpoint: Checkpoint, device: Device, wanted: Wanted, choice: Choice
) -> tuple[Choice, Job, Sizes]:
    """The division with the fewest devices that fits; the one with the most where none does.

    Where memory is unknown all devices of the file are taken.
    """
    room, best = device.room_bytes, (choice, job, sizes_of(job, choice, wanted, kind=device.kind))
    if choice.backend not in DIVIDES or (room is not None and best[2].total <= room):
        return best
    fewest = 2 if room is None else max(2, math.ceil((best[2].all_weights + best[2].cache) / room))
    for devices in range(fewest, MOST_DEVICES + 1) if room is not None else (device.count,):
        for divided in divisions(job, choice, devices):
            opened = open_choice(checkpoint, divided, wanted) if divided.in_recipe else job
            if isinstance(opened, str):
                continue
            sizes = sizes_of(opened, divided, wanted, kind=device.kind)
            if room is None or sizes.total <= room:
                return divided, opened, sizes
            best = min(best, (divided, opened, sizes), key=lambda one: one[2].total)
    return best


def divisions(job: Job, choice: Choice, devices: int) -> Iterator[Choice]:
    """Ways to use so many devices: all of them for every layer, else layers cut into stages.

    Stages have equal bytes, as far as they can; those that an engine cuts itself have equal numbers of layers.
    """
    layers = job.config.num_hidden_layers
    if not division_problems(job.config, (), devices, align_qkv=True):
        yield replace(choice, ranks=devices)
    if devices <= layers and not choice.in_recipe:
        yield replace(choice, points=tuple(layers * stage // devices for stage in range(1, devices)))
    elif devices <= layers:
        sizes = {spec.name: spec.nbytes for plan in job.plans for spec in plan}
        yield replace(choice, points=recommended_points(job.config, devices, sizes))


def propose(rows: Sequence[Row]) -> Row | None:
    """What to start with.

    Of what fits (or may, where memory is unknown) the fewest devices; of these what loses little, measured, before what
    was not measured and what loses more; of these measured speeds before bounds, the fastest, and the smallest.
    """
    built = [row for row in rows if not row.refused and row.fits is not False]

    def order(row: Row) -> tuple[int, int, float, bool, float, int]:
        lossless = row.choice.precision in ("fp32", "bf16", "fp16")
        loss = 0 if lossless or (row.kl is not None and row.kl <= LARGEST_KL) else 1 if row.kl is None else 2
        speed = row.speed.decode_tok_s if row.speed is not None else None
        is_bound = row.speed is None or row.speed.is_bound
        size = 0 if row.sizes is None else row.sizes.total
        return row.choice.devices, loss, (row.kl or 0.0) if loss == 2 else 0.0, is_bound, -(speed or 0.0), size

    return min(built, key=order, default=None)
