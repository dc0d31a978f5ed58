"""Bytes and operations against sums by hand, from config.json's own numbers and the checkpoint's tensors."""

import json
from dataclasses import replace

import pytest

from gemma_deploy.backends.native import library
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.partition import ArtifactPart, whole
from gemma_deploy.planning import speeds
from gemma_deploy.planning.choices import Choice, Wanted, open_choice
from gemma_deploy.planning.device import Device
from gemma_deploy.planning.planner import make_plan
from gemma_deploy.planning.sizes import (
    cache_bytes,
    cache_read,
    sizes_of,
    step_bytes,
    sum_of_chunks,
    sum_of_spans,
    work_of,
)
from gemma_deploy.testing import TINY_CONFIGS, write_tiny_checkpoint

WANTED = Wanted(prompt=512, context=1024, batch=3)
LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny checkpoint of a generation, opened; keys of its config may be changed."""
    made = {}

    def opened(model_type, **changes):
        key = model_type, json.dumps(changes, sort_keys=True)
        if key not in made:
            path = tmp_path_factory.mktemp("tiny") / model_type
            made[key] = Checkpoint.open(write_tiny_checkpoint(path, model_type, **{**LONG, **changes}))
        return made[key]

    return opened


def job_of(checkpoint, backend, precision, **division):
    if backend == "native" and not (library.FOLDER / library.LIBRARY).is_file():
        pytest.skip("the library of backend.type native was not built")
    job = open_choice(checkpoint, Choice(backend, precision, **division), WANTED)
    assert not isinstance(job, str), job
    return job


def undivided(job):
    return ArtifactPart(whole(job.config.num_hidden_layers))


def stored(checkpoint, wide):
    """Bytes of the checkpoint's tensors: `wide` a number of a matrix, 4 of a vector."""
    total = 0
    for tensor in checkpoint.tensors.values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count * (4 if len(tensor.shape) == 1 else wide)
    return total


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize(("precision", "wide"), [("fp32", 4), ("bf16", 2)])
def test_weights_of_floats(tiny, model_type, precision, wide):
    """Every tensor of the checkpoint, and a table of cosines and of sines for each kind of layer."""
    checkpoint = tiny(model_type)
    job = job_of(checkpoint, "tvm_vacc", precision)
    head_dim = TINY_CONFIGS[model_type]["head_dim"]
    kinds = len(set(checkpoint.config.layer_types))
    tables = kinds * 2 * WANTED.context * head_dim // 2 * 4
    assert sizes_of(job, Choice("tvm_vacc", precision), WANTED, kind="gpu").weights == stored(checkpoint, wide) + tables


