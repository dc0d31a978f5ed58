"""`backend.type: native` from checkpoint to text: proven against transformers, past the window, broken and seen red."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gemma_deploy.artifact.opened import Artifact
from gemma_deploy.backends.native import library, options
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
from gemma_deploy.cli import main
from gemma_deploy.compile import compile_recipe
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, DeployError, NotBuiltError, RecipeError, UsageError
from gemma_deploy.names import PARAMS
from gemma_deploy.recipe import Recipe
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.runtime.sampling import Sampling
from gemma_deploy.testing import TINY_EXPERTS, TINY_PER_LAYER, write_tiny_checkpoint
from tests.calibration.make import write_tokenizer
from tests.native.conftest import ROOT

KINDS = ("gemma", "gemma2", "gemma3_text", "vaultgemma", "gemma4_text", "gemma4_unified_text")
SCHEMES = (
    "fp32", "bf16", "fp16", "w8a16", "w4a16_rtn", "w8a16_gptq", "w8a8", "w4a16_gptq", "w8a16+kv8", "w8a16_gptq+kv8",
    "w8a8+kv8", "w4a16_rtn+kv8", "fp16+kv8", "bf16+kv8",
)  # fmt: skip
FLOATS = ("fp32", "bf16", "fp16")
MANY = 1 << 26  # bytes of caches


def recipe_of(folder, kind, scheme, *, quantize=None, context=400, type="native", **changes):
    """The recipe of an artifact x of a tiny model, in `folder`; with keys of frontend.quantize."""
    checkpoint = write_tiny_checkpoint(folder / "ck", kind, **changes)
    write_tokenizer(checkpoint)
    base = scheme.removesuffix("+kv8")
    floats = base in FLOATS
    quantize_type = "w16kv8" if floats and base != scheme else None if floats else scheme
    recipe = {
        "name": "x",
        "frontend": {"checkpoint": str(checkpoint), "shape": {"input_ids": [[48], [context]]}}
        | ({"quantize": {"type": quantize_type} | (quantize or {})} if quantize_type else {}),
        "backend": {"type": type, "dtype": base if floats else "int8"},
        "parity": {"prompt_tokens": 40, "decode_tokens": 8},  # five windows of 8
        "workspace": {"path": str(folder / "w")},
    }
    if scheme.endswith("+kv8") and "gptq" not in scheme:  # factors of the cache alone: a little text will do
        recipe["dataset"] = {"name": "c4:4", "seqlen": 64}
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe))
    return Recipe.load(file)


@pytest.fixture(scope="module")
def compiled(native_library, tmp_path_factory):
    """An artifact of a tiny Gemma 3 in int8."""
    result = compile_recipe(recipe_of(tmp_path_factory.mktemp("native"), "gemma3_text", "w8a16"))
    assert result.parity.passed
    return result.path


DEFAULT = {("gemma3_text", "fp32"), ("gemma4_text", "w8a16+kv8"), ("gemma2", "w4a16_rtn")}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        pytest.param(kind, scheme, marks=() if (kind, scheme) in DEFAULT else pytest.mark.slow)
        for kind in KINDS
        for scheme in SCHEMES
    ],
)
def test_it_compiles_proven(native_library, tmp_path, kind, scheme):
    result = compile_recipe(recipe_of(tmp_path, kind, scheme))
    assert result.parity.passed
    lines = {line.comparison for line in result.parity.lines}
    reference = "hf bf16" if scheme.startswith("bf16") else "hf"
    assert {f"{reference} = shipped", "strict = shipped", "checkpoint = stored weights"} <= lines


@pytest.mark.parametrize("kind", ["gemma3_text", pytest.param("gemma4_text", marks=pytest.mark.slow)])
def test_a_table_by_rows_whose_columns_are_folded_compiles_proven(native_library, tmp_path, kind):
    """Calibration moves factors of columns from the table to the last norm; what is looked up takes them back."""
    result = compile_recipe(recipe_of(tmp_path, kind, "w8a16_gptq", quantize={"table": "int8"}))
    assert result.parity.passed
    assert " columns=" in plan_in(result.path)


def opened(artifact, plan=None, **options):
    return Model(plan or plan_in(artifact), artifact / PARAMS, **{"threads": 2, "cache_bytes": MANY, **options})


@pytest.fixture(scope="module")
def ids():
    return [int(one) for one in np.random.default_rng(0).integers(3, 500, 330)]


def in_pieces(model, ids, sizes):
    """Logits of all tokens, read in pieces of these sizes and then one by one."""
    sequence, rows, at = model.sequence(), [], 0
    while at < len(ids):
        size = next(sizes, 1)
        piece = ids[at : at + size]
        rows.append(model.logits([(sequence, piece, len(piece))]))
        at += size
    model.drop(sequence)
    return np.concatenate(rows)


def compare_in_company(artifact, ids, cuts, **options):
    """Logits of all tokens in one piece with those of other cuts, (threads, sizes) each, and of mixed steps."""
    whole = opened(artifact, **options)
    expected = in_pieces(whole, ids, iter([len(ids)]))
    assert np.isfinite(expected).all()
    for threads, sizes in cuts:
        model = opened(artifact, threads=threads, **options)
        np.testing.assert_array_equal(in_pieces(model, ids, iter(sizes)), expected)
        model.close()
    first, second = whole.sequence(), whole.sequence()
    rows = whole.logits([(first, ids[:140], 1), (second, ids[5:9], 4)])
    np.testing.assert_array_equal(rows[0], expected[139])
    together = whole.logits([(second, ids[9:12], 1), (first, ids[140:150], 10)])
    np.testing.assert_array_equal(together[1:], expected[140:150])
    np.testing.assert_array_equal(rows[1:], in_pieces(whole, ids[5:9], iter([4])))
    whole.close()


@pytest.mark.parametrize("cache", ["bfloat16", "float32", "int8"])
def test_a_token_gives_the_same_bits_whatever_its_company(compiled, ids, cache):
    """Three pages of 128 positions and 40 windows: in one piece, in others, with 1 to 3 threads, among other texts."""
    compare_in_company(compiled, ids, ((1, [200, 1, 17, 100]), (3, [1, 2, 127, 128, 5]), (2, [256, 60])), cache=cache)


def test_ranks_are_those_of_the_logits(compiled, ids):
    """Of several texts at once, in parts of other sizes than the vocabulary; against float64."""
    model, other = opened(compiled), opened(compiled, threads=3)
    pieces = [(ids[:40], 19), (ids[40:43], 1), (ids[50:90], 0)]
    rows = model.logits([(model.sequence(), *piece) for piece in pieces])
    for top in (0, 1, 7, 512):
        asked = [int(one) for one in np.random.default_rng(top).integers(0, 512, 20)]
        for one in (model, other):
            found = one.ranked([(one.sequence(), *piece) for piece in pieces], top=top, asked=asked)
            order = np.lexsort((np.broadcast_to(np.arange(512), rows.shape), -rows))[:, :top]
            np.testing.assert_array_equal(found.ids, order)
            np.testing.assert_array_equal(found.logits, np.take_along_axis(rows, order, 1))
            np.testing.assert_array_equal(found.asked, rows[np.arange(20), asked])
            sums = np.log(np.exp(rows.astype(np.float64)).sum(1))
            np.testing.assert_allclose(found.log_sums, sums, rtol=2e-7)  # a float32's last bit is 1.2e-7
    room = other.room(20)
    room[:, :512] = rows
    given = other.rank(room[:20, :512], top=7, asked=asked)
    order = np.lexsort((np.broadcast_to(np.arange(512), rows.shape), -rows))[:, :7]
    np.testing.assert_array_equal(given.ids, order)
    np.testing.assert_array_equal(given.asked, found.asked)
    np.testing.assert_array_equal(given.log_sums, found.log_sums)
    with pytest.raises(ValueError, match="no rows of a room"):
        other.rank(rows[::2])
    with pytest.raises(DeployError, match="top 513, not 0 to 512"):
        model.ranked([(model.sequence(), ids[:1], 1)], top=513)
    with pytest.raises(DeployError, match="token 512 that is asked for is not in the table"):
        model.ranked([(model.sequence(), ids[:1], 1)], asked=[512])
    counts = other.thread_counts()
    assert counts.pieces >= counts.helped >= 0
    assert counts.pieces > 1000
    model.close()
    other.close()


def test_channels_of_a_cache_of_codes_have_factors(native_library, tmp_path, ids):
    """Whatever the factors are, they change no number but by rounding; where channels differ, they save one."""
    path = compile_recipe(recipe_of(tmp_path, "gemma4_text", "w8a16+kv8")).path
    plan, params = plan_in(path), (path / PARAMS).read_bytes()
    assert "cache=int8" in plan
    changed, rng = bytearray(params), np.random.default_rng(8)
    for place, size in factors_in(plan):
        factors = np.frombuffer(params, np.float32, size, place) * np.exp(rng.uniform(-0.3, 0.3, size))
        changed[place : place + 4 * size] = factors.astype(np.float32).tobytes()
    (tmp_path / "changed").write_bytes(changed)

    def logits(plan, file, **options):
        model = Model(plan, file, threads=2, cache_bytes=MANY, **options)
        found = in_pieces(model, ids[:200], iter([150]))
        model.close()
        return found

    right = logits(plan, path / PARAMS, cache="float32")
    np.testing.assert_array_equal(logits(plan, tmp_path / "changed", cache="float32"), right)
    with_codes = [logits(plan, file) for file in (path / PARAMS, tmp_path / "changed")]
    errors = [np.abs(one - right).max() / np.abs(right).max() for one in with_codes]
    assert errors[0] > 0
    assert max(errors) < 0.08, errors
    broken = [plan.replace(f"{part}_factor=", "unused=") for part in ("key", "value")]
    for text in broken:
        with pytest.raises(ArtifactError, match="'unused' is not known"):
            logits(text, path / PARAMS)


def factors_in(plan):
    """Where the factors of caches lie in the parameter file, and how many numbers they are."""
    names = {part.split("=")[1] for line in plan.splitlines() for part in line.split() if "_factor=model." in part}
    places = [
        dict(part.split("=") for part in line.split()[1:]) for line in plan.splitlines() if line.startswith("vector")
    ]
    found = [(int(place["at"]), int(place["size"])) for place in places if place["name"] in names]
    assert len(found) == len(names) > 0
    return found


def test_forks_share_a_beginning_and_go_their_own_ways(compiled, ids):
    model = opened(compiled)
    expected = in_pieces(model, ids, iter([len(ids)]))
    other = in_pieces(model, [*ids[:135], *ids[:20]], iter([200]))
    first = model.sequence()
    model.logits([(first, ids[:135], 1)])
    second = model.sequence(like=first)
    np.testing.assert_array_equal(model.logits([(second, ids[:20], 20)]), other[135:])
    np.testing.assert_array_equal(model.logits([(first, ids[135:160], 25)]), expected[135:160])
    model.drop(first)
    np.testing.assert_array_equal(
        model.logits([(second, [9], 1)]), in_pieces(model, [*ids[:135], *ids[:20], 9], iter([200]))[-1:]
    )
    model.close()


def test_a_sequence_goes_back_as_far_as_its_windows_have(compiled, ids):
    model = opened(compiled)
    expected = in_pieces(model, ids, iter([len(ids)]))
    sequence = model.sequence()
    model.logits([(sequence, ids[:300], 1)])
    for length in (290, 260):
        model.rewind(sequence, length)
        np.testing.assert_array_equal(model.logits([(sequence, ids[length:330], 1)])[0], expected[-1])
    with pytest.raises(DeployError, match="can not go back to 100 tokens"):
        model.rewind(sequence, 100)
    np.testing.assert_array_equal(model.logits([(sequence, ids[:1], 1)]).shape, (1, 512))
    model.rewind(sequence, 0)
    np.testing.assert_array_equal(model.logits([(sequence, ids, 1)])[0], expected[-1])
    model.close()


def test_memory_for_caches_that_is_out_is_an_answer(compiled, ids):
    model = opened(compiled, cache_bytes=300_000)  # a page of each kind of layer, not two
    first, second = model.sequence(), model.sequence()
    kept = model.logits([(first, ids[:100], 1)])
    with pytest.raises(DeployError, match="no memory is left for the keys and values"):
        model.logits([(second, ids[:130], 1), (first, ids[100:140], 1)])
    model.rewind(first, 99)
    np.testing.assert_array_equal(model.logits([(first, ids[99:100], 1)]), kept)
    model.close()


@pytest.mark.parametrize("level", ["plain", "avx2"])
def test_levels_agree(compiled, ids, level, monkeypatch):
    if level not in library.levels():
        pytest.skip(f"this processor has no {level}")

    def logits(exact):
        model = opened(compiled, cache="float32", exact=exact)
        assert model.level == (level if library.level_wanted() else library.levels()[0])
        found = in_pieces(model, ids[:150], iter([150]))
        model.close()
        return found

    expected = [logits(exact) for exact in (True, False)]
    monkeypatch.setenv(library.LEVEL_VARIABLE, level)
    found = [logits(exact) for exact in (True, False)]
    # Another order of sums; where activations are rounded it moves some to the next code, 1/16256 of the largest.
    for one, other, limit in zip(found, expected, (1e-5, 2e-3), strict=True):
        np.testing.assert_allclose(one, other, atol=limit * np.abs(other).max())  # 3e-6 and 3e-4 seen


def test_a_level_that_is_not_there_is_told(compiled, monkeypatch):
    monkeypatch.setenv(library.LEVEL_VARIABLE, "abacus")
    with pytest.raises(UsageError, match="GEMMA_DEPLOY_KERNELS=abacus: this processor has no such level"):
        opened(compiled)


def test_text_in_turns_and_sessions(compiled):
    engine = open_engine(Artifact.open(compiled))
    greedy = "".join(engine.stream("the cat", max_new_tokens=12))
    session = engine.session()
    start = engine.tokenizer.encode("the cat")
    assert "".join(session.reply(start, max_new_tokens=12)) == greedy
    said = session.ids[len(start) :]
    logits = session.read([7])
    other = engine.session()
    np.testing.assert_array_equal(other.read([*start, *said, 7]), logits)
    session.reset()
    assert "".join(session.reply(start, max_new_tokens=12)) == greedy


def test_looking_ahead_gives_the_same_text_in_fewer_steps(compiled):
    engine = open_engine(Artifact.open(compiled))
    start = engine.tokenizer.encode("the cat the cat the cat")
    plain = engine.session(endless=True)
    expected = "".join(plain.reply(start, max_new_tokens=60))
    stats = GenerationStats()
    session = engine.session(endless=True, lookup=True)
    assert "".join(session.reply(start, max_new_tokens=60, stats=stats)) == expected
    assert stats.tokens == plain.ids[len(start) :]
    assert 0 < stats.steps < 55  # of 59
    np.testing.assert_array_equal(session.read([7]), plain.read([7]))
    with pytest.raises(UsageError, match="what is drawn at random cannot be looked up"):
        engine.session(Sampling(temperature=1.0), lookup=True)


def broken_plans(plan):
    """What is wrong -> the text of a plan that says it."""
    return {
        "another rotary table": plan.replace(
            "frequencies=model.rotary_emb.sliding", "frequencies=model.rotary_emb.full"
        ),
        "a window one longer": plan.replace("window=8", "window=9"),
        "norms without their offset": plan.replace("offset=1.0", "offset=0.0"),
        "a norm of heads left out": plan.replace(" q_norm=model.layers.0.self_attn.q_norm.weight", "", 1),
        "the other activation": plan.replace("activation=gelu_pytorch_tanh", "activation=gelu"),
        "keys for values": plan.replace("v=model.layers.2.self_attn.v_proj", "v=model.layers.2.self_attn.k_proj"),
        "scores scaled otherwise": plan.replace("factor=0.2041241", "factor=0.2141241", 1),
    }


@pytest.mark.parametrize("wrong", sorted(broken_plans("layer heads")))
def test_a_plan_that_is_wrong_gives_other_logits(compiled, ids, wrong):
    plan = plan_in(compiled)
    changed = broken_plans(plan)[wrong]
    assert changed != plan
    models = [
        Model(text, compiled / PARAMS, threads=1, cache_bytes=MANY, cache="float32", exact=True)
        for text in (plan, changed)
    ]
    right, other = (in_pieces(model, ids[:40], iter([40])) for model in models)
    assert np.abs(right - other).max() > 1e-4 * np.abs(right).max()  # the gate's limit is 1e-5
    for model in models:
        model.close()


def damaged(plan):
    """A piece of the message -> a plan that is damaged."""
    return {
        "a plan begins with 'model'": plan.split("\n", 1)[1],
        "the plan is empty|it is empty": "",
        "'version' is 2": plan.replace("version=1", "version=2"),
        "no 'eps'": plan.replace(" eps=", " epsilon=", 1),
        "'eps' is nan": plan.replace(" eps=", " eps=nan other=", 1),
        "'q' is there twice|is there twice": plan.replace(" q=", " q=x q=", 1),
        "'colour' is not known": plan.replace("layer heads", "layer colour=red heads", 1),
        "no matrix 'nothing'": plan.replace(" q=model.layers.0.self_attn.q_proj.weight", " q=nothing", 1),
        "'heads' is no multiple of 'kv_heads'": plan.replace("heads=4 kv_heads=2", "heads=4 kv_heads=3", 1),
        "x 64, not": plan.replace("heads=4 kv_heads=2", "heads=8 kv_heads=2", 1),
        "'head_dim' is 33": plan.replace("head_dim=32", "head_dim=33", 1),
        "of a parameter file of": first_at(plan, 1 << 40),
        "no multiple of 64": first_at(plan, 4100),
        "'source' is 9": plan.replace("source=0", "source=9", 1),
        "6 layers, not 7": plan.rstrip("\n").rsplit("\n", 1)[0],
        "'form' is int3": plan.replace("form=int8", "form=int3", 1),
        "'group' is 7": plan.replace("group=0", "group=7", 1),
    }


def first_at(plan, place):
    """The first matrix lies elsewhere."""
    head, tail = plan.split("matrix ", 1)
    at = tail.index(" at=")
    return f"{head}matrix {tail[:at]} at={place}{tail[tail.index(' ', at + 4) :]}"


@pytest.mark.parametrize("words", sorted(damaged("matrix  at=0 b\n\nlayer")))
def test_a_damaged_plan_is_told_with_its_line(compiled, words):
    text = damaged(plan_in(compiled))[words]
    assert text != plan_in(compiled)
    with pytest.raises(ArtifactError, match=words):
        Model(text, compiled / PARAMS, cache_bytes=MANY)


def test_files_that_are_short_or_missing_are_told(compiled, tmp_path):
    short = tmp_path / PARAMS
    short.write_bytes((compiled / PARAMS).read_bytes()[:-4096])
    with pytest.raises(ArtifactError, match="of a parameter file of"):
        Model(plan_in(compiled), short, cache_bytes=MANY)
    with pytest.raises(ArtifactError, match="No such file"):
        Model(plan_in(compiled), tmp_path / "none", cache_bytes=MANY)
    with pytest.raises(ArtifactError, match="no file that holds anything"):
        Model(plan_in(compiled), tmp_path, cache_bytes=MANY)


def test_what_a_caller_gets_wrong_is_refused(compiled, ids):
    model = opened(compiled)
    sequence = model.sequence()
    for pieces, words in [
        ([(99, [1], 1)], "no sequence 99"),
        ([(sequence, [], 0)], "0 tokens"),
        ([(sequence, [1], 2)], "2 wanted"),
        ([(sequence, [512], 1)], "token 512 is not in the table"),
        ([(sequence, [-1], 1)], "token -1 is not in the table"),
        ([(sequence, [1], 1), (sequence, [2], 1)], "is there twice"),
        ([(sequence, ids + ids, 1)], "longer than the context of 400"),
    ]:
        with pytest.raises(DeployError, match=words):
            model.logits(pieces)
    with pytest.raises(DeployError, match="no sequence 77"):
        model.drop(77)
    model.logits([(sequence, ids, 1)])
    model.close()


@pytest.mark.parametrize(
    ("kind", "scheme", "changes", "words"),
    [
        ("gemma3n_text", "w8a16", {"altup_num_inputs": 9}, "an altup_num_inputs of at most 8, got 9"),
        ("gemma3n_text", "w8a16", {"vocab_size_per_layer_input": 500}, "that is a multiple of 16, got 500"),
        ("gemma4_text", "w8a16", TINY_PER_LAYER | {"hidden_size_per_layer_input": 24}, "a multiple of 16, got 24"),
        ("gemma4_text", "w8a16", TINY_EXPERTS | {"moe_intermediate_size": 40}, "a multiple of 16, got 40"),
        ("gemma3n_text", "w8a8", {}, "w8a8 is not built for a model of several streams"),
        ("gemma2", "w8a16", {"head_dim": 48}, "heads of a multiple of 32 channels, up to 512, got 48"),
    ],
)
def test_what_is_not_built_is_said_before_any_work(native_library, tmp_path, kind, scheme, changes, words):
    with pytest.raises((RecipeError, NotBuiltError), match=words):
        compile_recipe(recipe_of(tmp_path, kind, scheme, **changes))
    assert not (tmp_path / "w").exists()


def test_without_the_library_it_is_said_how_to_get_it(compiled, monkeypatch, tmp_path, capsys):
    library._loaded.cache_clear()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    try:
        assert main(["run", str(compiled), "-p", "x"]) == 2
    finally:
        library._loaded.cache_clear()
    said = capsys.readouterr().err
    assert "the library of backend.type native was not built" in said
    assert "install a C++17 compiler" in said


def test_nothing_is_compiled_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(options, "FOLDER", tmp_path)
    with pytest.raises(NotBuiltError, match="the library of native was not built with this package: install a C"):
        compile_recipe(recipe_of(tmp_path, "gemma2", "w8a16"))
    assert not (tmp_path / "w").exists()


def test_inspect_and_bench_name_the_level(compiled, monkeypatch, capsys):
    best = library.levels()[0]
    assert open_engine(compiled).level == best
    assert main(["inspect", str(compiled)]) == 0
    assert f"level on this machine | {best}" in " ".join(capsys.readouterr().out.replace("│", "|").split())
    monkeypatch.setenv(library.LEVEL_VARIABLE, "plain")
    assert main(["inspect", str(compiled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == {"level on this machine": "plain"}
    assert main(["bench", str(compiled), "--prompt-tokens", "8", "--decode-tokens", "4", "--repeat", "1"]) == 0
    assert "x, native plain, " in capsys.readouterr().out
    monkeypatch.setenv(library.LEVEL_VARIABLE, "sse9")
    assert main(["inspect", str(compiled), "--json"]) == 0
    assert "no such level" in json.loads(capsys.readouterr().out)["kernels"]["level on this machine"]


UNUSED = {
    *("torch", "transformers", "datasets", "onnx", "onnx_ir", "onnxruntime", "sympy", "google.protobuf"),
    *("safetensors", "jinja2", "yaml", "psutil", "click", "matplotlib", "huggingface_hub"),
    *("checkpoint.checkpoint", "checkpoint.config", "params.plan", "params.writer", "backends.native.plan", "recipe"),
}
LIBRARY_ALONE = """
import sys
from pathlib import Path
from gemma_deploy.backends.native.graph import plan_in
from gemma_deploy.backends.native.library import Model
folder = Path(sys.argv[1])
model = Model(plan_in(folder), folder / "params.safetensors", threads=1)
assert model.logits([(model.sequence(), [2, 3], 1)]).any()
print(*sys.modules)
"""
ENGINE = """
import sys
from gemma_deploy import open_engine
assert list(open_engine(sys.argv[1], threads=1).stream("the list", max_new_tokens=2))
print(*sys.modules)
"""


@pytest.mark.parametrize(
    ("code", "more"),
    [
        (LIBRARY_ALONE, {"pydantic", "tokenizers", "importlib.metadata", "artifact", "checkpoint", "text"}),
        (ENGINE, set()),
    ],
    ids=["library", "engine"],
)
def test_a_first_token_waits_for_no_import_that_it_does_not_need(compiled, code, more):
    done = subprocess.run([sys.executable, "-c", code, str(compiled)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {name.removeprefix("gemma_deploy.") for name in done.stdout.split()}
    assert {"numpy", "backends.native.library"} <= imported
    assert imported & (UNUSED | more) == set()


def test_a_c_program_makes_the_tokens_that_we_make(compiled, ids, tmp_path):
    """`examples/native_generate.c`, linked with the library that lies in the artifact."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler is installed")
    made, source = tmp_path / "native_generate", ROOT / "examples" / "native_generate.c"
    words = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", source, compiled / library.LIBRARY, "-o", made]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def says(*given):
        done = subprocess.run([made, *map(str, given)], capture_output=True, text=True)
        return done.returncode, done.stdout.split(), done.stderr

    prompt = ids[:40]  # five windows
    session, found, tokens = open_engine(compiled, threads=1).session(), [], prompt
    for _ in range(12):
        found.append(int(session.read(tokens).argmax()))
        tokens = found[-1:]
    assert says(compiled, 12, 2, *prompt) == (0, [str(token) for token in found], "")
    assert says(compiled, 1, 1, 512) == (1, [], "piece 0: token 512 is not in the table\n")
    assert says(tmp_path, 1, 1, 2)[2] == f"{tmp_path}/model.onnx: No such file or directory\n"
    assert "ARTIFACT COUNT" in says(compiled)[2]
