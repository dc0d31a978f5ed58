"""The graph for ONNX Runtime: its contract, its operators, and transformers' own numbers at every length and cache."""

import platform
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gemma_deploy.backends.ort import decoder
from gemma_deploy.backends.ort.apart import exact
from gemma_deploy.backends.ort.decoder import embedding_scale
from gemma_deploy.errors import ExportError
from tests.backends.make import FILE, KINDS, expected_logits, make, nodes_of, off, open_session, reference, step

# Float32 sums in another order: 1.2e-6 was the most.
CLOSE = 1e-5
# What 8-bit activations lose on random weights: 0.03 was the most; a wrong window, cap or scale gives 0.2 and more.
KERNELS = 0.06


def logits_in_steps(session, tokens, pieces=(20, 6, 1, 1)):
    """Logits after a prompt and each further piece, by position."""
    caches, at, found = None, 0, {}
    for size in pieces:
        logits, caches = step(session, [tokens[at : at + size]], caches)
        at += size
        found[at - 1] = logits[0, 0]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("integer", [False, True])
def test_names_dtypes_and_shapes(made, kind, integer):
    one = made(kind, "w8")
    session = one.session(integer=integer)
    heads, dim, layers = 1 if kind == "gemma" else 2, 32, one.raw["num_hidden_layers"]

    def ports(values):
        return [(value.name, value.type, value.shape) for value in values]

    def caches(prefix, length):
        return [
            (f"{prefix}.{layer}.{part}", "tensor(float)", ["batch", heads, length, dim])
            for layer in range(layers)
            for part in ("key", "value")
        ]

    assert ports(session.get_inputs()) == [
        ("input_ids", "tensor(int64)", ["batch", "sequence"]),
        ("attention_mask", "tensor(int64)", ["batch", "total_sequence"]),
        *caches("past_key_values", "past_sequence"),
    ]
    assert ports(session.get_outputs()) == [
        ("logits", "tensor(float)", ["batch", 1, 512]),
        *caches("present", "total_sequence"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["fp32", "w8", "w4"])
def test_operators(made, kind, form):
    """One attention a layer, four products a layer and the head's, no operator that does not belong."""
    one = made(kind, form)
    layers = one.raw["num_hidden_layers"]
    found = Counter(node.op_type for node in one.graph().graph)
    assert found["GroupQueryAttention"] == layers
    assert found["FusedMatMul" if form == "fp32" else "MatMulNBits"] == 4 * layers + 1
    assert found["Gather" if form == "fp32" else "GatherBlockQuantized"] == 1
    assert found["Gelu"] == layers
    assert found["SkipSimplifiedLayerNormalization"] == layers
    norms = {"gemma": 1, "gemma2": 3, "gemma3_text": 5}[kind]
    assert found["RMSNormalization"] == norms * layers + 1
    assert found["Split"] == layers * (2 if kind == "gemma3_text" else 1)
    assert found["Reshape"] == (4 * layers if kind == "gemma3_text" else 0)
    assert found["Tanh"] == (kind == "gemma2")
    assert found["GatherND"] == 2
    assert not {"If", "Softmax", "Concat", "Slice", "MatMul", "DequantizeLinear", "QuantizeLinear"} & set(found)
    # What is not of a layer: the mask's arithmetic, and a gain (1 + weight) of every norm, which ORT folds.
    norm_weights = sum("norm" in name for name in one.file.weights)
    adds = found["Add"] - norm_weights
    assert adds == layers


@pytest.mark.parametrize("kind", KINDS)
def test_attention_has_the_layers_own_window_cap_scale_and_rotary(made, kind):
    one = made(kind, "fp32")
    graph = one.graph()
    attentions = [node for node in graph.graph if node.op_type == "GroupQueryAttention"]
    local = {"gemma": [], "gemma2": [0, 2], "gemma3_text": [0, 1, 3]}[kind]
    for layer, node in enumerate(attentions):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        layer_type = "sliding_attention" if layer in local else "full_attention"
        expected = {
            "num_heads": 4,
            "kv_num_heads": 1 if kind == "gemma" else 2,
            "scale": pytest.approx((32 if kind == "gemma" else 24) ** -0.5),
            "do_rotary": 1,
        }
        if layer in local:
            expected["local_window_size"] = 8
        if kind == "gemma2":
            expected["softcap"] = 1.5
        assert attributes == expected, layer
        names = [value.name if value else None for value in node.inputs]
        assert names[3:5] == [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        assert names[7:9] == [f"rotary.{layer_type}.{table}" for table in ("cos", "sin")]


def spans_of(graph):
    return {name: (value.const_value.offset, value.const_value.length)
            for name, value in graph.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)}  # fmt: skip


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("form", ["fp32", "w8", "w4"])
def test_the_graph_has_no_weights_inside_and_shows_every_byte_of_the_file(made, form, integer):
    one = made("gemma3_text", form)
    graph = one.graph(integer=integer)
    inside = [v.const_value.nbytes for v in graph.graph.initializers.values()
              if not isinstance(v.const_value, ir.ExternalTensor)]  # fmt: skip
    assert sum(inside) < 1000
    end = 4096
    for start, length in sorted(spans_of(graph).values()):  # views may overlap, nothing lies between them
        assert start <= end
        end = max(end, start + length)
    assert end == (one.folder / FILE).stat().st_size


@pytest.mark.parametrize("form", ["w8", "w4"])
def test_qkv_and_gate_up_are_one_product_each_of_codes_that_lie_together(made, form):
    one = made("gemma2", form)
    graph, data = one.graph(block=32), (one.folder / FILE).read_bytes()
    rows = {row.name: row for row in one.rows}
    for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        path, _, name = f"model.layers.1.{fused}".rpartition(".")
        mine = [rows[f"{path}.{part}_proj.weight"] for part in parts]
        (node,) = [n for n in graph.graph if n.op_type == "MatMulNBits" and n.outputs[0].name == f"{path}.{name}.out"]
        codes = node.inputs[1].const_value
        expected = b"".join(data[row.offset : row.offset + row.nbytes] for row in mine)
        assert data[codes.offset : codes.offset + codes.length] == expected
        size = {key: node.attributes[key].value for key in ("K", "N", "bits", "block_size", "accuracy_level")}
        bits = 8 if form == "w8" else 4
        assert size == {
            "K": 64, "N": sum(row.shape[0] for row in mine), "bits": bits, "block_size": 32, "accuracy_level": 4,
        }  # fmt: skip
        assert tuple(codes.shape) == (size["N"], 2, 32 * bits // 8)


@pytest.mark.parametrize("form", ["fp32", "w8", "w8row", "w4"])
@pytest.mark.parametrize("tied", [True, False])
def test_one_table_for_embedding_and_head(made, form, tied):
    one = made("gemma3_text", form, tie_word_embeddings=tied)
    graph = one.graph()
    if form == "fp32":
        ops, places = ("Gather", "FusedMatMul"), (0, 1)
    else:
        ops, places = ("GatherBlockQuantized", "MatMulNBits"), (0, 1)
    embedding, head = ([node for node in graph.graph if node.op_type == op] for op in ops)
    first, second = (
        nodes[-1].inputs[place].const_value for nodes, place in zip((embedding, head), places, strict=True)
    )
    row = next(row for row in one.rows if row.name == "model.embed_tokens.weight")
    assert (first.offset, first.length) == (row.offset, row.nbytes)
    assert ((second.offset, second.length) == (row.offset, row.nbytes)) is tied
    assert second.length == row.nbytes


@pytest.mark.parametrize(("kind", "form"), [("gemma2", "fp32"), ("gemma", "w8"), ("gemma3_text", "w4")])
def test_a_large_head_in_parts_is_the_head(made, tokens, monkeypatch, kind, form):
    one = made(kind, form)
    whole, _ = step(one.session(), [tokens[:20]])
    monkeypatch.setattr(decoder, "HEAD_BYTES", 10000)
    graph = one.graph()
    heads = [node for node in graph.graph if str(node.outputs[0].name).startswith("lm_head.") and node.op_type != "Mul"]
    products = [node for node in heads if node.op_type in ("FusedMatMul", "MatMulNBits")]
    assert len(products) == -(-512 // (10000 // (64 * (4 if form == "fp32" else 1))))
    row = next(row for row in one.rows if row.name == "model.embed_tokens.weight")
    codes = [node.inputs[1].const_value for node in products]
    assert [codes[0].offset, sum(one.length for one in codes)] == [row.offset, row.nbytes]
    parts, _ = step(open_session(graph, one.folder), [tokens[:20]])
    assert off(parts, whole) < CLOSE
    exact(graph)
    assert off(step(open_session(graph, one.folder, optimize=False), [tokens[:20]])[0], whole) < KERNELS


# A window of 8 and soft caps of 1.5 and 3: the tests below mean something only where these change numbers.
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", {"sliding_window": 9}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma3_text", {"sliding_window": 9}),
        ("gemma3_text", {"rope_local_base_freq": 1000000.0}),
    ],
)
def test_the_reference_sees_what_is_to_be_shown(made, logits_of, tokens, kind, change):
    expected = logits_of(kind, "fp32", tokens)
    other = expected_logits(reference(made(kind, "fp32"), **change), tokens)
    assert off(other[9:], expected[9:]) > 1000 * CLOSE


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in KINDS), ("gemma2", UNTIED), ("gemma", {"num_hidden_layers": 1})],
)
def test_float32_is_the_model_in_chunks_and_steps(made, logits_of, tokens, kind, changes):
    expected = logits_of(kind, "fp32", tokens, **changes)
    for position, logits in logits_in_steps(made(kind, "fp32", **changes).session(), tokens).items():
        assert off(logits, expected[position]) < CLOSE, position


