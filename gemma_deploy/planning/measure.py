"""This machine as a device: memory from the system, rates measured in some seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from gemma_deploy import child
from gemma_deploy.bench.figures import processor
from gemma_deploy.bench.memory import bandwidth_bytes_s
from gemma_deploy.errors import DeployError
from gemma_deploy.machine import Machine, total_bytes, usable_cpus
from gemma_deploy.planning.device import CPU, Device

BACKENDS = [
    "gguf",
    "native",
    "onnxruntime",
    "openvino",
    "tvm",
    "tvm_vacc",
    "vllm",
]  # that run on a CPU; tvm_vacc's graphs in ONNX Runtime
BUSY = "measured while other programs ran: rates are too low; measure again when the machine is quiet"


def measure_machine(machine: Machine, say: Callable[[str], None] = lambda line: None) -> Device:
    """A device file's numbers of this machine.

    Args:
        machine: its cores and load; say: told what begins.

    Raises:
        DeployError: a measuring process ended without an answer.
    """
    cpus = usable_cpus()
    say("products of matrices")
    rates = product_rates(cpus)
    say("memory bandwidth")
    bandwidth = bandwidth_bytes_s(cpus)
    where = f"measured {time.strftime('%Y-%m-%d')}, {cpus} thread{'s' if cpus > 1 else ''}"
    if machine.is_busy:
        where += f"; load average {machine.load:.1f}: {BUSY}"
    numbers = {name: None if rate is None else _rounded(rate / 1e12) for name, rate in rates.items()}
    sources = {
        "memory_gb": "what the system says there is, or a limit of this process",
        "usable": "chosen: the rest is the system's",
        "bandwidth_gb_s": f"{where}: the best of twelve looks at 1 GiB (NumPy)",
        "int8_tops": f"{where}: the library's products of codes with activations of 8 bits",
        "fp16_tflops": f"{where}: the library's products with bfloat16, which are widened",
        "fp32_tflops": f"{where}: NumPy",
    }
    return Device(
        name="this machine",
        what=f"{cpus} core{'s' if cpus > 1 else ''} of {processor() or 'an unnamed processor'}",
        kind=CPU,
        memory_gb=_rounded(total_bytes() / 1e9),
        usable=0.9,
        bandwidth_gb_s=_rounded(bandwidth / 1e9),
        int8_tops=numbers["int8"],
        fp16_tflops=numbers["fp16"] or numbers["fp32"],
        fp32_tflops=numbers["fp32"],
        backends=BACKENDS,
        sources=sources,
    )


def product_rates(threads: int) -> dict[str, float | None]:
    """Operations a second of products of matrices (rates.py), in a process of its own.

    Raises:
        DeployError: the process ended without an answer.
    """
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    arguments = "-m", "gemma_deploy.planning.rates", str(threads)
    done = child.run(*arguments, variables=variables, capture_output=True, text=True)
    if done.returncode:
        raise DeployError(
            "the rates of products could not be measured",
            problems=done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"],
            next_step="free 256 MiB of memory and try again, or name a device file: --device",
        )
    found: dict[str, float | None] = json.loads(done.stdout)
    return found


def _rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
