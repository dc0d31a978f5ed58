"""Panels: every element lies where src/layout.h says, padding is zero, and a file does not depend on how it is cut."""

import numpy as np
import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import panels
from gemma_deploy.params.plan import build_plan
from gemma_deploy.params.writer import write_params
from gemma_deploy.schemes import CodeForm, Codes, Storage
from gemma_deploy.testing import write_tiny_checkpoint


def place(dtype, columns, row, column):
    """Element of a panel's matrix, by the formula of layout.h: its index, and the half of the byte."""
    panel, lane = divmod(row, 16)
    if dtype == "uint8":
        return panel * 16 * columns + column // 4 * 64 + lane * 4 + column % 4, 0
    if dtype == "uint4":
        inside = column // 128 * 1024 + column % 64 // 4 * 64 + lane * 4 + column % 4
        return panel * 8 * columns + inside, column % 128 // 64
    if dtype == "bfloat16":
        return panel * 16 * columns + column // 2 * 32 + lane * 2 + column % 2, 0
    return panel * 16 * columns + column * 16 + lane, 0


@pytest.mark.parametrize("dtype", ["uint8", "uint4", "bfloat16", "float16", "float32"])
def test_every_element_has_its_place(dtype):
    shape = (37, 200)
    file = panels.padded(shape, dtype)
    assert file == (48, 256)
    generator = torch.Generator().manual_seed(0)
    if dtype.startswith("uint"):
        block = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    else:
        block = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    packed = panels.pack(block, dtype, file).reshape(-1)
    numbers = packed.double().numpy()
    for row in range(48):
        for column in range(0, 256, 3):
            index, half = place(dtype, 256, row, column)
            found = numbers[index]
            if dtype == "uint4":
                found = (int(found) >> 4 * half & 15) - 8
            elif dtype == "uint8":
                found -= 128
            inside = row < 37 and column < 200
            assert found == (float(block[row, column]) if inside else 0), (row, column)
    raw = packed.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else packed.numpy()
    back = panels.unpack(raw, dtype, 256)
    expected = block.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else block.numpy()
    np.testing.assert_array_equal(back[:37, :200], expected)


def test_scales_and_vectors():
    assert panels.padded((1,), "float32") == (16,)
    assert panels.padded_scales((37,), (37, 200), "uint8") == (48, 1)
    assert panels.padded_scales((37, 25), (37, 200), "uint8") == (48, 32)  # groups of 8, columns padded to 256
    assert panels.padded_scales((3, 16), (3, 16, 64), "uint8") == (48, 1)  # one a row of each expert


@pytest.mark.parametrize("storage", [Storage(), Storage(Codes(4, 32), Codes(8, 32))])
def test_the_file_does_not_depend_on_how_it_is_cut(tmp_path, storage):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "ck", "gemma4_text", num_hidden_layers=2))
    plan = build_plan(checkpoint.config, "w8a16", 64, storage=storage, form=CodeForm(unsigned=True, panels=True))
    assert {spec.nbytes % 64 for spec in plan} == {0}
    assert not any(name.endswith(".cos") for name in (spec.name for spec in plan))
    made = []
    for cut, workers in ((1, 1), (700, 2), (1 << 20, 3)):
        out = tmp_path / f"{cut}.safetensors"
        write_params(checkpoint, plan, out, journal=tmp_path / f"{cut}.journal", block_bytes=cut, workers=workers)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
