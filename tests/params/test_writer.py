import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from gemma_deploy.artifact.weights import ArtifactWeights
from gemma_deploy.checkpoint import TensorInfo
from gemma_deploy.errors import ParamsError
from gemma_deploy.params import ParamTable, build_plan, damaged_rows, finished_table, write_params
from gemma_deploy.params.quantized import OutputError
from gemma_deploy.provenance import Code
from gemma_deploy.schemes import CodeForm, Codes, Storage
from tests.manifests import manifest
from tests.params.make import patch_value, read_raw, tiny, to_bf16_bits, widen
from tests.quantization.test_rtn import numpy_rtn

TRANSPOSED = "w8a16 turned"
SCHEMES = ("fp32", "fp16", "bf16", "w8a16", TRANSPOSED)


def planned(checkpoint, scheme, context=48):
    scheme, _, transposed = scheme.partition(" ")
    return build_plan(checkpoint.config, scheme, context, form=CodeForm(transposed=bool(transposed)))


def write(checkpoint, directory, scheme, *, context=48, **options):
    plan = planned(checkpoint, scheme, context)
    table = write_params(checkpoint, plan, directory / "p.safetensors", journal=directory / "p.journal", **options)
    return directory / "p.safetensors", table


def expected_values(source, scheme):
    """{name: array} of what the file must hold, without the rotary tables, by NumPy."""
    out = {}
    for name, (dtype, raw) in source.items():
        w = widen(dtype, raw)
        if w.ndim == 1 or scheme == "fp32":
            out[name] = w
        elif scheme == "fp16":
            out[name] = w.astype(np.float16)
        elif scheme == "bf16":
            out[name] = to_bf16_bits(w)
        else:
            codes, out[name.replace(".weight", ".scale")] = numpy_rtn(w)
            out[name] = codes.T if scheme == TRANSPOSED and ".layers." in name else codes
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("model_type", "dtype"), [("gemma", "F32"), ("gemma3_text", "BF16")])
def test_values_equal_numpy_bit_for_bit(tmp_path, scheme, model_type, dtype):
    checkpoint = tiny(tmp_path / "c", model_type, dtype=dtype, tie_word_embeddings=model_type == "gemma")
    path, table = write(checkpoint, tmp_path, scheme, block_bytes=5000)
    found = read_raw(path)
    rotary = {name for name in found if "rotary" in name}
    assert len(rotary) == 2 * len(checkpoint.config.rope)
    expected = expected_values(read_raw(tmp_path / "c" / "model.safetensors"), scheme)
    numbers = {name for name in found if name.endswith((".eps", ".scaling"))}
    assert bool(numbers) == (scheme == "fp16")
    assert found.keys() - rotary - numbers == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name][1], array, err_msg=name, strict=True)
    assert [row.name for row in table.rows] == list(found)
    assert all((row.sqnr_db is not None) == (row.scheme == "int8_per_channel") for row in table.rows)


