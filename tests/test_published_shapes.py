"""Published shapes, their weights nothing but holes, compile within a memory that does not grow with the model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
pytestmark = [pytest.mark.real]
INT4 = ", quantize: {type: w4a16_rtn}"  # of the recipe's frontend, beside its shape
SHAPES = [  # shape, back end, what else the recipe says, GiB of disk, most GiB of memory
    ("gemma-4-12b", "tvm_vacc", "", 14, 1.2),
    ("gemma-4-31b", "tvm_vacc", "", 34, 1.2),
    ("gemma-4-26b-a4b", "tvm_vacc", INT4, 18, 1.2),
    ("gemma-4-e2b", "onnxruntime", "", 6, 1.0),
    ("gemma-4-e4b", "onnxruntime", "", 10, 1.0),
    ("gemma-4-e2b", "tvm_vacc", "", 6, 1.0),
    ("gemma-3n-e2b", "onnxruntime", "", 6, 1.0),
    ("gemma-3n-e4b", "onnxruntime", "", 9, 1.0),
    ("gemma-3n-e2b", "tvm_vacc", "", 6, 1.0),
    ("embedding-gemma-2", "onnxruntime", "", 2, 1.0),
    ("embedding-gemma-2", "tvm_vacc", "", 2, 1.0),
]


@pytest.mark.parametrize(
    ("shape", "backend", "more", "disk", "memory"), SHAPES, ids=["-".join(row[:2]) for row in SHAPES]
)
def test_it_compiles_to_codes_in_bounded_memory(shape, backend, more, disk, memory, tmp_path):
    if shutil.disk_usage(tmp_path).free < disk * GIB:
        pytest.skip(f"needs {disk} GiB of disk")
    checkpoint, environment = tmp_path / "ck", os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_checkpoint.py", shape, checkpoint, "--zeros"],
        check=True,
        env=environment,
    )
    (tmp_path / "recipe.yaml").write_text(
        f"name: shape\nfrontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[1024], [2048]]}}{more}}}\n"
        f"backend: {{type: {backend}, dtype: int8}}\nworkspace: {{path: {tmp_path}}}\n"
    )
    command = [sys.executable, "-m", "gemma_deploy.cli", "compile", tmp_path / "recipe.yaml", "--no-parity"]
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss << 10 <= memory * GIB
    assert (tmp_path / "shape" / "manifest.json").is_file()
    shutil.rmtree(tmp_path / "shape")
