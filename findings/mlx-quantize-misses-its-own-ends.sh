#!/usr/bin/env bash
# mlx.core.quantize does not compute the formula that its documentation gives: the smallest or largest weight of a
# group may be off by more than half a step.
#
# version   mlx 0.32.4 (CPU, Linux), numpy 2.4.6.
# expected  quantize's text for mode affine: s = (max - min) / (2**bits - 1), code = round((w - min) / s), so that
#           both ends of a group are exact and nothing is off by more than s / 2. A group of -1 and 1 alone is exact
#           in any width.
# seen      The scale is changed so that zero is a code, and what then lies outside the codes is cut off: a group of
#           -1 and 1 in 2 bits comes back as -0.5 and 1, and in random groups an end is off by up to 0.96 of a step
#           (0.75 in 2 bits). Groups of one sign keep nearly to the text. Who checks weights against half a step finds
#           mlx's out of bounds.
#
# Output:
#   group of -1 and 1, 2 bits: comes back as [-0.5, 1.0]
#   2 bits, largest error: 0.75 of a step; groups of one sign: 0.56
#   3 bits, largest error: 0.87 of a step; groups of one sign: 0.52
#   4 bits, largest error: 0.93 of a step; groups of one sign: 0.51
#   5 bits, largest error: 0.96 of a step; groups of one sign: 0.50
#   6 bits, largest error: 0.96 of a step; groups of one sign: 0.50
#   8 bits, largest error: 0.95 of a step; groups of one sign: 0.50
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    'mlx[cpu]==0.32.4' numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import sys

import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
GROUP = 32
rng = np.random.default_rng(0)


def back(w, bits):
    return np.array(mx.dequantize(*mx.quantize(mx.array(w), group_size=GROUP, bits=bits), group_size=GROUP, bits=bits))


def steps_off(w, bits):
    """The largest error in steps of the formula, over all groups."""
    groups = w.reshape(-1, GROUP)
    step = (groups.max(1) - groups.min(1)) / (2**bits - 1)
    return float((np.abs(back(w, bits).reshape(-1, GROUP) - groups) / step[:, None]).max())


two = np.tile(np.float32([-1, 1]), (1, GROUP // 2))
print("group of -1 and 1, 2 bits: comes back as", sorted({float(value) for value in back(two, 2)[0]}))
w = rng.standard_normal((64, 128)).astype(np.float32)
off = {}
for bits in (2, 3, 4, 5, 6, 8):
    off[bits] = steps_off(w, bits)
    print(f"{bits} bits, largest error: {off[bits]:.2f} of a step; groups of one sign: {steps_off(np.abs(w) + 1, bits):.2f}")
if sorted({float(value) for value in back(two, 2)[0]}) != [-0.5, 1.0] or min(off[2], off[8]) < 0.6:
    sys.exit("CHANGED: quantize follows its text")
PYTHON
