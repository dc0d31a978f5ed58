"""A checkpoint opened with adapters: which go together, what changes its fingerprints, other bases."""

import json

import numpy as np
import pytest

from gemma_deploy.checkpoint import AdapterRef, Checkpoint
from gemma_deploy.errors import CheckpointError
from tests.checkpoint.adapters.make import DOWN, HEAD, PREFIX, TABLE, Q, factors, pair, write_adapter
from tests.checkpoint.make import config, write_checkpoint
from tests.text.make import write_gguf

NORM = f"{PREFIX}model.norm.weight"


@pytest.fixture
def base(tmp_path):
    write_checkpoint(tmp_path / "gemma-2b", dtype="BF16")
    return tmp_path / "gemma-2b"


def norm(directory, value):
    tensors = factors() | {NORM: np.full(16, value, np.float32)}
    return write_adapter(directory, tensors, modules_to_save=["norm"])


def table(rows, value=1.0):
    return {f"{TABLE}.weight": np.full((rows, 16), value, np.float32)}


def test_two_that_replace_one_tensor_are_refused(base, tmp_path):
    one, two = norm(tmp_path / "one", 1), norm(tmp_path / "two", 2)
    with pytest.raises(CheckpointError, match="the adapters do not go together") as caught:
        Checkpoint.open(base, [AdapterRef(one), AdapterRef(two)])
    (problem,) = caught.value.problems
    assert problem == f"model.norm.weight is changed by {one} and {two}, and {one} puts other numbers there"


def test_one_that_replaces_and_one_that_adds_are_refused(base, tmp_path):
    down = {f"{DOWN}.weight": np.ones((16, 24), np.float32)} | pair(Q, (32, 16))
    one = write_adapter(tmp_path / "one", down, modules_to_save=["down_proj"])
    two = write_adapter(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"down_proj.weight is changed by .* puts other numbers there"):
        Checkpoint.open(base, [AdapterRef(two), AdapterRef(one)])


def test_tables_of_two_adapters(base, tmp_path):
    """Saved because they were adapted: equal ones go together, others do not."""
    one, same, other = (
        write_adapter(tmp_path / name, factors() | table(44, value))
        for name, value in (("one", 1), ("same", 1), ("other", 2))
    )
    opened = Checkpoint.open(base, [AdapterRef(one), AdapterRef(same)])
    assert opened.config.vocab_size == opened.tensors["model.embed_tokens.weight"].shape[0] == 44
    with pytest.raises(CheckpointError, match="and they differ"):
        Checkpoint.open(base, [AdapterRef(one), AdapterRef(other)])


def test_factors_of_a_table_that_another_adapter_resizes_are_refused(base, tmp_path):
    one = write_adapter(tmp_path / "one", factors() | table(44))
    rows = {f"{TABLE}.lora_embedding_A": np.ones((4, 40)), f"{TABLE}.lora_embedding_B": np.ones((16, 4))}
    two = write_adapter(tmp_path / "two", rows)
    with pytest.raises(CheckpointError, match=r"is of a weight \[40, 16\], and .* is \[44, 16\] by now"):
        Checkpoint.open(base, [AdapterRef(one), AdapterRef(two)])


def test_what_is_wrong_with_several_is_told_together(base, tmp_path):
    one = write_adapter(tmp_path / "one", use_qalora=True)
    two = write_adapter(tmp_path / "two", pair(Q, (8, 16)))
    with pytest.raises(CheckpointError, match="2 adapters cannot be taken") as caught:
        Checkpoint.open(base, [AdapterRef(one), AdapterRef(two)])
    assert len(caught.value.problems) == 2


