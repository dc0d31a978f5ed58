"""The edges of every rule: the last value that passes, and the first that is refused."""

import pytest

from gemma_deploy.errors import RecipeError
from gemma_deploy.recipe import Recipe, check_against_model
from gemma_deploy.recipe.rules import LENGTH_MULTIPLE, contradictions, rule
from tests.recipe.test_recipe import MINIMAL, load, problems

INT8 = "backend.dtype=int8"


@pytest.fixture
def recipe() -> Recipe:
    return load()


def quantize(kind, args="{}"):
    return f"frontend.quantize={{type: {kind}, calib_args: {args}}}"


@pytest.mark.parametrize(
    "name",
    [
        " x",
        "x ",
        ".x",
        "-x",
        "x.partial",
        "a/b",
        "a\\b",
        "a\tb",
        "a\x1fb",
        chr(0xD800),
        chr(0xDFFF),
        "x" * 201,
        "ü" * 101,
    ],
)
def test_a_name_that_is_no_directory_name(recipe, name):
    changed = recipe.model_copy(update={"name": name})
    found = contradictions(changed, set())
    assert [path for path, _ in found] == [("name",)]
    assert "expected a plain directory name" in found[0][1]


@pytest.mark.parametrize("name", ["x", "a b", "a-b.c", "x.partial2", "a~b", "\u4e2d", "\ud7ff", "x" * 200, "ü" * 100])
def test_a_name_that_is_a_directory_name(recipe, name):
    assert contradictions(recipe.model_copy(update={"name": name}), set()) == []


@pytest.mark.parametrize(
    ("path", "kind", "right"),
    [
        ("/m/a.gguf", "gguf", None), ("/m/a.GGUF", "gguf", None), ("/m/a", "huggingface", None),
        ("/m/a.gguf", "huggingface", "gguf"), ("/m/a", "gguf", "huggingface"),
    ],
)  # fmt: skip
def test_the_type_agrees_with_the_file(path, kind, right):
    asked = f"frontend.checkpoint={path}", f"frontend.type={kind}"
    if right is None:
        assert load(MINIMAL, *asked).frontend.type == kind
    else:
        (problem,) = problems(MINIMAL, *asked)
        assert problem.endswith(f"{kind} contradicts frontend.checkpoint '{path}': set frontend.type: {right}")


@pytest.mark.parametrize(
    ("dtype", "kind", "passes"),
    [
        ("fp16", "w16kv8", True), ("bf16", "w16kv8", True), ("int8", "w16kv8", True), ("fp32", "w16kv8", False),
        ("int8", "w8a16", True), ("fp16", "w8a16", False), ("fp32", "w4a16", False), ("bf16", "w8a8+kv8", False),
    ],
)  # fmt: skip
def test_the_dtype_agrees_with_quantize(dtype, kind, passes):
    asked = f"backend.dtype={dtype}", quantize(kind)
    if passes:
        assert load(MINIMAL, *asked).backend.dtype == dtype
    else:
        (problem,) = problems(MINIMAL, *asked)
        assert f"backend.dtype: {dtype} contradicts frontend.quantize.type {kind} (" in problem


@pytest.mark.parametrize(
    ("kind", "bits"), [("w8a16", 8), ("w8a8", 8), ("w4a16", 4), ("w4a16_gptq+kv8", 4), ("w16kv8", 16)]
)
@pytest.mark.parametrize("given", [4, 8, 16])
def test_the_bits_are_those_of_the_type(kind, bits, given):
    asked = INT8, quantize(kind, f"{{wbits: {given}}}")
    if given == bits:
        assert load(MINIMAL, *asked).frontend.quantize.calib_args.wbits == bits
    else:
        (problem,) = problems(MINIMAL, *asked)
        assert f"calib_args.wbits: {given} contradicts" in problem
        assert problem.endswith(f"write {bits}, or remove it")


@pytest.mark.parametrize(
    ("kind", "args", "key"),
    [
        ("w8a8", "{keep_a16: 0.1}", None), ("w8a16_gptq", "{keep_a16: 0.1}", "keep_a16"),
        ("w8a16", "{keep_a16: 0.0}", "keep_a16"), ("w4a16", "{keep_w8: [v_proj]}", None),
        ("w8a8", "{keep_w8: [v_proj]}", "keep_w8"), ("w16kv8", "{keep_w8: []}", "keep_w8"),
        ("w8a8", "{groupsize: -1}", None), ("w8a8", "{groupsize: 64}", "groupsize"), ("w8a8", "{}", None),
        ("w8a16_gptq", "{groupsize: 64}", None),
    ],
)  # fmt: skip
def test_settings_of_one_quantizer(kind, args, key):
    if key is None:
        assert load(MINIMAL, INT8, quantize(kind, args)).frontend.quantize.type == kind
    else:
        (problem,) = problems(MINIMAL, INT8, quantize(kind, args))
        assert f": frontend.quantize.calib_args.{key}: " in problem


