"""Experts as integer products want them: every matrix transposed, its scales too, whatever the blocks it is read in."""

import numpy as np
import pytest

from gemma_deploy.artifact.weights import _rows_of
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.params import build_plan, write_params
from gemma_deploy.schemes import CodeForm, Codes, Storage
from gemma_deploy.testing import TINY_EXPERTS, write_tiny_checkpoint

UP = "model.layers.1.experts.gate_up_proj"
STORED = {(8, None): ("int8", (8, 192)), (8, 32): ("int8", (8, 2, 192)), (4, 32): ("uint4", (8, 2, 192))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("c"), "gemma4_text", **TINY_EXPERTS))


def written(checkpoint, folder, codes, form, block_bytes):
    """The file's rows by name, and the file."""
    folder.mkdir()
    plan = build_plan(checkpoint.config, "w8a16", 32, storage=Storage(Codes(*codes)), form=form)
    table = write_params(checkpoint, plan, folder / "p", journal=folder / "j", block_bytes=block_bytes)
    return {row.name: row for row in table.rows}, folder / "p"


def matrices(rows, file, name):
    """[experts, rows, columns] as they were before, with a form that does not turn them."""
    row = rows[name]
    count = row.shape[0] * row.shape[1]
    flat = _rows_of(file, row, 0, count, transposed=False, dimensions=len(row.shape) - 1)
    return flat.reshape(row.shape)


@pytest.mark.parametrize("codes", STORED)
def test_they_are_the_others_transposed(tmp_path, checkpoint, codes):
    plain, file = written(checkpoint, tmp_path / "plain", codes, CodeForm(unsigned=True), 1 << 20)
    form = CodeForm(unsigned=True, experts_transposed=True)
    rows, turned = written(checkpoint, tmp_path / "turned", codes, form, 1 << 20)
    _, small = written(checkpoint, tmp_path / "small", codes, form, 50 * 128)  # 50 rows: some of two experts
    assert turned.read_bytes() == small.read_bytes()
    dtype, scales = STORED[codes]
    assert (rows[UP].dtype, rows[UP].shape) == (dtype, (8, 64, 192))
    assert rows[f"{UP}.scale"].shape == scales
    for name in (UP, f"{UP}.scale"):
        right, found = matrices(plain, file, name), matrices(rows, turned, name)
        if right.shape != found.shape:
            found = found.swapaxes(1, 2)
        np.testing.assert_array_equal(found, right)
    others = [name for name in rows if ".experts." not in name]
    assert [rows[name].sha256 for name in others] == [plain[name].sha256 for name in others]


@pytest.mark.parametrize("codes", STORED)
@pytest.mark.parametrize("span", [(0, 8 * 192), (100, 500), (191, 193), (384, 390)])
def test_rows_are_read_back_across_experts(tmp_path, checkpoint, codes, span):
    rows, file = written(
        checkpoint, tmp_path / "x", codes, CodeForm(unsigned=True, experts_transposed=True), block_bytes=1 << 20
    )
    whole = matrices(rows, file, UP).swapaxes(1, 2).reshape(-1, 64)
    found = _rows_of(file, rows[UP], *span, transposed=True, dimensions=2)
    np.testing.assert_array_equal(found, whole[slice(*span)])
    scale = rows[f"{UP}.scale"]
    if len(scale.shape) == 3:
        whole = matrices(rows, file, f"{UP}.scale").swapaxes(1, 2).reshape(-1, 2)
        found = _rows_of(file, scale, *span, transposed=True, dimensions=2)
        np.testing.assert_array_equal(found, whole[slice(*span)])
