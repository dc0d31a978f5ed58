"""A recipe loads whole, or is refused with every mistake at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gemma_deploy.backends.onnxruntime.options import options_of
from gemma_deploy.errors import NotBuiltError, RecipeError
from gemma_deploy.recipe import Recipe, check_against_model, check_built
from gemma_deploy.schemes import QUANTIZE_TYPES

BUILD_IN = Path(__file__).resolve().parents[2] / "build_in"
NEXT = "\n  next: correct the lines above; `gemma-deploy recipes` lists working ones"

MINIMAL = """\
name: small
frontend:
  checkpoint: demo
  shape: {input_ids: [[128], [256]]}
backend:
  dtype: fp16
"""

# llm/gemma/build_in/build/hf_gemma_int8.yaml of Vastai/VastModelZOO, its keys and values.
VENDOR = """\
name: gemma-2b-it-int8-tp4-1024-2048
frontend:
  checkpoint: /path/to/gemma-2b-it
  type: huggingface
  shape:
    input_ids: [[1024], [2048]]
  model_kwargs:
    tp: 4
    b2s: true
    model_arch: vacc
  quantize:
    type: w8a16_gptq

backend:
  type: tvm_vacc
  dtype: int8
  merge_params: true
  compile:
    data_type: 0
    gather_data_vccl_dsp_enable: true

workspace:
  path: ./vacc_deploy
  workers: 4
"""


def load(text: str = MINIMAL, *overrides: str, **env: str) -> Recipe:
    return Recipe.from_text(text, overrides, env)


def problems(text: str = MINIMAL, *overrides: str, **env: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, **env)
    assert caught.value.exit_code == 2
    return list(caught.value.problems)


def test_defaults_of_a_minimal_recipe():
    recipe = load()
    assert (recipe.prefill_length, recipe.context_length, recipe.spec.batch, str(recipe.scheme)) == (
        *(128, 256, 1, "fp16"),
    )
    assert recipe.backend.type == "tvm_vacc"
    assert recipe.frontend.type == "huggingface"
    assert recipe.parity.model_dump() == {"text": None, "prompt_tokens": 64, "decode_tokens": 32, "gate": True}
    assert recipe.vendor_keys() == {}


def test_the_design_example_loads():
    recipe = load(
        """
name: gemma-2b-it-int8-1024-2048
frontend:
  checkpoint: ${GEMMA_CHECKPOINT:-demo}
  type: huggingface
  adapter: null
  shape: {input_ids: [[1024], [2048]], batch: 1}
  model_kwargs: {tp: 1, b2s: false, model_arch: vacc, align_qkv: false, embed_scale: exact}
  quantize: {type: w8a16_gptq, device: cpu, calib_args: {true_sequential: true, percdamp: 0.01, act_order: false}}
