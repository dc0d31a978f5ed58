"""The streaming pass gives what hooks on the stock transformers model see, and holds one layer at a time."""

import errno
import os
import re
import weakref

import numpy as np
import pytest
import torch

from gemma_deploy.calibration import ranges as passes
from gemma_deploy.calibration import states
from gemma_deploy.calibration.observers import RangeObserver
from gemma_deploy.calibration.points import LABELS, input_point, split_point
from gemma_deploy.calibration.ranges import run_layers
from gemma_deploy.calibration.states import HiddenStates
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CalibrationError
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint

LAYERS = {kind: config["num_hidden_layers"] for kind, config in TINY_CONFIGS.items()}
WINDOW, SEQLEN, NSAMPLES = 8, 5 * 8, 3  # sequences of five windows


def sample_ids(vocab_size=512):
    ids = np.random.default_rng(5).integers(4, vocab_size, (NSAMPLES, SEQLEN), dtype=np.int32)
    ids[:, 0] = 2
    return ids


class Ranges(dict):
    def __call__(self, point, x):
        self.setdefault(point, RangeObserver()).update(x)


def streamed(path, ids, scratch, **options):
    return run_layers(Checkpoint.open(path), ids, scratch=scratch, **options)


def stock_ranges(path, ids, **changes):
    """Ranges by forward hooks on transformers' own class."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32, **changes)
    ranges, linears = Ranges(), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    for name, module in model.eval().named_modules():
        if name.endswith(linears):
            module.register_forward_pre_hook(lambda m, args, name=name: ranges(f"{name}.in", args[0]))
        if re.fullmatch(r"model\.layers\.\d+", name):
            module.register_forward_hook(
                lambda m, args, out, name=name: ranges(f"{name}.out", out[0] if isinstance(out, tuple) else out)
            )
    with torch.inference_mode():
        for row in ids:
            model(torch.from_numpy(row[None].astype(np.int64)))
    return ranges


def test_ranges_are_those_of_the_stock_model(checkpoint_dir, model_type, tmp_path):
    ids = sample_ids()
    expected, found = stock_ranges(checkpoint_dir, ids), streamed(checkpoint_dir, ids, tmp_path)
    layers = LAYERS[model_type]
    assert len(found) == 5 * layers + 1
    for point, seen in expected.items():  # every linear has its range, by its own name or by q_proj's or gate_proj's
        mine = found[input_point(point.removesuffix(".in")) if point.endswith(".in") else point]
        assert torch.equal(mine.minimum, seen.minimum), point
        assert torch.equal(mine.maximum, seen.maximum), point
        assert mine.count == NSAMPLES * SEQLEN


def test_the_window_and_the_kinds_of_layers_matter_in_that_comparison(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma3_text", sliding_window=WINDOW)
    ids = sample_ids()
    narrow, wide = stock_ranges(path, ids), stock_ranges(path, ids, sliding_window=512)
    assert not torch.equal(narrow["model.layers.0.out"].maximum, wide["model.layers.0.out"].maximum)
    kinds = ["full_attention"] * 7
    full = stock_ranges(path, ids, layer_types=kinds)
    assert not torch.equal(narrow["lm_head.in"].maximum, full["lm_head.in"].maximum)


def test_untied_and_sharply_scaled_models_too(tmp_path):
    path = write_tiny_checkpoint(
        tmp_path / "c", "gemma", tie_word_embeddings=False, hidden_size=72, num_hidden_layers=2
    )
    ids = sample_ids()
    exact, expected = streamed(path, ids, tmp_path), stock_ranges(path, ids)
    assert torch.equal(exact["lm_head.in"].maximum, expected["lm_head.in"].maximum)
    rounded = streamed(path, ids, tmp_path, embed_scale="bf16")  # sqrt(72) is no bfloat16 number
    assert not torch.equal(exact["model.layers.0.out"].maximum, rounded["model.layers.0.out"].maximum)


def test_one_layer_is_in_memory_at_a_time(checkpoint_dir, model_type, tmp_path, monkeypatch):
    live, most = {}, []
    read = Checkpoint.rows

    def counted(self, name, start, stop):
        rows = read(self, name, start, stop)
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            live[layer] = live.get(layer, 0) + 1
            most.append({key for key, count in live.items() if count})
            weakref.finalize(rows, lambda: live.update({layer: live[layer] - 1}))
        return rows

    monkeypatch.setattr(Checkpoint, "rows", counted)
    streamed(checkpoint_dir, sample_ids(), tmp_path)
    assert max(map(len, most)) == 1
    assert len(live) == LAYERS[model_type]
    assert not any(live.values())


def test_hidden_states_on_disk_give_the_same_and_leave_nothing(checkpoint_dir, tmp_path, monkeypatch):
    in_memory = streamed(checkpoint_dir, sample_ids(), tmp_path)
    made = []

    class OnDisk(HiddenStates):
        def __init__(self, shape, file):
            super().__init__(shape, file, in_memory_bytes=0)
            made.append((self.on_disk, file.stat().st_size))

    monkeypatch.setattr(passes, "HiddenStates", OnDisk)
    on_disk = streamed(checkpoint_dir, sample_ids(), tmp_path)
    assert made == [(True, NSAMPLES * SEQLEN * 64 * 4)]
    assert not list(tmp_path.glob("hidden_states*"))
    for point, seen in in_memory.items():
        assert torch.equal(seen.minimum, on_disk[point].minimum)
        assert torch.equal(seen.maximum, on_disk[point].maximum)


def test_a_full_disk_is_noticed_before_the_pass(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match="no room for the hidden states of 2 windows: No space left") as caught:
        HiddenStates((2, 1000, 500), tmp_path / "h", in_memory_bytes=0)
    assert caught.value.expected.startswith("4 MB free")
    assert not (tmp_path / "h").exists()


def test_the_first_layer_with_nan_is_named_and_the_scratch_file_removed(tmp_path, monkeypatch):
    path = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma")
    read = Checkpoint.rows

    def damaged(self, name, start, stop):
        rows = read(self, name, start, stop)
        if name == "model.layers.1.mlp.up_proj.weight":
            rows[3, 4] = np.nan
        return rows

    monkeypatch.setattr(Checkpoint, "rows", damaged)
    monkeypatch.setattr(passes, "HiddenStates", lambda shape, file: HiddenStates(shape, file, in_memory_bytes=0))
    with pytest.raises(CalibrationError, match="NaN or infinity in window 0") as caught:
        streamed(path, sample_ids(), tmp_path)
    assert caught.value.where == "model.layers.1"
    assert not list(tmp_path.glob("hidden_states*"))


def test_progress_counts_windows_through_layers(checkpoint_dir, model_type, tmp_path):
    seen = []
    streamed(checkpoint_dir, sample_ids(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = NSAMPLES * LAYERS[model_type]
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_points_have_labels_and_every_linear_a_point():
    assert LABELS == {
        "self_attn.q_proj.in": "q/k/v input",
        "self_attn.o_proj.in": "o_proj input",
        "mlp.gate_proj.in": "gate/up input",
        "mlp.down_proj.in": "down_proj input",
        "laurel.linear_right.in": "linear_right input",
        "per_layer_input_gate.in": "per_layer_input_gate input",
        "per_layer_projection.in": "per_layer_projection input",
        "out": "layer output",
        "lm_head.in": "LM head input",
    }
    assert input_point("model.layers.3.self_attn.v_proj") == "model.layers.3.self_attn.q_proj.in"
    assert input_point("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.gate_proj.in"
    assert input_point("lm_head") == "lm_head.in"
    assert split_point("model.layers.12.mlp.down_proj.in") == (12, "mlp.down_proj.in")
    assert split_point("model.layers.12.out") == (12, "out")
    assert split_point("lm_head.in") == (None, "lm_head.in")


def test_an_observer_keeps_extremes_over_all_it_was_shown():
    observer = RangeObserver()
    observer.update(torch.tensor([[[1.0, -5.0], [2.0, 0.5]]]))
    observer.update(torch.tensor([[-3.0, 1.0]], dtype=torch.float16))
    assert observer.minimum.tolist() == [-3.0, -5.0]
    assert observer.maximum.tolist() == [2.0, 1.0]
    assert observer.channel_absmax.tolist() == [3.0, 5.0]
    assert (observer.absmax, observer.count) == (5.0, 3)