@pytest.mark.parametrize("prefill", range(1, 50))
def test_lengths_are_multiples_of_16(prefill):
    assert LENGTH_MULTIPLE == 16
    asked = f"frontend.shape.input_ids=[[{prefill}],[256]]"
    near = [str(length) for length in (prefill // 16 * 16, prefill // 16 * 16 + 16) if length]
    if prefill in (16, 32, 48):
        assert load(MINIMAL, asked).prefill_length == prefill
    else:
        (problem,) = problems(MINIMAL, asked)
        assert problem.endswith(f"is not a multiple of 16; nearest: {' or '.join(near)}")


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [("[[128],[128]]", True), ("[[128],[112]]", False), ("[[16],[16]]", True)],
)
def test_the_cache_holds_the_prompt(lengths, passes):
    asked = f"frontend.shape.input_ids={lengths}"
    if passes:
        assert load(MINIMAL, asked).prefill_length
    else:
        assert [problem for problem in problems(MINIMAL, asked) if "is shorter than prefill length" in problem]


@pytest.mark.parametrize(
    "lengths",
    ["[[128]]", "[[128],[256],[512]]", "[[128, 16],[256]]", "[[128],[256, 16]]", "[]", "[[],[256]]", "[[],[]]"],
)
def test_there_is_one_prefill_and_one_context_length(lengths):
    (problem,) = problems(MINIMAL, f"frontend.shape.input_ids={lengths}")
    assert problem.endswith("expected [[prefill length], [context length]], such as [[1024], [2048]]")


@pytest.mark.parametrize(
    ("prompt", "decode", "wrong"),
    [(128, 128, []), (129, 128, ["prompt_tokens"]), (128, 129, ["decode_tokens"]), (1, 1, []),
     (129, 129, ["prompt_tokens", "decode_tokens"])],
)  # fmt: skip
def test_the_comparison_fits_the_graphs(prompt, decode, wrong):
    asked = f"parity.prompt_tokens={prompt}", f"parity.decode_tokens={decode}"
    if not wrong:
        assert load(MINIMAL, *asked).parity.prompt_tokens == prompt
    else:
        assert [line.split("parity.")[2].partition(":")[0] for line in problems(MINIMAL, *asked)] == wrong


def test_a_cache_as_long_as_the_prompt_has_no_room_for_steps():
    asked = "frontend.shape.input_ids=[[128],[128]]", "parity.decode_tokens={}"
    assert load(MINIMAL, asked[0], asked[1].format(0)).parity.decode_tokens == 0
    (problem,) = problems(MINIMAL, asked[0], asked[1].format(1))
    assert problem.endswith("1 steps do not fit: prefill fills 128 of 128 cache slots, so write at most 0")


def test_data_sets_are_those_there_are():
    (problem,) = problems(MINIMAL, "dataset.name=c5")
    assert problem.startswith("-s dataset.name=c5: dataset.name: 'c5' is not one of 'c4', 'ceval', 'alpaca'")
    (problem,) = problems(MINIMAL, "dataset.name='c4:1,alpaca:2'", "dataset.nsamples=4")
    assert ": dataset.nsamples: 4, but the windows of c4:1,alpaca:2 add up to 3: leave it out" in problem


@pytest.mark.parametrize("address", ["auto", "host:6379", "ray://10.0.0.1:10001", "h:1", "h:65535"])
def test_addresses_of_a_cluster(recipe, address):
    assert load(MINIMAL, f"workspace.cluster='{address}'").workspace.cluster == address


@pytest.mark.parametrize("address", ["host", "host:", ":1", "http://host:1", "host:123456", "a b:1", "auto2"])
def test_what_is_no_address_of_a_cluster(address):
    (problem,) = problems(MINIMAL, f"workspace.cluster='{address}'")
    assert problem.endswith(f"workspace.cluster: got '{address}', expected auto, HOST:PORT or ray://HOST:PORT")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((), True), (("backend", "dtype"), False), (("backend",), False), (("frontend", "quantize"), False),
        (("frontend", "quantize", "type"), False), (("frontend", "shape"), True), (("backend", "type"), True),
        (("backend", "dtype2"), True),
    ],
)  # fmt: skip
def test_a_rule_is_left_out_where_a_key_that_it_reads_is_wrong_already(bad, told):
    spoiled = load(MINIMAL, INT8, quantize("w8a16"))
    spoiled = spoiled.model_copy(update={"backend": spoiled.backend.model_copy(update={"dtype": "fp16"})})
    found = [path for path, _ in contradictions(spoiled, {bad} if bad else set())]
    assert (("backend", "dtype") in found) is told


def test_a_rule_is_kept_with_the_keys_that_it_reads(recipe, monkeypatch):
    monkeypatch.setattr("gemma_deploy.recipe.rules.RULES", rows := [])

    def function(of):
        yield ("a",), of.name

    assert rule("a.b", "c")(function) is function
    assert rows == [((("a", "b"), ("c",)), function)]
    assert contradictions(recipe, set()) == [(("a",), "small")]


def test_the_context_may_be_as_long_as_the_model_was_made_for(recipe):
    check_against_model(recipe, 256)
    with pytest.raises(RecipeError) as refused:
        check_against_model(recipe, 255)
    assert "(1 problem)" in str(refused.value)
    assert "context length 256 is longer than the model's max_position_embeddings 255" in str(refused.value)
    with pytest.raises(RecipeError, match=r"\(2 problems\)"):
        check_against_model(recipe, 256, ["a: b", "c: d"])