dataset: {type: huggingface, name: c4, path: null, nsamples: 128, seqlen: 1024}
backend: {type: tvm_vacc, dtype: int8, merge_params: true, compile: {data_type: 0, gather_data_vccl_dsp_enable: true}}
parity: {text: null, prompt_tokens: 64, decode_tokens: 32, gate: true}
workspace: {path: ./workspace, workers: 2}
"""
    )
    assert str(recipe.scheme) == "w8a16_gptq"
    assert recipe.frontend.quantize.calib_args.percdamp == 0.01


def test_a_vendor_recipe_loads_unchanged_and_its_compiler_keys_are_carried():
    recipe = load(VENDOR)
    assert recipe.frontend.model_kwargs.tp == 4
    assert recipe.workspace.workers == 4
    assert recipe.vendor_keys() == {
        "backend.compile.data_type": 0,
        "backend.compile.gather_data_vccl_dsp_enable": True,
    }
    assert recipe.resolved()["backend"]["compile"] == {"data_type": 0, "gather_data_vccl_dsp_enable": True}


@pytest.mark.parametrize(
    ("kind", "dtype", "weights", "int8_cache"),
    [
        ("w8a16", "int8", "w8a16", False),
        ("w8a16_gptq+kv8", "int8", "w8a16_gptq", True),
        ("w16kv8", "fp16", "fp16", True),
        ("w16kv8", "bf16", "bf16", True),
        ("w16kv8", "int8", "fp16", True),
    ],
)
def test_a_type_says_how_weights_and_cache_are_kept(kind, dtype, weights, int8_cache):
    recipe = load(VENDOR, f"frontend.quantize={{type: {kind}}}", f"backend.dtype={dtype}")
    scheme = recipe.scheme
    assert (scheme.weights, scheme.int8_cache, scheme.codes) == (weights, int8_cache, weights[0] == "w")


@pytest.mark.parametrize(
    ("calib_args", "said"),
    [
        ("{groupsize: 64}", "groupsize: 64 contradicts w8a8, whose integer products have one scale per row"),
        ("{keep_a16: 1.5}", "keep_a16"),
    ],
)
def test_settings_that_contradict_rounded_activations(calib_args, said):
    with pytest.raises(RecipeError, match=said):
        load(VENDOR, "frontend.quantize.type=w8a8", f"frontend.quantize.calib_args={calib_args}")
    with pytest.raises(RecipeError, match="keep_a16: w8a16_gptq rounds no activations"):
        load(VENDOR, "frontend.quantize.type=w8a16_gptq", "frontend.quantize.calib_args={keep_a16: 0.1}")


def test_linears_kept_in_8_bits_are_a_matter_of_int4():
    four = "frontend.quantize.type=w4a16_gptq", "backend.dtype=int8"
    assert load(VENDOR, *four).spec.storage(2048).kept_w8 == ("k_proj", "v_proj")
    chosen = load(VENDOR, *four, "frontend.quantize.calib_args={keep_w8: [down_proj]}")
    assert chosen.spec.storage(2048).kept_w8 == ("down_proj",)
    assert load(VENDOR, *four, "frontend.quantize.calib_args={keep_w8: []}").spec.storage(2048).kept_w8 == ()
    with pytest.raises(RecipeError, match="keep_w8: w8a16_gptq has no linears of 4 bits"):
        load(VENDOR, "frontend.quantize.type=w8a16_gptq", "frontend.quantize.calib_args={keep_w8: [v_proj]}")
    with pytest.raises(RecipeError, match="keep_w8"):
        load(VENDOR, *four, "frontend.quantize.calib_args={keep_w8: [lm_head]}")


def test_check_built_refuses_each_unbuilt_key_of_a_vendor_recipe_in_one_sentence():
    with pytest.raises(NotBuiltError) as caught:
        check_built(load(VENDOR, "frontend.shape.batch=2", "backend.merge_params=false"))
    assert str(caught.value) == (
        "recipe gemma-2b-it-int8-tp4-1024-2048: the recipe is valid, but asks for what this version does not do\n"
        "  - frontend.model_kwargs.b2s: the batch-to-sequence layout of more than one sequence is not built yet; this "
        "version writes the low-latency layout, so set b2s: false, or frontend.shape.batch: 1\n"
        "  - backend.merge_params: separate parameter files are not built yet; both graphs share params.safetensors, "
        "so set merge_params: true\n"
        "  next: change the keys above in the recipe, or on the command line with -s KEY=VALUE"
    )


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("backend.merge_params=false", "backend.merge_params: separate parameter files are not built yet"),
    ],
)
def test_check_built_refuses(override, start):
    with pytest.raises(NotBuiltError) as caught:
        check_built(load(MINIMAL, override))
    (problem,) = caught.value.problems
    assert problem.startswith(start)


INT8 = ("backend.type=onnxruntime", "backend.dtype=int8")


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["backend.type=onnxruntime"], "backend.dtype: fp16 for ONNX Runtime is not built yet"),
        *(
            (
                ["backend.type=onnxruntime", f"backend.dtype={dtype}", "frontend.quantize.type=w16kv8"],
                f"frontend.quantize.type: an int8 cache beside {weights} weights for ONNX Runtime is not built yet",
            )
            for dtype, weights in (("int8", "fp16"), ("fp16", "fp16"), ("bf16", "bf16"))
        ),
        (
            [*INT8, "frontend.model_kwargs.tp=2"],
            "split.points and model_kwargs.tp: ONNX Runtime's graph is not divided",
        ),
        ([*INT8, "split.points=[2]"], "split.points and model_kwargs.tp: ONNX Runtime's graph is not divided"),
    ],
)
def test_check_built_refuses_for_onnxruntime_in_one_sentence(overrides, start):
    with pytest.raises(NotBuiltError) as caught:
        check_built(load(MINIMAL, *overrides))
    (problem,) = caught.value.problems
    assert problem.startswith(start)
    assert "tvm_vacc" in problem
    check_built(load(MINIMAL, *INT8))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("backend.compile.prefill=quick", "backend.compile.prefill: got 'quick' (text), expected one of fast, lean"),
        ("backend.compile.head=half", "backend.compile.head: got 'half' (text), expected one of whole, screened"),
        ("backend.compile.logits=each", "backend.compile.logits: got 'each' (text), expected one of last, all"),
        ("backend.compile.block=48", "backend.compile.block: got 48 (a number), expected one of 16, 32, 64, 128, 256"),
        ("backend.compile.block=big", "backend.compile.block: got 'big' (text), expected one of 16, 32, 64, 128, 256"),
    ],
)
def test_kernels_of_onnxruntime_that_cannot_be(override, problem):
    assert problems(MINIMAL, *INT8, override) == [f"-s {override}: {problem}"]
    load(MINIMAL, "backend.dtype=int8", override)  # of the vendor's compiler nothing is known here


@pytest.mark.parametrize("calibrated", [{"type": "w4a16"}, {"type": "w8a16_gptq", "calib_args": {"groupsize": 128}}])
def test_integer_products_need_a_scale_per_row(calibrated):
    fast = "backend.compile.prefill=fast"
    (problem,) = problems(MINIMAL, "backend.type=onnxruntime", "backend.dtype=fp32", fast)
    assert problem.endswith("not fp32 as it is here: set one of them, or prefill: lean")
    asked = f"frontend.quantize={json.dumps(calibrated)}"
    (problem,) = problems(MINIMAL, *INT8, asked, "backend.compile.prefill=fast")
    assert problem == (
        "-s backend.compile.prefill=fast: backend.compile.prefill: fast means integer products, which need int8 "
        "weights with one scale per row (frontend.quantize.type w8a8, w8a16_gptq or w8a16, groupsize -1), not "
        f"{calibrated['type']} as it is here: set one of them, or prefill: lean"
    )


def test_kernels_that_are_null_are_those_of_the_scheme():
    nothing = "backend.compile={prefill: null, head: null, block: null}"
    four, dense = "frontend.quantize={type: w4a16}", "backend.dtype=fp32"
    for other, prefill in (("name=x", "fast"), (four, "lean"), (dense, "lean")):
        options = options_of(load(MINIMAL, *INT8, other, nothing).spec)
        assert (options.prefill, options.head) == (prefill, "whole")


def test_a_screened_head_needs_codes():
    said = "screened needs a token table of 8-bit codes (frontend.quantize.table int8)"
    screened = "backend.compile.head=screened"
    for others in (
        ["backend.type=onnxruntime", "backend.dtype=fp32"],
        [*INT8, "frontend.quantize={type: w8a16, table: fp16}"],
    ):
        (problem,) = problems(MINIMAL, *others, screened)
        assert problem == f"-s {screened}: backend.compile.head: {said}"
    for others in (INT8, [*INT8, "frontend.quantize={type: w4a16}"]):
        assert options_of(load(MINIMAL, *others, screened).spec).head == "screened"
        assert options_of(load(MINIMAL, *others).spec).head == "whole"


def test_onnxruntime_chooses_its_kernels_by_the_scheme():
    def asked(*overrides):
        return options_of(load(MINIMAL, *INT8, *overrides).spec).prefill

    rows = "{type: w8a16}", "{type: w8a16_gptq}", "{type: w8a16_gptq, calib_args: {groupsize: -1}}", "{type: w8a8}"
    for scheme in ([], *([f"frontend.quantize={section}"] for section in rows)):
        assert asked(*scheme) == asked(*scheme, "backend.compile={prefill: fast, block: 256}") == "fast", scheme
        assert asked(*scheme, "backend.compile.prefill=lean") == "lean", scheme
    for section in ("{type: w4a16}", "{type: w4a16_gptq}", "{type: w8a16_gptq, calib_args: {groupsize: 128}}"):
        assert asked(f"frontend.quantize={section}") == "lean", section
    for dtype in ("fp32", "bf16"):
        assert asked(f"backend.dtype={dtype}") == "lean", dtype
    recipe = load(MINIMAL, *INT8, "backend.compile={block: 64, data_type: 0}")
    assert recipe.vendor_keys() == {"backend.compile.data_type": 0}
    vendor = load(MINIMAL, "backend.dtype=int8", "backend.compile={block: 64}")
    assert vendor.vendor_keys() == {"backend.compile.block": 64}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{haed: screened}", "backend.compile.haed: unknown key; did you mean `backend.compile.head`?"),
        ("{prefil: lean}", "backend.compile.prefil: unknown key; did you mean `backend.compile.prefill`?"),
        ("{prefill: quick}", "backend.compile.prefill: got 'quick' (text), expected one of fast, lean"),
        ("{block: 48}", "backend.compile.block: got 48 (a number), expected one of 16, 32, 64, 128, 256"),
        ("{nonsense_key: 1}", "backend.compile.nonsense_key: unknown key; known here: "),
    ],
)
def test_a_back_end_refuses_what_it_does_not_know(given, said):
    (problem,) = problems(MINIMAL, *INT8, f"backend.compile={given}")
    assert said in problem
    carried = load(MINIMAL, "backend.dtype=int8", f"backend.compile={given}").vendor_keys()
    assert len(carried) == 1  # the vendor's compiler alone knows what it takes


def test_a_recipe_of_the_vendor_can_be_compiled_for_another_back_end():
    recipe = load(VENDOR, "backend.type=onnxruntime", "frontend.model_kwargs.tp=1")
    assert sorted(recipe.vendor_keys()) == ["backend.compile.data_type", "backend.compile.gather_data_vccl_dsp_enable"]


@pytest.mark.parametrize(("hidden", "group"), [(640, 128), (2304, 128), (64, 64), (96, 32), (48, None)])
def test_the_table_of_onnxruntime_has_the_largest_groups_that_divide_it(hidden, group):
    assert load(MINIMAL, *INT8).spec.storage(hidden).table.groupsize == group
    assert (
        load(MINIMAL, *INT8, "frontend.quantize={type: w8a16, table: int8}").spec.storage(hidden).table.groupsize
        is None
    )
    assert load(MINIMAL, "backend.dtype=int8").spec.storage(hidden).table.groupsize is None


def test_every_other_public_vendor_key_is_accepted_carried_and_listed():
    recipe = load(
        VENDOR,
        "backend.quantize={calibrate_mode: kl_divergence, skip_conv_layers: []}",
        "backend.merge_shapes=true",
        "backend.remove_params=[num_batches_tracked]",
        "backend.device=vacc",
        "backend.dynamic_compile={enable_graph_partition: false}",
        "frontend.model_kwargs.attention_split_num=16",
        "frontend.dtype=float16",
        "graph.extra_ops={type: null}",
        "workspace.pyenv=python",
        "frontend.quantize.device=cuda:5",
        "frontend.quantize.calib_args={true_sequential: false, damp_percent: 1e-2, desc_act: true, wbits: 8}",
    )
    carried = recipe.vendor_keys()
    assert carried["backend.quantize"] == {"calibrate_mode": "kl_divergence", "skip_conv_layers": []}
    assert carried["frontend.model_kwargs.attention_split_num"] == 16
    assert carried["graph.extra_ops"] == {"type": None}
    assert recipe.frontend.quantize.calib_args.percdamp == 0.01
    assert recipe.frontend.quantize.calib_args.act_order is True
    assert load(yaml.safe_dump(recipe.resolved())) == recipe


def test_round_to_nearest_says_that_calibration_settings_have_no_effect():
    recipe = load(VENDOR, "frontend.quantize={type: w8a16, device: cuda, calib_args: {percdamp: 0.02}}")
    assert recipe.vendor_keys()["frontend.quantize.device"] == "cuda"
    assert recipe.vendor_keys()["frontend.quantize.calib_args"]["percdamp"] == 0.02


@pytest.mark.parametrize(("device", "carried"), [("cpu", False), ("cuda:5", True)])
def test_a_device_other_than_the_one_that_calibrates_is_said_to_have_no_effect(device, carried):
    recipe = load(VENDOR, f"frontend.quantize={{type: w8a16_gptq, device: '{device}', calib_args: {{percdamp: 0.02}}}}")
    assert ("frontend.quantize.device" in recipe.vendor_keys()) == carried
    assert "frontend.quantize.calib_args" not in recipe.vendor_keys()


@pytest.mark.parametrize("path", sorted(BUILD_IN.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_and_resolve_to_themselves(path):
    recipe = Recipe.load(path, env={"GEMMA_CHECKPOINT": "/models/gemma"})
    assert load(yaml.safe_dump(recipe.resolved())) == recipe
    if path.parent.name == "vendor":
        assert recipe.spec.ranks == 4
        recipe = Recipe.load(path, ["frontend.quantize.type=w8a16"] if recipe.frontend.quantize else [])
    else:
        assert recipe.frontend.checkpoint == "/models/gemma"
    check_built(recipe)


def test_shipped_gemma_recipes_default_to_the_demo():
    assert Recipe.load(BUILD_IN / "hf_gemma_int8.yaml", env={}).frontend.checkpoint == "demo"


def test_scheme_follows_dtype_and_quantize():
    assert str(load(MINIMAL, "backend.dtype=int8").scheme) == "w8a16"
    assert str(load(MINIMAL, "backend.dtype=bf16").scheme) == "bf16"
    assert str(load(MINIMAL, "frontend.quantize.type=w16kv8").scheme) == "w16kv8"
    assert len(QUANTIZE_TYPES) == 13
    for scheme in QUANTIZE_TYPES:
        assert str(load(MINIMAL, "backend.dtype=int8", f"frontend.quantize.type={scheme}").scheme) == scheme


def test_empty_sections_mean_the_defaults():
    assert load(MINIMAL + "dataset:\nparity:\n") == load()


def test_short_graphs_get_a_parity_that_fits():
    parity = load(MINIMAL, "frontend.shape.input_ids=[[32],[48]]").parity
    assert (parity.prompt_tokens, parity.decode_tokens) == (32, 16)


def test_a_gguf_file_needs_no_type():
    assert load(MINIMAL, "frontend.checkpoint=/models/gemma.gguf").frontend.type == "gguf"


def test_checkpoint_argument_replaces_path_and_type_and_forgives_an_unset_variable():
    text = MINIMAL.replace("demo", "${NOT_SET}\n  type: huggingface")
    recipe = Recipe.from_text(text, env={}, checkpoint="/models/it: ${x}.gguf")
    assert (recipe.frontend.checkpoint, recipe.frontend.type) == ("/models/it: ${x}.gguf", "gguf")


def test_a_type_that_the_command_line_says_is_not_replaced_in_silence():
    said = "-s frontend.type=gguf: frontend.type: gguf contradicts frontend.checkpoint '/models/it'"
    with pytest.raises(RecipeError) as refused:
        Recipe.from_text(MINIMAL, ["frontend.type=gguf"], {}, checkpoint="/models/it")
    assert said in str(refused.value)
    given = Recipe.from_text(MINIMAL, ["frontend.type=gguf"], {}, checkpoint="/models/it.gguf")
    assert given.frontend.type == "gguf"


def test_overrides_are_yaml_and_the_last_one_wins():
    recipe = load(MINIMAL, "workspace.workers=7", "backend.compile.data_type=2", "workspace.workers=3", "parity.text=~")
    assert recipe.workspace.workers == 3
    assert recipe.backend.compile == {"data_type": 2}
    assert recipe.parity.text is None


def test_variables_expand_inside_one_value_and_keep_their_type():
    text = MINIMAL.replace("demo", "${ROOT}/${MODEL:-gemma}") + "workspace:\n  workers: '${N}'\n"
    assert problems(text, ROOT="/m", N="4") == [
        "line 8: workspace.workers: got '4' (text), expected a whole number",
    ]
    recipe = load(text.replace("'${N}'", "${N:-2}"), ROOT="/m", N="")
    assert (recipe.frontend.checkpoint, recipe.workspace.workers) == ("/m/gemma", 2)
    assert load(MINIMAL.replace("demo", "${X}"), X="{a: [b").frontend.checkpoint == "{a: [b"


def test_everything_wrong_is_reported_at_once_with_path_line_and_nearest_key():
    text = """\
