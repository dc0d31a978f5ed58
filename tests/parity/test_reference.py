"""The streamed torch sources give what transformers' class gives when it is loaded the ordinary way."""

import weakref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity import reference
from gemma_deploy.parity.cases import make_cases
from gemma_deploy.parity.reference import TorchSource
from gemma_deploy.testing import write_tiny_checkpoint

LENGTH, STEPS = 26, 6  # more than three windows of 8
# A GEMM over the padded rows of a batch may add up in another order than one over a single row. Nothing was measured
# here but 7e-7 for the embedding scale, which hf gets through its rows; other processors have other kernels.
SUMMATION = 2e-6


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir):
    return Checkpoint.open(checkpoint_dir)


@pytest.fixture(scope="module")
def cases(checkpoint):
    text = np.random.default_rng(11).integers(3, 500, 200).tolist()
    return make_cases(checkpoint.config, batch=2, length=LENGTH, steps=STEPS, text=text)


def stock(checkpoint, **changes):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.path, attn_implementation="eager", dtype=torch.float32, **changes
    ).eval()


def stock_logits(model, cases):
    """Each row alone, without padding: case -> row -> [prompt + steps, V]."""
    with torch.no_grad():
        return [[model(torch.tensor([case.sequence(row)])).logits[0].numpy() for row in range(2)] for case in cases]


def logits(source, cases):
    return [[source.head(row) for row in case] for case in source.run(cases)]


def error(expected, got):
    """Largest difference over all cases, rows and positions, relative to the largest logit."""
    pairs = [(e, g) for a, b in zip(expected, got, strict=True) for e, g in zip(a, b, strict=True)]
    assert all(e.shape == g.shape == (len(e), e.shape[1]) for e, g in pairs)
    return max(float(np.abs(e - g).max()) for e, g in pairs) / max(float(np.abs(e).max()) for e, _ in pairs)


def test_hf_is_the_stock_class(checkpoint, cases):
    expected = stock_logits(stock(checkpoint), cases)
    assert error(expected, logits(TorchSource(checkpoint, "hf"), cases)) <= SUMMATION


def test_patched_is_hf_bit_for_bit(checkpoint, cases):
    hf, patched = (TorchSource(checkpoint, kind).run(cases) for kind in ("hf", "patched"))
    for a, b in zip(hf, patched, strict=True):
        for expected, got in zip(a, b, strict=True):
            np.testing.assert_array_equal(expected, got)


def test_the_prompt_is_long_enough_to_see_a_wrong_window(checkpoint, cases):
    if checkpoint.config.sliding_window is None:
        pytest.skip("no window")
    expected = stock_logits(stock(checkpoint, sliding_window=9), cases)
    assert error(expected, logits(TorchSource(checkpoint, "hf"), cases)) > 1e-2


def rounded_rows(weight):
    """The int8 scheme in NumPy: symmetric, a scale per row."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    return (np.clip(np.rint(weight / scale), -127, 127) * scale).astype(np.float32)


def with_matrices(model, change):
    """A model whose matrices (token table included, norms not) are others."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.from_numpy(change(parameter.numpy())))
    return model


def test_w8a16_is_the_stock_class_on_weights_rounded_by_numpy(checkpoint, cases):
    expected = stock_logits(with_matrices(stock(checkpoint), rounded_rows), cases)
    assert error(expected, logits(TorchSource(checkpoint, "patched", "w8a16"), cases)) <= 1e-5  # the gate's limit
    assert error(expected, logits(TorchSource(checkpoint, "patched"), cases)) > 1e-3


@pytest.mark.parametrize("kind", ["hf", "patched"])
def test_bf16_rounds_matrices_and_nothing_else(tmp_path, kind, cases):
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "f32", "gemma", dtype="F32"))

    def rounded(weight):
        return torch.from_numpy(weight).bfloat16().float().numpy()

    expected = stock_logits(with_matrices(stock(checkpoint), rounded), cases)
    source = TorchSource(checkpoint, kind, "bf16")
    assert source.name == f"{kind} bf16"
    assert error(expected, logits(source, cases)) <= SUMMATION
    assert error(expected, logits(TorchSource(checkpoint, kind), cases)) > 1e-4