def test_other_sources_become_float32_first(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from gemma_deploy.checkpoint import Checkpoint

    tiny(tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    for number, dtype in enumerate((torch.float16, torch.float64)):
        save_file({k: v.to(dtype) for k, v in weights.items()}, tmp_path / "c" / "model.safetensors")
        checkpoint = Checkpoint.open(tmp_path / "c")
        for scheme in SCHEMES:
            directory = tmp_path / f"{number}{scheme}"
            path, _ = write(checkpoint, directory, scheme, block_bytes=3000)
            source = {k: ("F32", v.to(dtype).float().numpy()) for k, v in weights.items()}
            found = read_raw(path)
            for name, array in expected_values(source, scheme).items():
                np.testing.assert_array_equal(found[name][1], array, err_msg=name, strict=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_safetensors_library_reads_it(tmp_path, scheme):
    path, table = write(tiny(tmp_path / "c"), tmp_path, scheme)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {row.name for row in table.rows}
        for row in table.rows:
            tensor = file.get_tensor(row.name)
            assert tuple(tensor.shape) == row.shape
            assert str(tensor.dtype) == f"torch.{row.dtype}"
    assert table.file_bytes == path.stat().st_size
    assert table.rows[0].offset % 4096 == 0


def test_bytes_do_not_depend_on_workers_or_blocks(tmp_path):
    checkpoint = tiny(tmp_path / "c", "gemma3_text")
    for scheme in ("w8a16", TRANSPOSED, "fp16"):
        results = []
        for number, options in enumerate(
            ({"workers": 1}, {"workers": 2, "block_bytes": 1}, {"workers": 5, "block_bytes": 3001})
        ):
            path, table = write(checkpoint, tmp_path / f"{scheme}{number}", scheme, **options)
            results.append((path.read_bytes(), table.to_json(), table.digest))
        assert results[0] == results[1] == results[2]


def test_the_tied_table_is_stored_once(tmp_path):
    checkpoint = tiny(tmp_path / "c")
    path, table = write(checkpoint, tmp_path, "w8a16")
    assert "lm_head.weight" not in {row.name for row in table.rows}
    elements = sum(int(np.prod(info.shape)) for info in checkpoint.tensors.values())
    assert path.stat().st_size < elements * 1.3 + 8192


def test_the_table_survives_json(tmp_path):
    import json

    _, table = write(tiny(tmp_path / "c"), tmp_path, "w8a16")
    again = ParamTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again["model.norm.weight"].dtype == "float32"
    with pytest.raises(KeyError):
        again["model.nothing"]


def test_a_second_run_writes_nothing(tmp_path, monkeypatch):
    checkpoint = tiny(tmp_path / "c")
    path, table = write(checkpoint, tmp_path, "w8a16")
    before = path.stat()
    monkeypatch.setattr(os, "pwrite", lambda *a: pytest.fail("written again"))
    _, again = write(checkpoint, tmp_path, "w8a16")
    assert again == table
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    plan = planned(checkpoint, "w8a16")
    assert finished_table(checkpoint, plan, path, journal=tmp_path / "p.journal") == table


def test_a_finished_file_may_move_with_its_directory(tmp_path):
    checkpoint = tiny(tmp_path / "c")
    path, table = write(checkpoint, tmp_path / "a.partial", "fp16")
    (tmp_path / "a.partial").rename(tmp_path / "a")
    moved = tmp_path / "a" / path.name
    plan = planned(checkpoint, "fp16")
    assert finished_table(checkpoint, plan, moved, journal=tmp_path / "a" / "p.journal") == table
    assert finished_table(checkpoint, plan, moved, journal=tmp_path / "nowhere") is None


@pytest.mark.parametrize("change", ["checkpoint", "scheme", "form", "context", "code", "file"])
def test_what_changed_is_written_anew(tmp_path, monkeypatch, change):
    checkpoint = tiny(tmp_path / "c")
    path, table = write(checkpoint, tmp_path, "w8a16")
    before = path.read_bytes()
    options = {"scheme": "w8a16", "context": 48}
    if change == "checkpoint":
        patch_value(tmp_path / "c", "model.layers.1.mlp.up_proj.weight", (3, 3), 2.0)
    elif change == "scheme":
        options["scheme"] = "bf16"
    elif change == "form":
        options["scheme"] = TRANSPOSED
    elif change == "context":
        options["context"] = 64
    elif change == "code":
        monkeypatch.setattr("gemma_deploy.params.writer.code_of", lambda names: Code(names, ()))
    else:
        path.write_bytes(before[:-1] + b"\x55")
    plan = planned(checkpoint, **options)
    assert finished_table(checkpoint, plan, path, journal=tmp_path / "p.journal") is None
    _, again = write(checkpoint, tmp_path, **options)
    assert not damaged_rows(path, again)
    if change in ("code", "file"):
        assert path.read_bytes() == before
        assert again == table
    else:
        assert again != table


def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path):
    checkpoint = tiny(tmp_path / "c")

    def touch(done, total):
        os.utime(tmp_path / "c" / "model.safetensors", ns=(1, 1))

    with pytest.raises(ParamsError, match="changed while it was read"):
        write(checkpoint, tmp_path, "fp32", progress=touch)
    assert not (tmp_path / "p.safetensors").exists()


def test_damage_is_named(tmp_path):
    path, table = write(tiny(tmp_path / "c"), tmp_path, "w8a16")
    seen = []
    assert damaged_rows(path, table, progress=lambda done, total: seen.append(done / total)) == []
    assert seen == sorted(seen)
    good = path.read_bytes()
    row = table["model.layers.2.self_attn.o_proj.weight"]
    for at, problem in ((row.offset + 5, row.name), (20, "header"), (None, "bytes, expected")):
        data = bytearray(good)
        if at is None:
            data.append(0)
        else:
            data[at] ^= 1
        path.write_bytes(data)
        problems = damaged_rows(path, table)
        assert len(problems) == 1
        assert problem in problems[0]
    path.write_bytes(good[: row.offset + 1])
    assert any(row.name in problem for problem in damaged_rows(path, table))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_nan_and_infinity_name_tensor_and_row(tmp_path, scheme, dtype):
    checkpoint = tiny(tmp_path / "c", dtype=dtype)
    patch_value(tmp_path / "c", "model.layers.1.mlp.down_proj.weight", (7, 3), np.nan)
    patch_value(tmp_path / "c", "model.layers.1.mlp.down_proj.weight", (60, 3), np.inf)
    patch_value(tmp_path / "c", "model.norm.weight", (5,), -np.inf)
    with pytest.raises(ParamsError) as caught:
        write(checkpoint, tmp_path, scheme, block_bytes=1000)
    assert caught.value.problems == (
        "model.layers.1.mlp.down_proj.weight: row 7 holds NaN; 2 rows are affected",
        "model.norm.weight: row 5 holds infinity",
    )
    assert not (tmp_path / "p.safetensors").exists()


def test_overflow_to_half_precision_is_refused_by_name(tmp_path):
    checkpoint = tiny(tmp_path / "c", dtype="F32")
    name = "model.layers.0.self_attn.k_proj.weight"
    patch_value(tmp_path / "c", name, (2, 1), -65505.0)
    patch_value(tmp_path / "c", "model.norm.weight", (0,), 1e6)  # stays float32
    with pytest.raises(ParamsError, match=f"{name}: row 2 holds magnitude 65505, too large for float16") as caught:
        write(checkpoint, tmp_path, "fp16")
    assert len(caught.value.problems) == 1
    patch_value(tmp_path / "c", name, (2, 1), 65504.0)
    path, _ = write(checkpoint, tmp_path, "fp16")
    assert read_raw(path)[name][1].max() == 65504
    patch_value(tmp_path / "c", name, (2, 1), 3.4e38)
    with pytest.raises(ParamsError, match="too large for bfloat16"):
        write(checkpoint, tmp_path, "bf16")


def test_progress_rises_to_the_whole(tmp_path):
    seen = []
    _, table = write(tiny(tmp_path / "c"), tmp_path, "fp32", progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {table.file_bytes}
    assert seen[-1][0] <= table.file_bytes


def test_torch_keeps_its_threads(tmp_path):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write(tiny(tmp_path / "c"), tmp_path, "w8a16")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_brings_no_torch():
    code = "import sys, gemma_deploy.params, gemma_deploy.quantization; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def written(checkpoint, path, block_bytes=3000, **options):
    """Bytes of a file, its table and its plan."""
    plan = build_plan(checkpoint.config, "w8a16", 48, **options)
    table = write_params(checkpoint, plan, path, journal=path.with_suffix(".journal"), block_bytes=block_bytes)
    return path.read_bytes(), table, plan


class Quantized:
    """A checkpoint whose linears are quantized already: codes one to a byte, as quantizers leave them."""

    def __init__(self, checkpoint, bits, group=None):
        self.checkpoint, self.path, self.config = checkpoint, checkpoint.path, checkpoint.config
        self.codes, self.tensors, self.output_errors = {}, dict(checkpoint.tensors), {}
        rng, most = np.random.default_rng(4), 2 ** (bits - 1) - 1
        for name, info in checkpoint.tensors.items():
            if ".layers." in name and len(info.shape) == 2:
                scales = Codes(bits, group).scale_shape(info.shape)
                self._add(name, rng.integers(-most, most + 1, info.shape, np.int8), "int8")
                self._add(name.replace(".weight", ".scale"), rng.uniform(0.01, 1, scales).astype(np.float32), "float32")
                self.output_errors[name] = OutputError(30.0, 1.0)

    def _add(self, name, values, dtype):
        self.codes[name] = values
        self.tensors[name] = TensorInfo(name, values.shape, dtype, self.path, values.nbytes)

    def raw_rows(self, name, start, stop):
        return self.codes[name][start:stop] if name in self.codes else self.checkpoint.raw_rows(name, start, stop)

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)


UNSIGNED, TURNED_FORM = CodeForm(unsigned=True), CodeForm(unsigned=True, transposed=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_unsigned_codes_are_the_signed_ones_with_their_high_bit_turned(tmp_path, bits):
    """Zero points of 128 and, in each half of a byte, of 8; scales and norms are untouched."""
    checkpoint = tiny(tmp_path / "c", "gemma3_text")
    source, options = checkpoint, {}
    if bits == 4:
        source = Quantized(checkpoint, 4, 32)
        options = {"storage": Storage(Codes(4, 32), Codes(8, 32)), "quantized": source.output_errors}
    signed, table, _ = written(source, tmp_path / "signed.safetensors", **options)
    unsigned, other, _ = written(source, tmp_path / "unsigned.safetensors", form=UNSIGNED, **options)
    transposed = {"int8": 0x80, "int4": 0x88, "float32": 0}
    for row, new in zip(table.rows, other.rows, strict=True):
        span = slice(row.offset, row.offset + row.nbytes)
        assert (new.name, new.offset, new.nbytes, new.shape) == (row.name, row.offset, row.nbytes, row.shape)
        expected = np.frombuffer(signed[span], np.uint8) ^ transposed[row.dtype]
        np.testing.assert_array_equal(np.frombuffer(unsigned[span], np.uint8), expected, err_msg=row.name)
    name = "model.layers.0.mlp.up_proj.weight"
    row, found = other[name], np.frombuffer(unsigned, np.uint8)
    codes = found[row.offset : row.offset + row.nbytes].astype(int)
    halves = codes - 128 if bits == 8 else np.stack([codes & 15, codes >> 4], -1).ravel() - 8
    assert np.abs(halves).max() == (127 if bits == 8 else 7)
    if bits == 4:
        np.testing.assert_array_equal(halves.reshape(row.shape), source.codes[name])
    assert not damaged_rows(tmp_path / "unsigned.safetensors", other)


@pytest.mark.parametrize("made", ["rounded", "stored"])
@pytest.mark.parametrize("block_bytes", [700, 1 << 20])
def test_transposed_codes_are_the_signed_ones_transposed(tmp_path, made, block_bytes):
    """Of linears, rounded here or by a quantizer; the table is unsigned and lies as it did, scales too."""
    checkpoint = tiny(tmp_path / "c", "gemma3_text")
    source = Quantized(checkpoint, 8) if made == "stored" else checkpoint
    options = {"quantized": getattr(source, "output_errors", None), "block_bytes": block_bytes}
    signed, table, _ = written(source, tmp_path / "signed.safetensors", **options)
    transposed, other, _ = written(source, tmp_path / "turned.safetensors", form=TURNED_FORM, **options)
    seen = set()
    for row, new in zip(table.rows, other.rows, strict=True):
        span = slice(row.offset, row.offset + row.nbytes)
        assert (new.name, new.offset, new.nbytes, new.sqnr_db) == (row.name, row.offset, row.nbytes, row.sqnr_db)
        if row.name.endswith("_proj.weight"):
            codes = np.frombuffer(signed[span], np.int8).reshape(row.shape)
            if made == "stored":
                np.testing.assert_array_equal(codes, source.codes[row.name])
            assert (new.dtype, new.shape) == ("int8", row.shape[::-1])
            assert transposed[span] == codes.T.tobytes(), row.name
            seen.add(row.shape[0] == row.shape[1])
        else:
            assert new.shape == row.shape
            assert transposed[span] == bytes(np.frombuffer(signed[span], np.uint8) ^ (0x80 * (row.dtype == "int8")))
    assert seen == {True, False}  # k_proj and v_proj are square
    assert not damaged_rows(tmp_path / "turned.safetensors", other)


@pytest.mark.parametrize(
    ("bits", "group", "quantized", "form"),
    [(8, None, made, form) for made in (False, True) for form in (CodeForm(), UNSIGNED, TURNED_FORM)]
    + [(4, 32, True, form) for form in (CodeForm(), UNSIGNED)],
)
def test_stored_weights_read_codes_of_every_kind_back(tmp_path, bits, group, quantized, form):
    checkpoint = tiny(tmp_path / "c", "gemma2")
    storage = Storage(Codes(bits, group), Codes(8, 32))
    source = Quantized(checkpoint, bits, group) if quantized else checkpoint
    options = {"quantized": source.output_errors} if quantized else {}
    _, table, _ = written(source, tmp_path / "params.safetensors", storage=storage, form=form, **options)
    found = manifest(
        contract={"context": 48},
        scheme="w8a16",
        storage=storage.to_json(),
        kernels={"integer": form.transposed} if form.unsigned else None,
        params=table.moved("params.safetensors").to_json(),
    )
    stored = ArtifactWeights(checkpoint.config, tmp_path, found)
    raw = read_raw(tmp_path / "c" / "model.safetensors")
    names = [f"model.layers.1.{name}_proj.weight" for name in ("mlp.up", "mlp.down", "self_attn.k", "self_attn.v")]
    assert raw[names[2]][1].shape == (64, 64)
    for name in names:
        if quantized:
            codes, scale = source.codes[name], source.codes[name.replace(".weight", ".scale")]
        else:
            codes, scale = numpy_rtn(widen(*raw[name]))
        expected = codes * (np.repeat(scale, group, 1) if group else scale[:, None])
        np.testing.assert_array_equal(stored.rows(name, 3, 21), expected[3:21], err_msg=name)
        np.testing.assert_array_equal(stored.rows(name, 0, len(codes)), expected, err_msg=name)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        whole = widen(*raw[name])
        assert np.abs(stored.rows(name, 0, len(whole)) - whole).max() <= np.abs(whole).max() / 250