CODED = [("gemma", "w8"), ("gemma2", "w8row"), ("gemma2", "w4"), ("gemma3_text", "w8group"), ("gemma3_text", "w4")]
OTHERS = [("gemma", "w4"), ("gemma2", "w8"), ("gemma", "w8row"), ("gemma3_text", "w8"), ("gemma3_text", "w8row")]
FORMS = [*CODED, *(pytest.param(*which, marks=pytest.mark.slow) for which in OTHERS)]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_codes_are_the_model_they_stand_for(made, logits_of, tokens, kind, form):
    """Exactly, with float32 products in the kernels' places, and nearly with the kernels."""
    one, expected = made(kind, form), logits_of(kind, form, tokens)
    graph = one.graph()
    exact(graph)
    for position, logits in logits_in_steps(open_session(graph, one.folder, optimize=False), tokens).items():
        assert off(logits, expected[position]) < CLOSE, position
    for position, logits in logits_in_steps(one.session(), tokens).items():
        assert CLOSE < off(logits, expected[position]) < KERNELS, position


@pytest.mark.parametrize("form", ["w8", "w4"])
def test_untied_tables_of_codes(made, logits_of, tokens, form):
    expected, one = logits_of("gemma2", form, tokens, **UNTIED), made("gemma2", form, **UNTIED)
    graph = one.graph()
    exact(graph)
    for position, logits in logits_in_steps(open_session(graph, one.folder, optimize=False), tokens).items():
        assert off(logits, expected[position]) < CLOSE, position


