"""How fast a choice may be: a roofline of bytes over bandwidth and operations over rates, and measured shares of both.

A step takes the longer of the time in which its bytes are read and that in which its operations are done, and a little
for every layer besides. What share of a device's rates a back end reaches was measured; where it was not, the share is
1 and the figure a bound that no program exceeds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemma_deploy.bench.memory import bytes_read
from gemma_deploy.job import Job
from gemma_deploy.planning import PRECISIONS
from gemma_deploy.planning.choices import Choice, Wanted
from gemma_deploy.planning.device import CPU, Device
from gemma_deploy.planning.sizes import FLOAT, part_plans, step_bytes, work_of

GIGA, TERA = 1e9, 1e12
CODES, WHOLE_CODES, INT4 = "codes", "codes with activations of 8 bits", "4-bit codes"
HALVES, FLOATS = "floats of 16 bits", "float32"


@dataclass(frozen=True)
class Shares:
    """What one back end reaches of a device's rates.

    Args:
        bandwidth: of it, while decoding, by what is multiplied.
        layer_s: seconds of a step for every layer, whatever its size, in one thread.
        layer_rate: operations a second of float32 where that was measured, of a back end whose threads share that work
            too; None: one thread does it.
        products: of the rate of products, by what is multiplied; attention: of the rate of float32.
        channel: operations at that rate for each number that matrices read or make: norms, rounding, activations.
        where: they were measured.
    """

    bandwidth: dict[str, float]
    layer_s: float
    products: dict[str, float]
    attention: float
    channel: float
    where: str
    layer_rate: float | None = None

    def layer_seconds(self, floats: float) -> float:
        """Of a step for every layer, where float32 has so many operations a second."""
        return self.layer_s if self.layer_rate is None else self.layer_s * self.layer_rate / floats


WHOLE = dict.fromkeys((CODES, WHOLE_CODES, INT4, HALVES, FLOATS), 1.0)
BOUND = Shares(WHOLE, 0.0, WHOLE, 1.0, 0.0, "")
ON_TWO_CORES = "docs/plan.md, Shares: two cores of an AMD EPYC with AVX-512 and VNNI"
ONE_THREAD = 0.123 * TERA  # float32 of the thread that shares were measured with
# (back end, kind of device) -> shares.
MEASURED: dict[tuple[str, str], Shares] = {
    ("native", CPU): Shares(
        bandwidth={**WHOLE, INT4: 0.85},
        layer_s=1.4e-4,
        products={CODES: 0.8, WHOLE_CODES: 1.15, INT4: 0.69, HALVES: 1.04, FLOATS: 0.91},
        attention=2.3,
        channel=70.0,
        where=ON_TWO_CORES,
        layer_rate=ONE_THREAD,
    ),
    ("onnxruntime", CPU): Shares(
        bandwidth={CODES: 0.73, WHOLE_CODES: 0.73, INT4: 0.9, HALVES: 0.94, FLOATS: 0.94},
        layer_s=2.5e-4,
        products={CODES: 0.54, WHOLE_CODES: 0.74, INT4: 0.43, HALVES: 1.67, FLOATS: 1.67},
        attention=1.26,
        channel=0.0,
        where=ON_TWO_CORES,
    ),
    ("openvino", CPU): Shares(
        bandwidth={CODES: 0.62, WHOLE_CODES: 0.62, INT4: 0.71, HALVES: 1.04, FLOATS: 2.08},
        layer_s=4.3e-4,
        products={CODES: 0.56, WHOLE_CODES: 0.56, INT4: 0.61, HALVES: 3.2, FLOATS: 2.66},
        attention=4.1,
        channel=0.0,
        where=ON_TWO_CORES,
    ),
    ("tvm_vacc", CPU): Shares(
        bandwidth={CODES: 0.56, WHOLE_CODES: 0.56, INT4: 0.56, HALVES: 0.82, FLOATS: 0.82},
        layer_s=2.5e-4,
        products={CODES: 0.44, WHOLE_CODES: 0.44, INT4: 0.35, HALVES: 1.59, FLOATS: 1.59},
        attention=1.26,
        channel=0.0,
        where=ON_TWO_CORES,
    ),
}


@dataclass(frozen=True)
class Speed:
    """Predicted; None where the device file lacks a number that it takes.

    Args:
        prefill_tok_s: of one prompt; decode_tok_s: of all sequences together.
        is_bound: no share was measured: a figure that is not exceeded.
        where: shares were measured.
    """

    prefill_tok_s: float | None
    decode_tok_s: float | None
    is_bound: bool
    where: str


def kind_of(precision: str) -> str:
    """What is multiplied: one of the keys of `Shares.products`."""
    if PRECISIONS[precision][0] != "int8":
        return FLOATS if precision == "fp32" else HALVES
    return WHOLE_CODES if precision.startswith("w8a8") else INT4 if precision.startswith("w4") else CODES


def rate_of(device: Device, precision: str) -> float | None:
    """Operations a second of products at a precision: those of integers only where activations are integers too.

    On a CPU the kernels of all back ends round what meets codes, so that all codes are multiplied as integers.
    """
    if precision == "fp32":
        found = device.fp32_tflops
    elif precision.startswith("w8a8") or (device.kind == CPU and PRECISIONS[precision][0] == "int8"):
        found = device.int8_tops
    else:
        found = device.fp16_tflops
    return None if found is None else found * TERA


def speed_of(job: Job, choice: Choice, wanted: Wanted, *, device: Device) -> Speed:
    """Of a prompt of `wanted.prompt` tokens, and of steps in the middle of what is left of the context."""
    shares = MEASURED.get((choice.backend, device.kind), BOUND)
    after = wanted.prompt + (wanted.context - wanted.prompt) // 2
    prefill = _seconds(job, choice, wanted, device, shares, tokens=wanted.prompt, after=0)
    step = _seconds(job, choice, wanted, device, shares, tokens=1, after=after)
    return Speed(
        None if prefill is None else wanted.prompt / prefill,
        None if step is None else wanted.batch / step,
        shares is BOUND,
        shares.where,
    )


def _seconds(
    job: Job, choice: Choice, wanted: Wanted, device: Device, shares: Shares, *, tokens: int, after: int
) -> float | None:
    """One prompt of one sequence, or one step of all, through all stages one after the other.

    Args:
        tokens: new ones of a sequence; after: those before them.
    """
    products, floats = rate_of(device, choice.precision), _floats(device)
    if device.bandwidth_gb_s is None or products is None or floats is None:
        return None
    kind = kind_of(choice.precision)
    reading, rate = device.bandwidth_gb_s * GIGA * shares.bandwidth[kind], shares.products[kind]
    decodes = tokens == 1
    rows = wanted.batch if decodes else 1
    longest: dict[int, float] = {}  # of the ranks of a stage, by the layer it begins with
    for part, plan in part_plans(job, choice):
        work = work_of(job, part, plan, tokens=tokens, after=after)
        if decodes:
            read = step_bytes(job, part, plan, wanted=wanted, after=after)
        else:
            read = bytes_read(plan, job.config, rows=tokens)
        beside = work.attention / (floats * shares.attention) + work.channels * shares.channel / floats
        computing = rows * ((work.products + work.head) / (products * rate) + beside)
        took = max(read / reading, computing) + shares.layer_seconds(floats) * (part.span.stop - part.span.start)
        longest[part.span.start] = max(longest.get(part.span.start, 0.0), took)
    return sum(longest.values()) + _passing(job, choice, device, tokens * rows)


def _floats(device: Device) -> float | None:
    """Operations a second of attention, which is computed in floats."""
    found = device.fp32_tflops if device.kind == CPU else device.fp16_tflops
    return None if found is None else found * TERA


def _passing(job: Job, choice: Choice, device: Device, tokens: int) -> float:
    """Seconds that hidden states are on the way between devices; what a message takes to start is not in it."""
    if choice.devices == 1 or device.link_gb_s is None:
        return 0.0
    size = FLOAT if choice.precision == "fp32" else 2
    states = tokens * job.config.hidden_size * size
    added_up = 2 * job.config.num_hidden_layers * 2 * (choice.ranks - 1) / choice.ranks  # a ring, two sums a layer
    return states * (added_up + len(choice.points)) / (device.link_gb_s * GIGA)


def unmeasured(speeds: Iterable[Speed]) -> bool:
    """Whether any figure is a bound."""
    return any(speed.is_bound and speed.decode_tok_s is not None for speed in speeds)