name: small
frontend:
  checkpoint: ${UNSET}
  shap: {input_ids: [[16], [16]]}
  shape: {input_ids: [[1000], [512]]}
  model_kwargs: {tp: four, align_qvk: true}
  quantize: {type: w8a16_gtpq, checkpoint: x}
backend:
  dtype: fp17
  merge_params: 1
workspace: {workers: 0, zzz: 1}
"""
    with pytest.raises(RecipeError) as caught:
        load(text, "backend.dtyp=3")
    assert str(caught.value) == (
        "recipe: the recipe has 13 problems\n"
        "  - line 3: frontend.checkpoint: the environment variable UNSET is not set; "
        "set it or write ${UNSET:-default}\n"
        "  - line 4: frontend.shap: unknown key; did you mean `frontend.shape`?\n"
        "  - line 5: frontend.shape.input_ids[0]: prefill length 1000 is not a multiple of 16; nearest: 992 or 1008\n"
        "  - line 5: frontend.shape.input_ids: context length 512 is shorter than prefill length 1000: the cache must "
        "hold the prompt, so write [[prefill], [context]] with context >= prefill\n"
        "  - line 6: frontend.model_kwargs.tp: got 'four' (text), expected a whole number\n"
        "  - line 6: frontend.model_kwargs.align_qvk: unknown key; did you mean `frontend.model_kwargs.align_qkv`?\n"
        "  - line 7: frontend.quantize.type: got 'w8a16_gtpq' (text), expected one of w8a16, w8a16_gptq, w8a8, "
        "w4a16_rtn, w4a16, w4a16_gptq, w16kv8, w8a16+kv8, w8a16_gptq+kv8, w8a8+kv8, w4a16_rtn+kv8, w4a16+kv8, "
        "w4a16_gptq+kv8; "
        "did you mean `w8a16_gptq`?\n"
        "  - line 7: frontend.quantize.checkpoint: unknown key here; it belongs at `frontend.checkpoint`\n"
        "  - line 9: backend.dtype: got 'fp17' (text), expected one of fp32, fp16, bf16, int8; did you mean `fp16`?\n"
        "  - line 10: backend.merge_params: got 1 (a number), expected true or false\n"
        "  - line 11: workspace.workers: got 0 (a number), expected at least 1\n"
        "  - line 11: workspace.zzz: unknown key; known here: cluster, env_recheck, path, pyenv, workers\n"
        "  - -s backend.dtyp=3: backend.dtyp: unknown key; did you mean `backend.dtype`?" + NEXT
    )


def test_required_keys_are_named():
    assert problems("name: x\nfrontend: {}\n") == [
        "line 2: frontend.checkpoint: missing, and required",
        "line 2: frontend.shape: missing, and required",
        "backend: missing, and required",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["frontend.quantize.type=w8a16"],
            "line 6: backend.dtype: fp16 contradicts frontend.quantize.type w8a16 (int8 weights): "
            "set backend.dtype: int8, or remove frontend.quantize",
        ),
        (
            ["frontend.quantize.type=w4a16+kv8"],
            "line 6: backend.dtype: fp16 contradicts frontend.quantize.type w4a16+kv8 (4-bit weights): "
            "set backend.dtype: int8, or remove frontend.quantize",
        ),
        (
            ["backend.dtype=fp32", "frontend.quantize.type=w16kv8"],
            "-s backend.dtype=fp32: backend.dtype: fp32 contradicts frontend.quantize.type w16kv8 (16-bit weights): "
            "set backend.dtype: fp16",
        ),
        (
            ["backend.dtype=int8", "frontend.quantize={type: w8a8, calib_args: {wbits: 4}}"],
            "-s frontend.quantize={type: w8a8, calib_args: {wbits: 4}}: frontend.quantize.calib_args.wbits: "
            "4 contradicts frontend.quantize.type w8a8: write 8, or remove it",
        ),
        (
            ["frontend.shape.input_ids=[[120],[256]]"],
            "-s frontend.shape.input_ids=[[120],[256]]: frontend.shape.input_ids[0]: "
            "prefill length 120 is not a multiple of 16; nearest: 112 or 128",
        ),
        (
            ["frontend.shape.input_ids=[[128],[264]]"],
            "-s frontend.shape.input_ids=[[128],[264]]: frontend.shape.input_ids[1]: "
            "context length 264 is not a multiple of 16; nearest: 256 or 272",
        ),
        (
            ["frontend.shape.input_ids=[[128],[-16]]"],
            "-s frontend.shape.input_ids=[[128],[-16]]: frontend.shape.input_ids[1][0]: "
            "got -16 (a number), expected at least 1",
        ),
        (
            ["frontend.shape.input_ids=[[1, 128], [1, 256]]"],
            "-s frontend.shape.input_ids=[[1, 128], [1, 256]]: frontend.shape.input_ids: got [[1, 128], [1, 256]], "
            "expected [[prefill length], [context length]], such as [[1024], [2048]]",
        ),
        (
            ["parity.prompt_tokens=700"],
            "-s parity.prompt_tokens=700: parity.prompt_tokens: 700 tokens do not fit the prefill length 128: "
            "write at most 128",
        ),
        (
            ["parity.decode_tokens=129"],
            "-s parity.decode_tokens=129: parity.decode_tokens: 129 steps do not fit: prefill fills 128 of 256 cache "
            "slots, so write at most 128",
        ),
        (
            ["frontend.type=gguf"],
            "-s frontend.type=gguf: frontend.type: gguf contradicts frontend.checkpoint 'demo': "
            "set frontend.type: huggingface",
        ),
        (
            ["name=../x"],
            "-s name=../x: name: got '../x', expected a plain directory name: "
            "no slash, no leading dot or dash, no '.partial' at the end",
        ),
        (["name=5"], "-s name=5: name: got 5 (a number), expected text: put it in quotes"),
        (["frontend=3"], "-s frontend=3: frontend: got 3 (a number), expected a mapping of keys to values"),
        (
            ["frontend.quantize={type: w8a16, device: tpu}", "backend.dtype=int8"],
            "-s frontend.quantize={type: w8a16, device: tpu}: frontend.quantize.device: got 'tpu' (text), "
            "expected cpu, cuda or cuda:N",
        ),
        (["backend.dtype"], "`-s backend.dtype` is not understood: write -s section.key=value"),
        (["backend..dtype=fp16"], "`-s backend..dtype=fp16` is not understood: write -s section.key=value"),
        (
            ["name.first=x"],
            "-s name.first=x: name.first: cannot be set: name is 'small', not a section",
        ),
        (
            ["workspace.path=${A:-${B}}"],
            "-s workspace.path=${A:-${B}}: workspace.path: `${A:-${B}}` is not understood: "
            "write ${NAME} or ${NAME:-default}, not nested",
        ),
        (
            ["backend.dtype=int8", "frontend.quantize={type: w8a16, calib_args: {percdamp: 0.1, damp_percent: 0.1}}"],
            "-s frontend.quantize={type: w8a16, calib_args: {percdamp: 0.1, damp_percent: 0.1}}: "
            "frontend.quantize.calib_args.damp_percent: is a second spelling of percdamp, which is given as well: "
            "keep one",
        ),
    ],
)
def test_refusals_word_for_word(overrides, expected):
    assert problems(MINIMAL, *overrides) == [expected]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "graph: !!python/object/apply:os.system ['true']",
            "line 7: graph: YAML tag `!!python/object/apply:os.system` is refused: "
            "a recipe holds only text, numbers, lists and mappings",
        ),
        (
            "graph: !secret x",
            "line 7: graph: YAML tag `!secret` is refused: a recipe holds only text, numbers, lists and mappings",
        ),
        ("name: again", "line 1: name: the key is given twice, here and on line 7: keep one"),
        ("graph: {<<: {a: 1}}", "line 7: graph.<<: merge keys (<<) are refused: write the keys out"),
        ("graph: &g {extra_ops: *g}", "line 7: graph.extra_ops: an alias contains itself: write the value out"),
        ("graph: {[a]: 1}", "line 7: graph: line 7: a key must be a word, not a list, a mapping or nothing"),
    ],
)
def test_hostile_or_careless_yaml(line, expected):
    assert problems(MINIMAL + line + "\n") == [expected]


def test_yaml_that_does_not_parse_names_line_and_column():
    assert problems("name: x\nfrontend: [a\nbackend: {}\n") == [
        "line 3, column 8: not valid YAML: expected ',' or ']', but got ':'"
    ]
    assert problems("name: x\nfrontend: {checkpoint: ${X}}\n") == [
        "line 2, column 25: not valid YAML: expected ',' or '}', but got '{'; "
        "inside {} or [] a ${VAR} must stand in quotes"
    ]
    assert problems("- a\n") == ["the file holds a list, expected a mapping that starts with `name:`"]
    assert problems("") == ["the file holds nothing, expected a mapping that starts with `name:`"]


def test_aliases_and_nesting_are_bounded():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)
    )
    too_much = ["nested or aliased beyond 5000 values or 32 levels"]
    assert problems(bomb) == too_much
    assert problems("name: " + "[" * 5000 + "]" * 5000) == too_much
    assert problems("name: " + "x" * 300_000) == ["300006 characters are too many for a recipe (limit 65536)"]


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: there is no such file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8")
    with pytest.raises(RecipeError, match=r"image\.yaml: is not UTF-8 text \(byte 0\)"):
        Recipe.load(tmp_path / "image.yaml")


def test_against_the_model():
    check_against_model(load(VENDOR), 8192)
    with pytest.raises(RecipeError) as caught:
        check_against_model(load(VENDOR, "frontend.shape.input_ids=[[1024],[16384]]"), 8192, ["another: problem"])
    assert caught.value.problems == (
        "another: problem",
        "frontend.shape.input_ids: context length 16384 is longer than the model's max_position_embeddings 8192",
    )


def test_a_recipe_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load().backend.dtype = "int8"


def test_reading_a_recipe_does_not_import_torch():
    code = "import sys, gemma_deploy.recipe, gemma_deploy.preflight; sys.exit('torch' in sys.modules)"
    root = str(BUILD_IN.parent)
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_kind_of_linear_that_no_gemma_has_is_refused_with_those_there_are():
    four = ("frontend.quantize.type=w4a16_gptq", "backend.dtype=int8")
    with pytest.raises(RecipeError) as refused:
        load(VENDOR, *four, "frontend.quantize.calib_args={keep_w8: [v_proj, k_prj]}")
    said = str(refused.value)
    assert "frontend.quantize.calib_args.keep_w8[1]: got 'k_prj'" in said
    assert "k_proj" in said
    assert "down_proj" in said
