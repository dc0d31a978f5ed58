"""What a layer's experts cost on ONNX Runtime: those that are chosen, beside all of them.

usage: experts.py FOLDER [--form int8|int4] [--tokens 1 256 512] [--repeats 20] [--threads 2]

One layer of Gemma 4 26B-A4B (hidden 2816, 128 experts of width 704, 8 chosen) of random codes, in FOLDER, which gets a
file of up to 0.8 GB. The graph is the back end's own, of the experts alone: router, norms, the loop over chosen
experts. "all" is the same graph with 128 of 128 chosen. Told: milliseconds; those of all processors together, which
other work hardly changes where there is one thread; bytes of experts that are read; and how much memory the session has
of its own (RssAnon) and of the mapped file (RssFile).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gemma_deploy.architectures import LayerSpec
from gemma_deploy.backends.onnxruntime.experts import ExpertParts, expert_modules
from gemma_deploy.backends.onnxruntime.options import Kernels
from gemma_deploy.backends.onnxruntime.parts import IR_VERSION, OPSET
from gemma_deploy.checkpoint import ModelConfig
from gemma_deploy.names import EMBEDDING_WEIGHT, MICROSOFT, PARAMS
from gemma_deploy.runtime.session import open_graph
from gemma_deploy.testing import TINY_CONFIGS

SHAPE = {
    "hidden_size": 2816, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
}  # fmt: skip
GROUPS = {"int8": None, "int4": 32}
DTYPES = {"int8": "int8", "int4": "uint4"}


@dataclass(frozen=True)
class Row:
    """A tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def tensors(layer: LayerSpec, form: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape, as `compile` writes them."""
    experts, path = layer.experts, layer.prefix
    assert experts is not None
    found: dict[str, tuple[str, tuple[int, ...]]] = {EMBEDDING_WEIGHT: ("float32", (1, layer.hidden_size))}
    found |= {f"{path}{norm}.weight": ("float32", (layer.hidden_size,)) for norm in experts.norms}
    stacks = experts.stacks(layer.hidden_size)
    for name, shape in experts.tensors(layer.hidden_size).items():
        if name not in stacks:
            found[f"{path}{name}"] = "float32", shape
    for name, (count, rows, columns) in stacks.items():
        group = GROUPS[form]
        scales = (count, rows) if group is None else (count, columns // group, rows)
        found |= {f"{path}{name}": (DTYPES[form], (count, columns, rows)), f"{path}{name}.scale": ("float32", scales)}
    return found


def write(folder: Path, layer: LayerSpec, form: str) -> list[Row]:
    """The file, unless it is there, and its rows."""
    rows, at = [], 0
    for name, (dtype, shape) in tensors(layer, form).items():
        size = int(np.prod(shape)) * {"float32": 32, "int8": 8, "uint4": 4}[dtype] // 8
        rows.append(Row(name, dtype, shape, at, size))
        at += size + -size % 64
    file, rng = folder / PARAMS, np.random.default_rng(0)
    if file.is_file() and file.stat().st_size == at:
        return rows
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        for row in rows:
            stream.seek(row.offset)
            for start in range(0, row.nbytes, 1 << 26):
                count = min(1 << 26, row.nbytes - start)
                floats = rng.uniform(0.5, 1.5, count // 4).astype(np.float32) * 0.02
                stream.write(floats.tobytes() if row.dtype == "float32" else rng.bytes(count))
        stream.truncate(at)
    return rows


def graph(config: ModelConfig, rows: list[Row], chosen: int) -> ir.Model:
    """residual, dense -> out."""
    layer = config.layers[0]
    assert layer.experts is not None
    layer = replace(layer, experts=replace(layer.experts, chosen=chosen))
    parts = ExpertParts(config, Kernels(in_14_bits=expert_modules(layer)), rows, location=PARAMS, embed_scale=1.0)
    shape, kind = ir.Shape((1, "sequence", layer.hidden_size)), ir.TensorType(ir.DataType.FLOAT)
    dense, residual = (ir.Value(name=name, shape=shape, type=kind) for name in ("dense", "residual"))
    out = parts._beside_experts(layer, dense=dense, residual=residual)
    out.type = kind
    nodes = parts.nodes
    made = ir.Graph([dense, residual], [out], nodes=nodes.nodes, initializers=list(nodes.initializers.values()),
                    opset_imports={"": OPSET, MICROSOFT: 1}, name="experts")  # fmt: skip
    return ir.Model(made, ir_version=IR_VERSION)


def memory() -> dict[str, int]:
    """MiB of this process: its own, and pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) >> 10 for name in ("RssAnon", "RssFile")}


def measured(session: Any, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds, median and least, and the least of all processors; of other tokens every time, as are experts."""
    rng, times, busy = np.random.default_rng(1), [], []
    for turn in range(repeats + 1):
        x = rng.standard_normal((1, tokens, SHAPE["hidden_size"])).astype(np.float32)
        started, before = time.perf_counter(), time.process_time()
        session.run(None, {"dense": x, "residual": x})
        if turn:
            times.append(1e3 * (time.perf_counter() - started))
            busy.append(1e3 * (time.process_time() - before))
    return round(statistics.median(times), 2), round(min(times), 2), round(min(busy), 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=tuple(GROUPS), default="int8")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256, 512])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = ModelConfig.from_dict({**TINY_CONFIGS["gemma4_text"], **SHAPE}, "config.json")
    rows = write(args.folder / args.form, config.layers[0], args.form)
    modules = expert_modules(config.layers[0])
    of_experts = sum(row.nbytes for row in rows if row.name.removesuffix(".scale") in modules)
    for which, chosen in (("chosen", SHAPE["top_k_experts"]), ("all", SHAPE["num_experts"])):
        before = memory()
        session = open_graph(graph(config, rows, chosen), args.folder.resolve() / args.form, threads=args.threads)
        for tokens in args.tokens if which == "chosen" else args.tokens[:1]:
            median, least, busy = measured(session, tokens, args.repeats if tokens == 1 else 3)
            held = {name: value - before[name] for name, value in memory().items()}
            found = {"form": args.form, "experts": which, "tokens": tokens, "median_ms": median, "least_ms": least,
                     "least_cpu_ms": busy}  # fmt: skip
            if tokens == 1:
                found["read_mb"] = round(of_experts * chosen / SHAPE["num_experts"] / 1e6, 1)
            print("RESULT " + json.dumps(found | {f"{name}_mib": value for name, value in held.items()}))


if __name__ == "__main__":
    main()