@pytest.mark.parametrize(("kind", "form"), [("gemma2", "fp32"), ("gemma3_text", "fp32"), ("gemma3_text", "w8")])
def test_rows_of_a_batch_are_padded_on_the_right(made, logits_of, tokens, kind, form):
    """Two prompts of unequal length, then steps that each row takes at its own position."""
    long, short = tokens[:20], tokens[20:33]
    session = made(kind, form).session()
    ids = [long, [*short, *[0] * 7]]
    logits, _ = step(session, ids, mask=[[1] * 20, [1] * 13 + [0] * 7])
    for row, prompt in enumerate((long, short)):
        alone, _ = step(session, [prompt])
        assert off(logits[row], alone[0]) < CLOSE, row
        if form == "fp32":
            assert off(logits[row, 0], logits_of(kind, form, prompt)[-1]) < CLOSE
    assert off(logits[0], logits[1]) > 0.1
    # With as many columns as tokens a row takes its own last position.
    logits, _ = step(session, [[*short, 0], [*short, 5]], mask=[[1] * 13 + [0], [1] * 14])
    assert off(logits[0], step(session, [short])[0][0]) < CLOSE
    assert off(logits[1], step(session, [[*short, 5]])[0][0]) < CLOSE


def bound(session, tokens, buffers, total, logits):
    """Run with past and present in the same buffers, as onnxruntime-genai does."""
    binding = session.io_binding()
    binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
    binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
    for name, buffer in buffers.items():
        place = "cpu", 0, np.float32, buffer.shape(), buffer.data_ptr()
        binding.bind_input(name, *place)
        binding.bind_output(name.replace("past_key_values", "present"), *place)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    session.run_with_iobinding(binding)