def test_fingerprints(base, tmp_path):
    def prints(adapter):
        opened = Checkpoint.open(base, adapter)
        return opened.fingerprint(times=False), opened.weights_fingerprint(), opened.text_fingerprint()

    adapter = write_adapter(tmp_path / "a")
    own, first, half = prints(None), prints(adapter), prints(AdapterRef(adapter, 0.5))
    copied = prints(write_adapter(tmp_path / "b"))
    changed = prints(write_adapter(tmp_path / "c", lora_alpha=9))
    assert len({own[:2], first[:2], half[:2], changed[:2]}) == 4
    assert copied == first
    assert {one[2] for one in (own, first, half, changed)} == {own[2]}
    (adapter / "tokenizer.json").write_text("{}")
    assert prints(adapter)[2] != own[2]


def test_an_adapter_that_changes_while_it_is_open_is_noticed(base, tmp_path):
    adapter = write_adapter(tmp_path / "a")
    opened = Checkpoint.open(base, adapter)
    before = opened.weights_fingerprint()
    assert opened.weights_fingerprint() == before
    write_adapter(tmp_path / "a", pair(Q, (32, 16), seed=9), lora_alpha=99)
    assert opened.weights_fingerprint() != before


def test_the_tokenizer_beside_an_adapter_counts(base, tmp_path):
    (base / "tokenizer.json").write_text("{}")
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    refs = [AdapterRef(one), AdapterRef(two)]
    assert Checkpoint.open(base, refs).tokenizer_dir() == base
    for place in (two, one):
        (place / "tokenizer.json").write_text("{}")
        opened = Checkpoint.open(base, refs)
        assert opened.tokenizer_files() == [place / "tokenizer.json"]
        assert any(note == f"the tokenizer is the one beside the adapter, {place}" for note in opened.notes)
    assert f"the tokenizer beside the adapter {two} is not read" in opened.notes


def test_the_weight_of_whole_tensors_does_not_count_and_is_told(base, tmp_path):
    adapter = norm(tmp_path / "a", 3)
    opened = Checkpoint.open(base, AdapterRef(adapter, 0.5))
    np.testing.assert_array_equal(opened.rows("model.norm.weight", 0, 16), np.full(16, 3, np.float32))
    assert any("its weight of 0.5 does not count there" in note for note in opened.notes)


def test_equal_table_and_head_stay_tied(base, tmp_path):
    whole = table(40) | {f"{HEAD}.weight": np.ones((40, 16), np.float32)}
    fields = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert Checkpoint.open(base, write_adapter(tmp_path / "a", whole, **fields)).config.tie_word_embeddings
    whole[f"{HEAD}.weight"][39, 15] = 2
    assert not Checkpoint.open(base, write_adapter(tmp_path / "b", whole, **fields)).config.tie_word_embeddings


def test_a_name_of_another_base_is_a_note(base, tmp_path):
    assert Checkpoint.open(base, write_adapter(tmp_path / "a")).notes == ()
    other = write_adapter(tmp_path / "b", base_model_name_or_path="google/gemma-7b")
    assert any("its base is google/gemma-7b" in note for note in Checkpoint.open(base, other).notes)


def test_a_gguf_file_takes_an_adapter(tmp_path):
    write_gguf(tmp_path / "m.gguf", "gemma")
    own = Checkpoint.open(tmp_path / "m.gguf")
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = own.tensors[name].shape
    tensors = pair(f"{PREFIX}{name.removesuffix('.weight')}", (rows, columns))
    opened = Checkpoint.open(tmp_path / "m.gguf", write_adapter(tmp_path / "a", tensors, lora_alpha=4))
    b, a = (tensors[f"{PREFIX}{name.removesuffix('weight')}lora_{half}.weight"] for half in "BA")
    np.testing.assert_allclose(opened.rows(name, 0, rows), own.rows(name, 0, rows) + b @ a, atol=1e-5)
    assert opened.weights_fingerprint() != own.weights_fingerprint()


def test_without_an_adapter_nothing_changes(base):
    own, empty = Checkpoint.open(base), Checkpoint.open(base, ())
    assert (own.tensors, own.config, own.notes, own.adapters) == (empty.tensors, empty.config, empty.notes, ())
    assert own.fingerprint() == empty.fingerprint()
    assert json.loads((base / "config.json").read_text()) == own.config_dict() == config()
