"""Which rows and columns a rank holds: together the whole tensor, and every query head beside its own KV head."""

from dataclasses import FrozenInstanceError, fields

import pytest

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.partition import ArtifactPart, division_problems, parts_of, spans_of, whole
from gemma_deploy.partition.ranks import (
    input_channels,
    kv_head_blocks,
    kv_heads_of,
    obstacles,
    repeated_heads,
    row_blocks,
    sharding,
)
from gemma_deploy.testing import TINY_CONFIGS


def config(heads=4, kv=2, **changes):
    raw = {**TINY_CONFIGS["gemma"], "num_attention_heads": heads, "num_key_value_heads": kv, **changes}
    return ModelConfig.from_dict(raw, "config.json")


# heads and KV heads of every Gemma, and some where no number divides the other
@pytest.mark.parametrize(
    ("heads", "kv"), [(8, 1), (16, 16), (8, 4), (16, 8), (32, 16), (4, 1), (12, 4), (12, 6), (10, 5)]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_query_head_finds_its_kv_head_in_its_rank(heads, kv, ranks):
    facts = config(heads, kv)
    if any("heads" in problem for problem in obstacles(facts, ranks, align_qkv=True)):
        pytest.skip("not divisible")
    local, local_kv = heads // ranks, kv_heads_of(kv, ranks)
    assert local % local_kv == 0
    for rank in range(ranks):
        held = [head for start, stop in kv_head_blocks(kv, rank, ranks) for head in range(start, stop)]
        assert len(held) == local_kv  # a head that is repeated inside a rank is a block of its own
        for query in range(local):
            wanted = (rank * local + query) // (heads // kv)
            assert held[query // (local // local_kv)] == wanted


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_the_whole(ranks):
    facts = config()
    for name, shape in expected_tensors(facts).items():
        axis = sharding(name)
        assert (axis is None) == (len(shape) == 1)
        if axis != "rows":
            continue
        rows = [
            row
            for rank in range(ranks)
            for start, stop in row_blocks(name, shape[0], facts.layer_of(name), rank=rank, ranks=ranks)
            for row in range(start, stop)
        ]
        if ranks == 4 and name.split(".")[-2] in ("k_proj", "v_proj"):  # two KV heads, each in two ranks
            assert rows == [*range(32), *range(32), *range(32, 64), *range(32, 64)]
        else:
            assert rows == list(range(shape[0]))


def test_the_scale_of_a_matrix_divided_by_columns_is_repeated():
    layer = "model.layers.0."
    assert [sharding(f"{layer}{name}") for name in ("mlp.down_proj.weight", "mlp.down_proj.scale")] == ["columns", None]
    assert [sharding(f"{layer}{name}") for name in ("mlp.up_proj.weight", "mlp.up_proj.scale")] == ["rows", "rows"]
    assert sharding("model.rotary_emb.sliding_attention.cos") is None


def test_what_cannot_be_divided_is_said_all_at_once():
    assert division_problems(config(8, 1), (), 1, align_qkv=False) == []
    assert division_problems(config(8, 1), (1, 2), 4, align_qkv=True) == []
    assert division_problems(config(8, 2, vocab_size=511), (3,), 3, align_qkv=False) == [
        "frontend.model_kwargs.tp: 3 ranks do not divide the 8 attention heads",
        "frontend.model_kwargs.tp: 3 ranks neither divide the 2 key/value heads nor are a multiple of them; "
        "set frontend.model_kwargs.align_qkv: true to repeat some of them",
        "frontend.model_kwargs.tp: 3 ranks do not divide the intermediate_size 160",
        "frontend.model_kwargs.tp: 3 ranks do not divide the vocab_size 511",
        "split.points: split points [3] do not cut 3 layers into stages of at least one layer each; "
        "expected increasing numbers between 1 and 2: layer numbers that begin a new stage",
    ]


@pytest.mark.parametrize(("heads", "kv"), [(8, 1), (16, 16), (8, 4), (16, 8), (32, 16), (4, 1), (12, 4), (12, 6)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_heads_are_repeated_without_being_asked_where_a_rank_has_whole_copies(heads, kv, ranks):
    about_kv = [problem for problem in obstacles(config(heads, kv), ranks, align_qkv=False) if "key/value" in problem]
    assert bool(about_kv) == (kv % ranks != 0 and ranks % kv != 0)


def test_repeated_heads_are_told_in_a_sentence():
    assert [repeated_heads(config(8, kv), 4) for kv in (8, 4)] == [None, None]
    assert repeated_heads(config(8, 1), 4) == (
        "tp 4: the model's 1 key/value head is repeated to 4, 1 in each rank: "
        "k_proj, v_proj and the KV cache take 4 times the memory over all ranks"
    )
    assert repeated_heads(config(12, 4), 6) == (
        "tp 6: the model's 4 key/value heads are repeated to 12, 2 in each rank: "
        "k_proj, v_proj and the KV cache take 3 times the memory over all ranks"
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_columns_of_a_rank_are_those_of_the_checkpoints_matrices(ranks):
    """Those divided by columns stand alone, the others with their equals; every layer has the same."""
    facts = config()
    columns = {
        name.split(".")[-2]: shape[1]
        for name, shape in expected_tensors(facts).items()
        if name.endswith("_proj.weight")
    }
    found = input_channels(facts, ranks)
    assert found == {
        "q_proj, k_proj, v_proj, gate_proj, up_proj": columns["q_proj"],
        "o_proj": columns["o_proj"] // ranks,
        "down_proj": columns["down_proj"] // ranks,
    }
    assert all(type(count) is int for count in found.values())


def test_scales_of_groups_are_divided_as_their_columns_are():
    layer = "model.layers.0."
    assert sharding(f"{layer}mlp.down_proj.scale", 1) is None
    assert sharding(f"{layer}mlp.down_proj.scale", 2) == "columns"
    assert [sharding(f"{layer}mlp.up_proj.scale", dimensions) for dimensions in (1, 2)] == ["rows", "rows"]
    assert sharding(f"{layer}input_layernorm.weight", 2) is None
    assert sharding("model.embed_tokens.column_scale") is None
    assert [sharding(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")] == ["rows", "rows"]


def test_a_rank_that_is_not_divided():
    part = ArtifactPart(spans_of(3, (1,))[0])
    assert (part.rank, part.ranks, part.folder) == (0, 1, "bottom")


def test_folders():
    assert [part.folder for part in parts_of(3, (), 1)] == [""]
    assert [part.folder for part in parts_of(3, (), 2)] == ["rank0", "rank1"]
    assert [part.folder for part in parts_of(3, (1,), 2)] == ["bottom/rank0", "bottom/rank1", "top/rank0", "top/rank1"]
    assert ArtifactPart(spans_of(3, (1,))[1]).file("iter0.onnx") == "top/iter0.onnx"
    assert ArtifactPart(spans_of(3, ())[0]).file("iter0.onnx") == "iter0.onnx"


@pytest.mark.parametrize("made", [whole(3), ArtifactPart(whole(3))], ids=lambda made: type(made).__name__)
def test_it_cannot_be_changed(made):
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(made)[0].name, None)