@pytest.mark.parametrize(
    ("kind", "form", "integer"),
    [("gemma2", "fp32", False), ("gemma3_text", "w8", True), ("gemma", "w4", False)],
)
def test_the_cache_is_written_in_place_and_nothing_behind_it_is_touched(made, tokens, kind, form, integer):
    session = made(kind, form).session(integer=integer)
    shape = (1, session.get_inputs()[2].shape[1], 64, 32)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    filler = np.full(shape, 7e7, np.float32)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(filler.copy()) for name in names}
    caches, at = None, 0
    for size in (20, 5, 1, 1):
        piece, at = tokens[at : at + size], at + size
        expected, caches = step(session, [piece], caches)
        logits = np.zeros((1, 1, 512), np.float32)
        bound(session, piece, buffers, at, logits)
        assert off(logits, expected) < CLOSE, at
        for name in names:
            held = buffers[name].numpy()
            assert (held[:, :, at:] == 7e7).all(), name
            np.testing.assert_allclose(held[:, :, :at], caches[name], rtol=0, atol=1e-5)


def test_the_embedding_scale_is_rounded_as_asked():
    assert [embedding_scale(size, "bf16") for size in (640, 3072, 3584, 4608)] == [25.25, 55.5, 59.75, 68.0]
    assert embedding_scale(640, "exact") == np.float32(640**0.5)


def test_a_factor_per_column_stands_in_the_place_of_the_scale(made):
    for form, factor in (("w8", "float32.8.0"), ("w8row", "model.embed_tokens.column_scale")):
        node = next(n for n in made("gemma", form).graph().graph if n.outputs[0].name == "model.embed_tokens.out")
        assert node.inputs[1].name == factor


def test_a_file_that_does_not_fit_is_refused(made):
    one = made("gemma", "w8")
    extra = SimpleNamespace(name="stranger", dtype="float32", shape=(4,), offset=0, nbytes=16)
    with pytest.raises(ExportError, match="disagree") as caught:
        one.graph(rows=[*one.rows, extra])
    assert caught.value.problems == ("stranger is in the file but the graph does not read it",)
    gone = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ExportError, match=f"{gone} is not in {FILE}"):
        one.graph(rows=[row for row in one.rows if row.name != gone])


