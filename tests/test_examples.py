"""The programs in examples/ do what they say, and the pages that explain them show them as they are."""

import inspect
import runpy
from pathlib import Path

import numpy as np
import pytest

from gemma_deploy.compile import compile_recipe
from gemma_deploy.recipe import Recipe

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = [2, *range(100, 119)]  # longer than two windows of 8
SAID = "Return the value of the message.\n"


def load(name):
    return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture(scope="module")
def demo_for_genai(once):
    def make(folder):
        changes = [f"workspace.path={folder}", "name=demo"]
        compile_recipe(Recipe.load("build_in/ort_gemma_int8.yaml", changes), parity=False)

    return once("demo-genai", make) / "demo"


@pytest.fixture(scope="module")
def static(artifacts):
    """A Gemma 3 of four windows and 80 cache slots, float32."""
    return artifacts("gemma3_text", "fp32", batch=1)


@pytest.fixture(scope="module")
def expected(static):
    """Its checkpoint in transformers: greedy tokens after PROMPT, more than the cache takes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        static.parent / "checkpoint", attn_implementation="eager", dtype=torch.float32
    ).eval()
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("new_tokens", [1, 20, 60])
def test_the_static_loop_gives_transformers_tokens_until_the_cache_is_full(static, expected, new_tokens):
    got = list(load("static_ort.py")["generate"](static, PROMPT, new_tokens, set()))
    assert got == expected[: min(new_tokens, 80 - 32 + 1)]  # one more than there are slots behind the prompt


def test_the_static_loop_stops_at_a_stop_token(static, expected):
    end = expected[4]
    got = list(load("static_ort.py")["generate"](static, PROMPT, 20, {end}))
    assert got == expected[: expected.index(end)]


def test_the_static_loop_takes_a_prompt_of_its_whole_length(static):
    got = list(load("static_ort.py")["generate"](static, [2, *range(50, 81)], 3, set()))
    assert len(got) == 3
    with pytest.raises(AssertionError, match="1 to 32 tokens"):
        list(load("static_ort.py")["generate"](static, [2, *range(50, 82)], 3, set()))


def test_the_static_program_says_what_run_says(demo_artifact, capsys):
    load("static_ort.py")["main"](demo_artifact, "Return the")
    assert capsys.readouterr().out == SAID


@pytest.mark.slow
def test_the_static_program_reads_caches_of_codes_with_their_scales(tmp_path, capsys):
    """float16 and int8 caches: dtypes and shapes come from the graph."""
    changes = [f"workspace.path={tmp_path}", "name=kv8", "frontend.quantize.type=w16kv8", "dataset.name=c4:2"]
    changes += ["dataset.seqlen=64", "backend.dtype=fp16"]
    compile_recipe(Recipe.load("build_in/hf_gemma_fp16.yaml", changes), parity=False)
    load("static_ort.py")["main"](tmp_path / "kv8", "Return the")
    assert capsys.readouterr().out == SAID


def test_the_genai_program_says_what_run_says(demo_for_genai, capsys):
    load("genai.py")["main"](str(demo_for_genai), "Return the")
    assert capsys.readouterr().out == SAID


def test_its_tokenizer_puts_no_bos_in_front(demo_for_genai):
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = og.Tokenizer(og.Model(str(demo_for_genai)))
    assert tokenizer.bos_token_id == 2
    assert 2 not in np.asarray(tokenizer.encode("Return the"))


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("plain-onnxruntime.md", lambda: inspect.getsource(load("static_ort.py")["generate"])),
        ("onnxruntime-genai.md", lambda: inspect.getsource(load("genai.py")["main"])),
    ],
)
def test_the_page_shows_the_program(page, shown):
    assert shown() in (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("program", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_a_program_without_its_arguments_says_how_it_is_used(program, monkeypatch):
    """`compile_and_ask.py` alone needs none."""
    monkeypatch.setattr("sys.argv", [str(program), *(["--help"] if program.stem == "compile_and_ask" else [])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(program), run_name="__main__")
    assert f"\nUse: python examples/{program.name} " in ended.value.code  # sys.exit prints text, and the code is 1
