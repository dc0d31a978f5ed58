"""The child that compiles: two graphs on its standard input, a library on its standard output.

It is a process of its own, so that TVM and LLVM end with it, and a crash of either is an error here.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_deploy import child
from gemma_deploy.errors import DeployError


@dataclass(frozen=True)
class Task:
    """What is compiled.

    Args:
        graphs: by name, as they lie in the artifact; triple, cpu: of LLVM; file: the name of what is made.
    """

    graphs: Mapping[str, bytes]
    triple: str
    cpu: str
    file: str


def compile_here(task: Task) -> bytes:
    """The library, or its object files in a tar.

    Raises:
        DeployError: an operator is not known, or nothing links.
    """
    import onnx
    import onnx_ir as ir
    import tvm
    from tvm import relax

    from gemma_deploy.backends.tvm.lower import Lowering
    from gemma_deploy.backends.tvm.schedules import pipeline
    from gemma_deploy.backends.tvm.target import llvm_target

    builder = relax.BlockBuilder()
    for name, graph in task.graphs.items():
        Lowering(builder, name, ir.from_proto(onnx.load_model_from_string(graph))).build()
    target = tvm.target.Target(llvm_target(task.triple, task.cpu))
    with target:
        made = tvm.compile(builder.finalize(), target=target, relax_pipeline=pipeline(target))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / task.file
        made.export_library(str(file))
        return file.read_bytes()


def main() -> None:
    """Read a task, answer with bytes or with the error that stands for them, and the peak RSS in bytes."""
    from gemma_deploy.machine import peak_rss_bytes

    with child.answering() as out:
        answer: bytes | DeployError
        try:
            answer = compile_here(pickle.load(sys.stdin.buffer))
        except DeployError as error:
            answer = error
        out.write(pickle.dumps((answer, peak_rss_bytes())))


if __name__ == "__main__":
    main()
