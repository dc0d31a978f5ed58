"""Where a model is cut: spans, balanced points, and the strict map from the checkpoint's tensors to a part's."""

import itertools
import math

import pytest

from gemma_deploy.checkpoint import ModelConfig, expected_tensors
from gemma_deploy.errors import CheckpointError, UsageError
from gemma_deploy.partition import recommended_points, span_bytes, spans_of, whole
from gemma_deploy.partition.mapper import ParameterMapper
from gemma_deploy.testing import TINY_CONFIGS


def config(**changes):
    return ModelConfig.from_dict({**TINY_CONFIGS["gemma3_text"], **changes}, "config.json")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ((), [("whole", 0, 7, True, True)]),
        ((3,), [("bottom", 0, 3, True, False), ("top", 3, 7, False, True)]),
        ((2, 5), [("bottom", 0, 2, True, False), ("trunk", 2, 5, False, False), ("top", 5, 7, False, True)]),
        (
            (1, 2, 6),
            [
                ("bottom", 0, 1, True, False), ("trunk1", 1, 2, False, False), ("trunk2", 2, 6, False, False),
                ("top", 6, 7, False, True),
            ],
        ),
    ],
)  # fmt: skip
def test_points_begin_a_new_part(points, expected):
    spans = spans_of(7, points)
    assert [(span.name, span.start, span.stop, span.embeds, span.heads) for span in spans] == expected
    assert [span.kind for span in spans] == [span.name.rstrip("12") for span in spans]


@pytest.mark.parametrize("points", [(0,), (7,), (3, 3), (5, 2), (8,), (-1,)])
def test_points_that_leave_a_part_empty_are_refused(points):
    with pytest.raises(UsageError, match="at least one layer each"):
        spans_of(7, points)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("vocab", [512, 16, 4096])
def test_recommended_points_are_the_best_there_are(tied, parts, vocab):
    facts = config(tie_word_embeddings=tied, vocab_size=vocab)

    def largest(points):
        return max(span_bytes(facts, span) for span in spans_of(7, points))

    points = recommended_points(facts, parts)
    assert len(points) == parts - 1
    assert largest(points) == min(map(largest, itertools.combinations(range(1, 7), parts - 1)))


def test_the_table_counts_twice_when_it_is_tied():
    facts = config(vocab_size=4096)  # the table outweighs the layers
    assert recommended_points(facts) == (1, 6)
    with pytest.raises(UsageError, match="7 layers do not make 8 parts"):
        recommended_points(facts, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_stage_are_two_a_number_or_those_given(tied):
    facts = config(tie_word_embeddings=tied)
    numbers = {name: math.prod(shape) for name, shape in expected_tensors(facts).items()}
    assert span_bytes(facts, whole(7)) == 2 * sum(numbers.values())
    assert span_bytes(facts, whole(7), dict.fromkeys(numbers, 5)) == 5 * len(numbers)
    bottom, trunk, top = (span_bytes(facts, span) for span in spans_of(7, (2, 5)))
    twice = 2 * numbers["model.embed_tokens.weight"] if tied else 0
    assert bottom + trunk + top == span_bytes(facts, whole(7)) + twice
    layers = [
        number for name, number in numbers.items() if name.startswith(tuple(f"model.layers.{i}." for i in (2, 3, 4)))
    ]
    assert trunk == 2 * sum(layers)


def test_sizes_that_are_given_decide_where_to_cut():
    facts = config()
    sizes = {name: int(".layers.6." in name) for name in expected_tensors(facts)}
    assert recommended_points(facts, 2, sizes) == (1,)  # nothing is smaller than the last layer: the earliest point
    sizes = {name: 100 if ".layers.6." in name else int(".layers." in name) for name in expected_tensors(facts)}
    assert recommended_points(facts, 3, sizes) == (3, 6)  # what is in front of the last part is even, too
    sizes = {name: 1 for name in expected_tensors(facts) if ".layers." in name}
    assert recommended_points(facts, 7, sizes) == (1, 2, 3, 4, 5, 6)
    assert recommended_points(facts, 1, sizes) == ()
    for parts in (0, -1):
        with pytest.raises(UsageError, match="at least one layer each"):
            recommended_points(facts, parts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("points", [(), (3,), (1, 6), (2, 3, 5)])
def test_every_tensor_has_a_part_and_only_a_tied_table_has_two(tied, points):
    facts = config(tie_word_embeddings=tied)
    seen = []
    for span in spans_of(7, points):
        mapper = ParameterMapper(facts, span)
        seen += mapper.sources.values()
        layers = {int(name.split(".")[2]) for name in mapper.sources if name.startswith("model.layers.")}
        assert layers == set(range(span.stop - span.start))
    twice = ["model.embed_tokens.weight"] if tied and points else []
    assert sorted(seen) == sorted([*expected_tensors(facts), *twice])


def test_the_map_renumbers_and_is_strict():
    facts = config()
    mapper = ParameterMapper(facts, spans_of(7, (2, 5))[2])
    assert mapper.local("model.layers.5.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert mapper.local("model.layers.4.mlp.up_proj.weight") is None
    assert mapper.local("model.embed_tokens.weight") == "lm_head.weight"
    names = set(mapper.sources)
    mapper.check(names, "here")
    wrong = (names - {"lm_head.weight"}) | {"model.layers.2.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError) as error:
        mapper.check(wrong, "here")
    assert error.value.problems == ("missing: lm_head.weight", "left over: model.layers.2.mlp.up_proj.weight")


def test_the_whole_keeps_every_name():
    mapper = ParameterMapper(config(), whole(7))
    assert all(local == name for local, name in mapper.sources.items())


def test_what_does_not_fit_a_stage_is_told_with_its_layers():
    mapper = ParameterMapper(config(), spans_of(7, (2, 6))[1])
    with pytest.raises(CheckpointError) as error:
        mapper.check(set(list(mapper.sources)[2:]) | {"z", "a"}, "trunk.safetensors")
    assert str(error.value).startswith("trunk.safetensors: 4 tensor(s) do not fit the part trunk (layers 2 to 5)")
    assert error.value.problems == (
        *(f"missing: {name}" for name in list(mapper.sources)[:2]), "left over: a", "left over: z"
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 512), (511, 64), (513, 64), (512,), (512, 64, 1)])
def test_a_tensor_of_another_shape_is_refused(shape):
    mapper = ParameterMapper(config(), spans_of(7, (2,))[1])
    mapper.check_shape("lm_head.weight", (512, 64), "here")
    mapper.check_shape("model.layers.0.mlp.down_proj.weight", (64, 160), "here")
    with pytest.raises(CheckpointError) as error:
        mapper.check_shape("lm_head.weight", shape, "here")
    assert f"lm_head.weight is {list(shape)}, expected [512, 64]" in str(error.value)