@pytest.mark.parametrize("kind", ["hf", "patched"])
def test_an_untied_head_is_read(tmp_path, kind, cases):
    path = write_tiny_checkpoint(tmp_path / "untied", "gemma", tie_word_embeddings=False)
    checkpoint = Checkpoint.open(path)
    assert error(stock_logits(stock(checkpoint), cases), logits(TorchSource(checkpoint, kind), cases)) <= SUMMATION


def test_both_kinds_take_the_same_embedding_scale(tmp_path, cases):
    # sqrt(80) = 8.944 is 8.9375 in bfloat16
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "80", "gemma", hidden_size=80))
    hf, patched = (
        logits(TorchSource(checkpoint, kind, "fp32", embed_scale="bf16"), cases) for kind in ("hf", "patched")
    )
    assert error(hf, patched) <= SUMMATION
    assert error(hf, logits(TorchSource(checkpoint, "hf"), cases)) > 1e-5


def test_there_are_no_int8_linears_in_the_stock_class(checkpoint):
    with pytest.raises(ValueError, match="no int8 linears"):
        TorchSource(checkpoint, "hf", "w8a16")


@pytest.mark.parametrize(("kind", "weighting"), [("hf", "fp32"), ("patched", "fp32"), ("patched", "w8a16")])
def test_the_weights_of_one_module_at_a_time(checkpoint, cases, monkeypatch, kind, weighting):
    read, most = [], []
    rows = Checkpoint.rows

    def spy(self, name, start, stop):
        array = rows(self, name, start, stop)
        alive = {other for other, there in read if there() is not None and not other.endswith("layer_scalar")} - {name}
        most.append(sorted(alive))
        read.append((name, weakref.ref(array)))  # torch keeps the array itself as long as its own tensor
        return array

    monkeypatch.setattr(Checkpoint, "rows", spy)
    TorchSource(checkpoint, kind, weighting).run(cases)
    names = {name for name, _ in read}
    assert names == set(checkpoint.tensors), "every tensor is used, and nothing else is"
    assert max(map(len, most)) == 0, max(most, key=len)  # one number of a layer counts as nothing
    assert not any(there() is not None for _, there in read), "nothing is kept after the run"


def test_the_head_in_blocks_of_rows_gives_the_same_logits(checkpoint, monkeypatch):
    hidden = np.random.default_rng(0).standard_normal((5, checkpoint.config.hidden_size)).astype(np.float32)
    for weighting in ("fp32", "w8a16"):
        source = TorchSource(checkpoint, "patched", weighting)
        whole = source.head(hidden)
        monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * checkpoint.config.hidden_size * 100)  # 512 rows in 6 blocks
        np.testing.assert_allclose(source.head(hidden), whole, rtol=0, atol=SUMMATION * np.abs(whole).max())
        monkeypatch.undo()


def test_modules_are_those_of_the_stock_class_in_the_order_they_run(checkpoint, cases):
    model, expected = stock(checkpoint), {}
    wanted = ("model.layers.1.input_layernorm", "model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj")
    for name in wanted:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: expected.update({f"{name}.in": args[0][0], f"{name}.out": out[0]})
        )
    with torch.no_grad():
        model(torch.tensor([cases[0].sequence(1)]))
    for kind in ("hf", "patched"):
        got = {}
        TorchSource(checkpoint, kind).modules(cases[0], 1, expected.__contains__, keep=got.__setitem__)
        assert list(got) == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values.numpy(), rtol=0, atol=SUMMATION * float(values.abs().max()))


def test_the_largest_activations_are_remembered_and_nan_is_one(checkpoint, cases, tmp_path, monkeypatch):
    model, largest = stock(checkpoint), []
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: largest.append(float(out.abs().max())))
    stock_logits(model, cases)
    source = TorchSource(checkpoint, "hf")
    source.run(cases)
    assert source.absmax["model.layers.1.mlp.down_proj.out"] == pytest.approx(max(largest), rel=SUMMATION)
    assert source.absmax["model.layers.1.mlp.act_fn.out"] > 0
    rows = Checkpoint.rows
    monkeypatch.setattr(
        Checkpoint, "rows", lambda self, name, *a: rows(self, name, *a) * (np.nan if name == "model.norm.weight" else 1)
    )
    source.run(cases)
    assert np.isnan(source.absmax["model.norm.out"])
