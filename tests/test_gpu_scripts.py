"""What is prepared for a GPU runs on a CPU, with a tiny model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "gpu"


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["patched", "stock"])
def test_finetune(model_class, tmp_path):
    file = tmp_path / "figures.json"
    options = ["--device", "cpu", "--tiny", "--model-class", model_class, "--json", file]
    done = subprocess.run([sys.executable, SCRIPTS / "finetune.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lora, qlora = json.loads(file.read_text())
    assert (lora["method"], qlora["method"]) == ("lora", "qlora")
    for one in (lora, qlora):
        assert one["relative_difference"] == 0  # a CPU's losses with a CPU's
        assert all(math.isfinite(loss) for loss in one["trained_losses"])
        assert one["trained_losses"][-1] < one["trained_losses"][0]
        assert one["tokens_per_s"] > 0
    assert lora["losses"] != qlora["losses"]