def test_a_gap_between_what_is_read_as_one_is_refused(tmp_path):
    one = make(tmp_path, "gemma", "w8")
    rows = one.file.write(gap_before="model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(ExportError, match=r"1\.self_attn\.k_proj\.weight does not lie behind .*q_proj\.weight"):
        one.graph(rows=rows)


# Two branches


def test_a_prompt_takes_the_integer_branch_from_16_tokens_on(made, tokens):
    one = made("gemma3_text", "w8")
    both, block = one.session(integer=True), one.session()
    for length in (1, 15, 16, 17):
        prompt = [tokens[:length]]
        difference = off(step(both, prompt)[0], step(block, prompt)[0])
        assert (difference > 1e-4) == (length >= 16), (length, difference)


def test_the_integer_branch_has_integer_products_and_the_other_none(made):
    one = made("gemma3_text", "w8")
    layers = one.raw["num_hidden_layers"]
    (branch,) = (node for node in one.graph(integer=True).graph if node.op_type == "If")
    prompts, few = (branch.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    counts = [Counter(node.op_type for node in graph) for graph in (prompts, few)]
    # After the last layer's attention there is one position, for the block kernel outside.
    assert counts[0]["MatMulIntegerToFloat"] == 7 * layers - 4
    assert counts[0]["MatMulNBits"] == 0
    assert counts[1]["MatMulNBits"] == 4 * layers - 3
    assert counts[1]["MatMulIntegerToFloat"] == 0
    assert {count["GroupQueryAttention"] for count in counts} == {layers}
    assert counts[0]["QuantizeLinear"] == 4 * layers - 3  # q, k and v read the same codes, so do gate and up


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_through_integer_products_in_chunks(made, logits_of, tokens, kind):
    """20 tokens, 20 more, then single ones: as near to the model as one prompt is."""
    one, expected = made(kind, "w8"), logits_of(kind, "w8", tokens)
    session = one.session(integer=True)
    assert off(step(session, [tokens[:40]])[0][0], expected[39]) < KERNELS
    for position, logits in logits_in_steps(session, tokens, (20, 20, 1, 1, 1)).items():
        assert off(logits, expected[position]) < KERNELS, position


def test_wide_linears_come_nearer(made, tokens):
    one = made("gemma3_text", "w8")
    every = {name.removesuffix(".weight") for name in one.file.weights if "_proj" in name}
    plain, wide = (
        step(one.session(integer=True, wide=names), [tokens[:40]])[1] for names in (frozenset(), frozenset(every))
    )
    _, right = step(exact_session(one), [tokens[:40]])
    name = "past_key_values.3.value"  # of the last layer, behind all linears of the others
    assert off(wide[name], right[name]) < 0.02 * off(plain[name], right[name])


def test_wide_are_those_asked_for(made):
    """Linears that read one input are rounded once for all of them."""
    pair = {f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up")}
    graph = made("gemma3_text", "w8").graph(integer=True, wide=pair | {"model.layers.0.self_attn.o_proj"})
    lows = {str(node.outputs[0].name) for node in nodes_of(graph) if str(node.outputs[0].name).endswith(".low")}
    assert lows == {"prefill/model.layers.2.mlp.gate_up_proj.low", "prefill/model.layers.0.self_attn.o_proj.low"}
    products = Counter(str(n.inputs[0].name) for n in nodes_of(graph) if n.op_type == "MatMulIntegerToFloat")
    assert {name: products[name] for name in lows} == dict(zip(sorted(lows), (1, 2), strict=True))


def exact_session(one):
    graph = one.graph()
    exact(graph)
    return open_session(graph, one.folder, optimize=False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors do not saturate")
@pytest.mark.xfail(strict=True, reason="ORT turns s8 weights to u8 in the graph that owns them, not inside a branch")
def test_integer_products_do_not_saturate_where_processors_lack_vnni(made, tmp_path):
    """genai_config.json asks for products of u8 by u8; what a session makes of the branch still has s8 matrices."""
    one = made("gemma3_text", "w8")
    saved = tmp_path / "optimized.onnx"
    open_session(one.graph(integer=True), one.folder, saved=saved)
    (branch,) = (node for node in ir.load(saved).graph if node.op_type == "If")
    products = [n for n in branch.attributes["then_branch"].as_graph() if n.op_type == "MatMulIntegerToFloat"]
    assert products
    assert all(str(node.inputs[1].name).endswith("_s8_2_u8") for node in products)


@pytest.mark.xfail(strict=True, reason="MatMulNBits gives zeros for scales that are made at run time")
def test_a_session_that_folds_no_constants_computes_the_same(made, tokens):
    one = made("gemma", "w8")
    folded, plain = (step(open_session(one.graph(), one.folder, optimize), [tokens])[0] for optimize in (True, False))
    assert off(plain, folded) < KERNELS


def test_one_layer_alone_in_branches(made, logits_of, tokens):
    changes = {"num_hidden_layers": 1}
    session = made("gemma2", "w8", **changes).session(integer=True)
    expected = logits_of("gemma2", "w8", tokens, **changes)
    for position, logits in logits_in_steps(session, tokens).items():
        assert off(logits, expected[position]) < KERNELS, position


@pytest.mark.parametrize("form", ["w8group", "w4"])
def test_groups_keep_the_block_kernel_in_both_branches(made, tokens, form):
    one = made("gemma2", form)
    assert not any(node.op_type == "MatMulIntegerToFloat" for node in nodes_of(one.graph(integer=True)))
    both, block = (step(one.session(integer=integer), [tokens])[0] for integer in (True, False))
    assert off(both, block) < CLOSE