def test_weights_of_codes(tiny):
    """A byte for each number of a matrix, and four for each row."""
    checkpoint = tiny("gemma2")
    job = job_of(checkpoint, "tvm_vacc", "w8a16")
    raw = TINY_CONFIGS["gemma2"]
    hidden, inner, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    queries, keys = (raw[name] * raw["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    assert queries != keys
    rows = raw["vocab_size"] + layers * (queries + 2 * keys + hidden + 2 * inner + hidden)
    tables = len(set(checkpoint.config.layer_types)) * 2 * WANTED.context * raw["head_dim"] // 2 * 4
    expected = stored(checkpoint, 1) + 4 * rows + tables
    assert sizes_of(job, Choice("tvm_vacc", "w8a16"), WANTED, kind="gpu").weights == expected


def test_codes_in_blocks_of_llama_cpp(tiny):
    """34 bytes for 32 codes of 8 bits, 18 for 32 of 4, four for each number of a norm; no tables of cosines."""
    checkpoint = tiny("gemma2", query_pre_attn_scalar=32)
    raw = TINY_CONFIGS["gemma2"]
    table = raw["vocab_size"] * raw["hidden_size"]
    norms = sum(4 * one.shape[0] for one in checkpoint.tensors.values() if len(one.shape) == 1)
    linears = stored(checkpoint, 1) - norms - table
    for precision, of_linears in (("w8a16", 34), ("w8a16_gptq", 34), ("w4a16_gptq", 18)):
        job = job_of(checkpoint, "gguf", precision)
        kept = 0
        if of_linears == 18:  # those that stay in 8 bits, as the shipped recipes have it
            keys = raw["num_key_value_heads"] * raw["head_dim"]
            each = 2 * keys * raw["hidden_size"] + raw["intermediate_size"] * raw["hidden_size"]
            kept = raw["num_hidden_layers"] * each
        expected = norms + (table + kept) * 34 // 32 + (linears - kept) * of_linears // 32
        assert sizes_of(job, Choice("gguf", precision), WANTED, kind="gpu").weights == expected
        one = speeds.speed_of(job, Choice("gguf", precision), WANTED, device=device(kind="cpu", backends=["gguf"]))
        assert one.is_bound  # no share was measured


def test_caches_have_the_heads_of_keys_and_of_a_window_where_the_runtime_lets_go(tiny):
    """Gemma 2: 2 keys and values for 4 heads of queries; every other layer sees a window."""
    checkpoint = tiny("gemma2", sliding_window=200)
    raw = TINY_CONFIGS["gemma2"]
    position = 2 * raw["num_key_value_heads"] * raw["head_dim"]  # numbers of a layer
    kinds = checkpoint.config.layer_types
    full = sum(kind == "full_attention" for kind in kinds)
    sliding = len(kinds) - full
    assert full
    assert sliding
    static, own = job_of(checkpoint, "tvm_vacc", "fp32"), job_of(checkpoint, "native", "w8a16")
    assert cache_bytes(static, undivided(static), WANTED) == 3 * (full + sliding) * position * 4 * 1024
    # bfloat16, in pages of 128 positions: 200 lie in two or three of them
    assert cache_bytes(own, undivided(own), WANTED) == 3 * position * 2 * (full * 1024 + sliding * 3 * 128)
    # what a step behind 600 tokens reads: all slots of a static pair, else what attention sees
    assert cache_read(static, undivided(static), WANTED, after=600) == 3 * (full + sliding) * position * 4 * 1024
    assert cache_read(own, undivided(own), WANTED, after=600) == 3 * position * 2 * (full * 600 + sliding * 200)


def test_caches_of_codes(tiny):
    checkpoint = tiny("gemma3_text")
    raw = TINY_CONFIGS["gemma3_text"]
    layers, heads, size = raw["num_hidden_layers"], raw["num_key_value_heads"], raw["head_dim"]
    job = job_of(checkpoint, "tvm_vacc", "w8a16_gptq+kv8")
    assert cache_bytes(job, undivided(job), replace(WANTED, batch=1)) == layers * 2 * heads * (size + 2) * 1024


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("precision", ["fp32", "w8a16", "w8a16_gptq+kv8"])
def test_caches_are_those_of_the_graphs_inputs(tiny, model_type, precision):
    """Of a static pair all ports of its contract: layers that share keys and values have none of their own."""
    checkpoint = tiny(model_type)
    job = open_choice(checkpoint, Choice("tvm_vacc", precision), WANTED)
    if isinstance(job, str):
        pytest.skip(job)
    ports = 0
    for port in job.contract.inputs("iter1"):
        if port.name.startswith("past_key_values."):
            count = {"float32": 4, "float16": 2, "int8": 1}[port.dtype]
            for size in port.shape:
                count *= size
            ports += count
    assert cache_bytes(job, undivided(job), WANTED) == ports


def test_layers_of_gemma_4_have_two_geometries(tiny):
    checkpoint = tiny("gemma4_text", num_global_key_value_heads=2)
    raw = json.loads((checkpoint.path / "config.json").read_text())
    job = job_of(checkpoint, "onnxruntime", "fp32")
    shared = raw.get("num_kv_shared_layers") or 0
    own = checkpoint.config.layer_types[: raw["num_hidden_layers"] - shared]
    heads, wide = raw["num_key_value_heads"], raw.get("num_global_key_value_heads") or raw["num_key_value_heads"]
    numbers = {"sliding_attention": heads * raw["head_dim"], "full_attention": wide * raw["global_head_dim"]}
    assert numbers["sliding_attention"] != numbers["full_attention"]
    expected = 3 * 1024 * 4 * 2 * sum(numbers[kind] for kind in own)
    assert cache_bytes(job, undivided(job), WANTED) == expected


def test_shared_layers_of_gemma_3n_read_a_cache_and_have_none(tiny):
    checkpoint = tiny("gemma3n_text")
    raw = json.loads((checkpoint.path / "config.json").read_text())
    assert raw["num_kv_shared_layers"] > 0
    job = job_of(checkpoint, "onnxruntime", "fp32")
    position = 3 * 4 * 2 * raw["num_key_value_heads"] * raw["head_dim"]
    layers, shared = raw["num_hidden_layers"], raw["num_kv_shared_layers"]
    assert cache_bytes(job, undivided(job), WANTED) == position * 1024 * (layers - shared)
    window = raw["sliding_window"]
    seen = sum(600 if kind == "full_attention" else min(600, window) for kind in checkpoint.config.layer_types)
    assert cache_read(job, undivided(job), WANTED, after=600) == position * seen


def test_spans_are_what_tokens_see():
    for first, last, window in ((0, 9, None), (0, 9, 4), (3, 9, 4), (6, 9, 4), (2, 3, None), (0, 4, 9)):
        seen = sum(min(at + 1, window or last) for at in range(first, last))
        assert sum_of_spans(first, last, window) == seen, (first, last, window)
    assert sum_of_chunks(0, 10, 4) == 4 * 4 + 4 * 8 + 2 * 10
    assert sum_of_chunks(6, 7, 512) == 7


def test_operations_of_a_prompt(tiny):
    checkpoint = tiny("gemma2", sliding_window=200)
    raw = TINY_CONFIGS["gemma2"]
    hidden, inner, layers = raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"]
    queries, keys = (raw[name] * raw["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    job = job_of(checkpoint, "native", "fp32")
    work = work_of(job, undivided(job), job.plans[0], tokens=300, after=0)
    assert work.products == 2 * 300 * layers * (2 * queries * hidden + 2 * keys * hidden + 3 * inner * hidden)
    assert work.head == 2 * raw["vocab_size"] * hidden
    full = sum(kind == "full_attention" for kind in checkpoint.config.layer_types)
    sliding_sees = sum(min(at + 1, 200) for at in range(300))
    assert work.attention == 4 * queries * (full * 300 * 301 // 2 + (layers - full) * sliding_sees)


def test_experts_count_as_far_as_a_token_runs_through_them(tiny):
    from gemma_deploy.testing import TINY_EXPERTS

    dense, mixed = tiny("gemma4_text"), tiny("gemma4_text", **TINY_EXPERTS)
    works, reads = [], []
    for checkpoint in (dense, mixed):
        job = job_of(checkpoint, "onnxruntime", "fp32")
        works.append(work_of(job, undivided(job), job.plans[0], tokens=1, after=0))
        reads.append(step_bytes(job, undivided(job), job.plans[0], wanted=replace(WANTED, batch=1), after=1))
    raw = json.loads((mixed.path / "config.json").read_text())
    hidden, width, count, chosen = raw["hidden_size"], TINY_EXPERTS["moe_intermediate_size"], 8, 3
    assert (TINY_EXPERTS["num_experts"], TINY_EXPERTS["top_k_experts"]) == (count, chosen)
    of_experts = 3 * hidden * width * chosen
    layers = raw["num_hidden_layers"]
    assert works[1].products - works[0].products == 2 * layers * (of_experts + count * hidden)
    more = reads[1] - reads[0] - layers * 4 * (of_experts + count * hidden)
    assert 0 < more <= layers * 4 * (4 * hidden + count)  # norms and scales


def device(**changes):
    values = {"name": "d", "kind": "accelerator", "memory_gb": 1.0, "usable": 1.0, "bandwidth_gb_s": 100.0}
    values |= {"int8_tops": 10.0, "fp16_tflops": 5.0, "fp32_tflops": 1.0, "backends": ["tvm_vacc"]}
    return Device.model_validate(values | changes)


def test_a_bound_is_bytes_over_bandwidth(tiny):
    """Nothing was measured on an accelerator: a step reads weights and cache once, and no more is counted."""
    checkpoint = tiny("gemma2")
    wanted = Wanted(512, 1024, 1)
    row = make_plan(checkpoint, device(), wanted, precisions=["fp32"]).rows[0]
    job = open_choice(checkpoint, Choice("tvm_vacc", "fp32"), wanted)
    tables = sum(spec.nbytes for spec in job.plans[0] if "rotary" in spec.name)
    read = row.sizes.weights - tables + row.sizes.cache  # the table is the LM head; the static pair reads all slots
    assert row.speed.is_bound
    assert row.speed.decode_tok_s == pytest.approx(100e9 / read)
    work = work_of(job, undivided(job), job.plans[0], tokens=512, after=0)
    seconds = (work.products + work.head) / 1e12 + work.attention / 5e12
    assert row.speed.prefill_tok_s == pytest.approx(512 / seconds)


@pytest.mark.parametrize(("backend", "shares"), [("native", True), ("onnxruntime", False)])
def test_two_threads_halve_what_layers_take_where_they_share_it(tiny, backend, shares):
    """Memory is so fast that nothing but the layers' own seconds is left of a step of decoding."""
    checkpoint = tiny("gemma2", num_hidden_layers=8)
    rates = {"bandwidth_gb_s": 1e9, "int8_tops": 1e9, "fp16_tflops": 1e9, "kind": "cpu", "backends": [backend]}

    def step(threads):
        one = device(**rates, fp32_tflops=speeds.ONE_THREAD / speeds.TERA * threads)
        return 1 / make_plan(checkpoint, one, Wanted(64, 128, 1), precisions=["fp32"]).rows[0].speed.decode_tok_s

    alone = 8 * speeds.MEASURED[backend, "cpu"].layer_s
    assert step(1) == pytest.approx(alone, rel=0.1)
    assert step(2) == pytest.approx(alone / 2 if shares else alone, rel=0.1)


def test_ranks_hold_their_shares_and_read_them_at_once(tiny):
    checkpoint = tiny("gemma2")
    alone = make_plan(checkpoint, device(), WANTED, precisions=["fp32"]).rows[0]
    small = device(memory_gb=alone.sizes.total * 0.7 / 1e9, count=2)
    row = make_plan(checkpoint, small, WANTED, precisions=["fp32"]).rows[0]
    assert (row.choice.ranks, row.choice.points, row.fits) == (2, (), True)
    raw = TINY_CONFIGS["gemma2"]
    assert raw["num_key_value_heads"] % 2 == 0
    assert row.sizes.cache * 2 == alone.sizes.cache
    norms = sum(4 * tensor.shape[0] for tensor in checkpoint.tensors.values() if len(tensor.shape) == 1)
    tables = 2 * 2 * WANTED.context * raw["head_dim"] // 2 * 4
    assert row.sizes.weights * 2 == alone.sizes.weights + norms + tables  # which both have
    assert row.speed.decode_tok_s > 1.5 * alone.speed.decode_tok_s
    slow = small.model_copy(update={"link_gb_s": 0.01})
    assert make_plan(checkpoint, slow, WANTED, precisions=["fp32"]).rows[0].speed.decode_tok_s < row.speed.decode_tok_s


def test_a_model_is_cut_where_ranks_do_not_divide_it(tiny):
    """Two devices, and three heads."""
    checkpoint = tiny("gemma2", num_attention_heads=3, num_key_value_heads=1, intermediate_size=1600)
    short = Wanted(64, 1024, 3)
    alone = make_plan(checkpoint, device(), short, precisions=["fp32"]).rows[0]
    small = device(memory_gb=alone.sizes.total * 0.8 / 1e9, count=2)
    row = make_plan(checkpoint, small, short, precisions=["fp32"]).rows[0]
    assert (row.choice.ranks, len(row.choice.points), row.fits) == (1, 1, True)


def test_too_few_devices_are_told_with_how_many_it_takes(tiny):
    checkpoint = tiny("gemma2")
    alone = make_plan(checkpoint, device(), WANTED, precisions=["fp32"]).rows[0]
    small = device(memory_gb=alone.sizes.total * 0.7 / 1e9, count=1)
    plan = make_plan(checkpoint, small, WANTED, precisions=["fp32"])
    assert (plan.rows[0].choice.devices, plan.rows[0].fits, plan.proposed) == (2, False, None)


def test_unknown_numbers_leave_out_what_needs_them(tiny):
    unknown = device(memory_gb=None, bandwidth_gb_s=None, count=2)
    row = make_plan(tiny("gemma2"), unknown, WANTED, precisions=["fp32"]).rows[0]
    assert (row.fits, row.choice.devices, row.speed.decode_tok_s, row.speed.prefill_tok_s) == (None, 2, None, None)
    assert row.sizes.total > 0
