#!/usr/bin/env bash
# AutoGPTQ packs a zero point of 0 so that those of the outputs behind it in the same word are lost.
#
# version   auto-gptq 0.7.1 (pack of its QuantLinear), torch 2.13.0, transformers 5.23.0, numpy 2.4.6.
# expected  The first version of the GPTQ format stores zero points less one: pack() of asymmetric codes, computed with by
#           the same class, gives the weights that went in, for every zero point from 0 to 15.
# seen      0 becomes -1, which as uint32 is 0xFFFFFFFF, and is put into its word with all bits: the zero points of up to
#           seven outputs behind it are 15 there as well, and forward adds one without a mask: all of them are 16. The
#           quantizer of the library gives 0 to every group without a negative weight. From 1 to 15 all is exact. Whoever
#           reads such a file cannot mend it; the second version of the format stores zero points as they are.
#
# Output:
#   zero points 1 2 3 4 5 6 7 8: computed with as 1 2 3 4 5 6 7 8
#   zero points 8 8 0 8 8 8 8 8: computed with as 8 8 16 16 16 16 16 16
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check --no-deps auto-gptq==0.7.1

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import importlib.util
import logging
import pathlib
import sys

logging.disable(logging.WARNING)  # that there is no CUDA extension
import torch

# The module alone: the package imports what a CPU has no use for.
site = pathlib.Path(torch.__file__).parent.parent
place = site / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
spec = importlib.util.spec_from_file_location("qlinear_cuda", place)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
COLUMNS = 32


def packed_and_read(zeros):
    """One group, scale 1: weights are codes less zero points. The first eight of 32 outputs, a word, are looked at."""
    zeros = torch.tensor(zeros + [8] * 24, dtype=torch.float32)[:, None]
    codes = torch.arange(32 * COLUMNS).reshape(32, COLUMNS) % 16
    linear = torch.nn.Linear(COLUMNS, 32, bias=False)
    linear.weight.data = codes - zeros
    layer = module.QuantLinear(4, COLUMNS, COLUMNS, 32, False, weight_dtype=torch.float32)
    layer.pack(linear, torch.ones(32, 1), zeros.clone())
    with torch.no_grad():
        weights = layer(torch.eye(COLUMNS)).T
    used = codes - weights
    if (used != used[:, :1]).any():
        sys.exit("CHANGED: the codes themselves are read as others")
    return used[:8, 0].int().tolist()


found = {}
for zeros in ([1, 2, 3, 4, 5, 6, 7, 8], [8, 8, 0, 8, 8, 8, 8, 8]):
    read = found[tuple(zeros)] = packed_and_read(zeros)
    print(f"zero points {' '.join(map(str, zeros))}: computed with as {' '.join(map(str, read))}")
right, wrong = found.values()
if right != [1, 2, 3, 4, 5, 6, 7, 8]:
    sys.exit("CHANGED: zero points that are not 0 are not what was packed")
if wrong != [8, 8, 16, 16, 16, 16, 16, 16]:
    sys.exit("CHANGED: a zero point of 0 leaves its neighbours alone")
PYTHON
