"""onnxruntime-genai on our artifacts: transformers' tokens, past the window and from turn to turn; refusals."""

import functools
import json
import shutil

import numpy as np
import psutil
import pytest

from gemma_deploy.backends.onnxruntime.genai import GenaiModel, GenaiSession
from gemma_deploy.cli import main
from gemma_deploy.engine import open_engine
from gemma_deploy.errors import ArtifactError, DeployError, UsageError
from gemma_deploy.runtime import Sampling, Tokenizer
from gemma_deploy.runtime.generate import GenerationStats
from gemma_deploy.text import TextStream
from tests.runtime.make import compile_tiny

VOCAB, PROMPT, CONTEXT = 512, 30, 128  # nearly four windows of 8


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [[2, *rng.integers(3, 500, PROMPT - 1).tolist()] for _ in range(6)]


@pytest.fixture(scope="module")
def artifact(genai_artifact):
    return genai_artifact("gemma3_text")


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


@pytest.fixture(scope="module")
def model(artifact):
    return GenaiModel(artifact, 1)


@pytest.fixture(scope="module")
def tokenizer(artifact):
    return Tokenizer(artifact)


@functools.cache
def eager(artifact, **changes):
    """The checkpoint of an artifact in transformers: (prompts [B, S], count) -> greedy tokens [B, count]."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = artifact.parent.parent / "checkpoint"
    config = AutoConfig.from_pretrained(checkpoint, **changes)
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, attn_implementation="eager", dtype=torch.float32
    ).eval()

    def generate(ids, count):
        ids = torch.tensor(ids)
        return loaded.generate(ids, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :].tolist()

    return generate


def stream(model, tokenizer, ids, count=128, sampling=None, stats=None):
    """In a session made for that alone."""
    session = GenaiSession(model, tokenizer, sampling, max_length=len(ids) + count)
    return session.reply(ids, max_new_tokens=count, stats=stats)


def tokens_of(model, tokenizer, ids, count, sampling=None):
    stats = GenerationStats()
    for _ in stream(model, tokenizer, ids, count, sampling, stats):
        pass
    return stats.tokens


def said(session, ids, count):
    stats = GenerationStats()
    for _ in session.reply(ids, max_new_tokens=count, stats=stats):
        pass
    return stats


def test_greedy_tokens_are_those_of_transformers_past_the_window(genai_artifact, model_type, prompts):
    artifact = genai_artifact(model_type)
    expected = eager(artifact)(prompts, 8)
    if model_type != "gemma":  # the window matters to what follows
        assert eager(artifact, sliding_window=100)(prompts, 8) != expected
    assert len({token for row in expected for token in row}) > 6
    model, tokenizer = GenaiModel(artifact, 1), Tokenizer(artifact)
    assert [tokens_of(model, tokenizer, prompt, 8) for prompt in prompts] == expected


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_session_goes_on_as_if_it_had_read_everything_at_once(genai_artifact, prompts, kind):
    artifact = genai_artifact(kind)
    generate = eager(artifact)
    session = GenaiSession(GenaiModel(artifact, 1), Tokenizer(artifact))
    sequence = list(prompts[0])
    assert said(session, sequence, 9).finish == "length"
    sequence += generate([sequence], 9)[0]
    assert session.ids == sequence
    more = prompts[1][1:8]
    sequence += more
    stats = said(session, more, 9)
    assert (stats.tokens, stats.prompt_tokens) == (generate([sequence], 9)[0], 7)
    sequence += stats.tokens
    # a reply that is interrupted stays as far as it came
    pieces = session.reply(prompts[2][1:5], max_new_tokens=50)
    next(pieces)
    pieces.close()
    read = len(sequence) + 4
    assert session.ids[:read] == sequence + prompts[2][1:5]
    assert 0 < len(session.ids) - read < 50
    sequence = session.ids + prompts[3][1:9]
    assert said(session, prompts[3][1:9], 9).tokens == generate([sequence], 9)[0]
    session.reset()
    assert session.ids == []
    assert said(session, prompts[4], 9).tokens == generate([prompts[4]], 9)[0]


def test_a_stop_token_ends_a_reply_and_is_not_kept(copy, tokenizer, model, prompts):
    first = tokens_of(model, tokenizer, prompts[0], 8)
    stop = first[-1]
    kept = first[: first.index(stop)]
    assert kept
    file = copy / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["eos_token_id"] = [1, stop]
    file.write_text(json.dumps(config))
    session = GenaiSession(GenaiModel(copy, 1), tokenizer)
    stats = said(session, prompts[0], 20)
    assert (stats.finish, stats.tokens, session.ids) == ("stop", kept, prompts[0] + kept)
    more = [stop, *prompts[1][1:6]]  # as a chat template closes the turn
    assert said(session, more, 1).tokens == tokens_of(model, tokenizer, prompts[0] + kept + more, 1)


def test_text_begins_with_one_bos_and_messages_go_through_the_template(artifact, tokenizer, monkeypatch):
    read, engine = [], open_engine(artifact, threads=1)
    monkeypatch.setattr(GenaiSession, "reply", lambda self, ids, **_: read.append(ids))
    messages = [{"role": "user", "content": "a"}]
    for prompt in ("the list", "<bos>the list", messages, np.array([5, 6])):
        engine.stream(prompt)
    assert read[0] == read[1] == [tokenizer.bos_id, *tokenizer.encode_more("the list")]
    assert read[2:] == [tokenizer.encode_chat(messages), [5, 6]]


def test_the_full_context_ends_it(model, tokenizer, caplog):
    session = GenaiSession(model, tokenizer)
    stats = said(session, [5] * (CONTEXT - 3), 20)
    assert (stats.finish, len(stats.tokens), len(session.ids)) == ("context", 3, CONTEXT)
    assert f"the context of {CONTEXT} slots is full" in caplog.text


def test_what_does_not_fit_is_refused_and_changes_nothing(artifact, model, tokenizer):
    engine = open_engine(artifact, threads=1)
    with pytest.raises(UsageError, match=r"the prompt has 128 tokens, this artifact's context is 128 tokens"):
        engine.stream([5] * CONTEXT)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        engine.stream("x", max_new_tokens=0)
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.stream([])
    session = GenaiSession(model, tokenizer)
    said(session, [5] * 100, 1)
    with pytest.raises(UsageError, match=r"with 27 more tokens on 101, this artifact's context"):
        session.reply([5] * 27)
    for token in (-1, VOCAB):
        with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary"):
            session.reply([5, token])
    assert len(session.ids) == 101
    assert len(said(session, [5] * 26, 1).tokens) == 1


def test_sampling_is_seeded_and_bounded(model, tokenizer, prompts):
    def draw(*options):
        return tokens_of(model, tokenizer, prompts[0], 12, Sampling(*options))

    greedy = draw()
    assert draw(1.5, 0, 1.0, 1) == draw(1.5, 0, 1.0, 1) != draw(1.5, 0, 1.0, 2)
    assert draw(1.5, 0, 1.0, 1) != greedy
    assert draw(1.5, 1, 1.0, 1) == greedy  # the only one of the top 1
    assert draw(1.5, 0, 1e-6, 1) == greedy
    assert draw(1e-3, 10 * VOCAB, 1.0, 1) == greedy
    with pytest.raises(UsageError, match="seed 2147483648 is too large"):
        draw(1.0, 0, 1.0, 2**31)


def test_statistics_tell_loading_prompt_and_steps_apart(artifact, prompts):
    stats, engine = GenerationStats(), open_engine(artifact, threads=1)
    for _ in engine.stream(prompts[0], max_new_tokens=5, stats=stats):
        pass
    assert stats.load_seconds == engine.load_seconds > 0
    assert stats.prefill_seconds > 0
    assert stats.tokens_per_second == pytest.approx(4 / stats.decode_seconds)


def test_threads_are_those_asked_for(artifact):
    def started(threads):
        before = psutil.Process().num_threads()
        opened = GenaiModel(artifact, threads)
        made = psutil.Process().num_threads() - before
        del opened
        return made

    started(1)
    assert started(4) - started(1) == 3


def test_overflow_is_no_answer(copy, tokenizer):
    manifest = json.loads((copy / "manifest.json").read_text())
    row = next(row for row in manifest["params"] if row["name"] == "model.norm.weight")
    with (copy / "params.safetensors").open("r+b") as file:
        file.seek(row["offset"])
        file.write(np.full(row["nbytes"] // 4, np.nan, np.float32).tobytes())
    with pytest.raises(DeployError, match="the model gave nan as its largest logit"):
        next(stream(GenaiModel(copy, 1), tokenizer, tokenizer.encode("the")))


def nan_from(artifact, position):
    """Let every layer's rotary tables be NaN from a position on, as if the model overflowed there."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    rows = [row for row in manifest["params"] if row["name"].startswith("model.rotary_emb.")]
    assert rows
    with (artifact / "params.safetensors").open("r+b") as file:
        for row in rows:
            width = row["shape"][1]
            file.seek(row["offset"] + 4 * width * position)
            file.write(np.full((row["shape"][0] - position) * width, np.nan, np.float32).tobytes())


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.5, seed=3)])
def test_a_model_that_overflows_in_its_answer_ends_in_a_sentence(copy, artifact, model, tokenizer, sampling):
    """At token 50, long after the prompt; what came before it is as it should be."""
    nan_from(copy, 50)
    opened, stats = GenaiModel(copy, 1), GenerationStats()
    right = tokens_of(model, tokenizer, [2, 30, 40], 60, sampling)
    assert len(right) == 60
    with pytest.raises(DeployError, match="the model gave nan as its largest logit") as caught:
        for _ in stream(opened, tokenizer, [2, 30, 40], 60, sampling, stats):
            pass
    assert "after 51 tokens" in str(caught.value)
    assert stats.tokens == right[: 51 - 3]  # the last of them stands at position 50, and was read
    assert "gemma-deploy parity" in caught.value.next_step


def without_genai(monkeypatch):
    """As where the package is not installed."""
    monkeypatch.setattr("gemma_deploy.backends.onnxruntime.engine.genai_installed", lambda: False)
    monkeypatch.setattr("gemma_deploy.backends.onnxruntime.genai.genai_installed", lambda: False)


def test_without_the_package_onnx_runtime_gives_the_same_text_and_that_is_said(artifact, monkeypatch, capfd, caplog):
    words = [artifact, "-p", "the list", "-n", 12, "--threads", 1]
    expected = run(capfd, *words)
    without_genai(monkeypatch)
    monkeypatch.setattr(GenaiModel, "__init__", lambda *_: pytest.fail("genai was opened"))
    assert run(capfd, *words)[:2] == expected[:2]
    said = [record.message for record in caplog.records]
    assert said == [
        'onnxruntime-genai is not installed: ONNX Runtime itself runs this artifact (pip install "gemma-deploy[genai]")'
    ]


def test_what_only_genai_runs_is_refused_without_it(tmp_path, monkeypatch, capsys):
    artifact = compile_tiny(tmp_path, "gemma", {"type": "onnxruntime", "dtype": "bf16"})
    without_genai(monkeypatch)
    assert main(["run", str(artifact), "-p", "x"]) == 2
    said = capsys.readouterr().err
    assert said.endswith('onnxruntime-genai is not installed here\n  next: pip install "gemma-deploy[genai]"\n')


def test_damaged_artifacts_are_named(copy):
    def error():
        with pytest.raises(ArtifactError) as caught:
            GenaiModel(copy, 1)
        return str(caught.value)

    (copy / "model.onnx").write_bytes(b"no graph")
    assert "onnxruntime-genai refuses it" in error()
    (copy / "params.safetensors").unlink()
    assert "params.safetensors: is missing" in error()
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["vocab_size"] = 2**31 - 1  # genai would make room for the logits before it looks at the graph
    (copy / "genai_config.json").write_text(json.dumps(config))
    assert "model.vocab_size: input should be less than or equal to 4194304" in error()
    (copy / "genai_config.json").write_text('{"model": {}}')
    assert "genai_config.json: is damaged" in error()
    assert "model.eos_token_id: field required" in error()
    (copy / "genai_config.json").unlink()
    assert "genai_config.json: is missing" in error()


def run(capfd, *arguments):
    code = main(["run", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_run_prints_prompt_and_text(artifact, model, tokenizer, capfd):
    code, out, err = run(capfd, artifact, "-p", "the list", "-n", 9, "--threads", 1, "--stats")
    expected = "".join(stream(model, tokenizer, tokenizer.encode("the list"), 9))
    assert (code, out) == (0, f"the list{expected}\n")
    assert f"{len(tokenizer.encode('the list'))} prompt tokens in" in err
    assert err.endswith("; --max-new-tokens is reached\n")
    sampled = [run(capfd, artifact, "-p", "the", "--temperature", 1.5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_run_refuses_what_is_for_static_artifacts(artifact, capfd):
    code, out, err = run(capfd, artifact, "-p", "the", "--strict")
    assert (code, out) == (2, "")
    assert "--strict is for static artifacts" in err


def test_ctrl_c_ends_the_line_and_the_program(artifact, capfd, monkeypatch):
    push = TextStream.push

    def interrupted(text, token):
        if len(text._ids) == 4:
            raise KeyboardInterrupt
        return push(text, token)

    monkeypatch.setattr(TextStream, "push", interrupted)
    code, out, err = run(capfd, artifact, "-p", "the", "--threads", 1, "--stats")
    assert (code, out[:3], out[-1]) == (130, "the", "\n")
    assert err.endswith("; interrupted\n")


@pytest.mark.parametrize("cache", ["full", "window"])
def test_a_batch_of_unequal_prompts_padded_on_the_right_is_transformers(genai_artifact, artifact, tmp_path, cache):
    """As genai pads; with caches of a window as well, which ONNX Runtime fills row by row."""
    import onnxruntime_genai as og

    made = artifact
    if cache == "window":
        made = tmp_path / "window"
        checkpoint = artifact.parent.parent / "checkpoint"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"name: x\nfrontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[64], [{CONTEXT}]]}}}}\n"
            "backend: {type: onnxruntime, dtype: fp32, compile: {cache: window}}\n"
        )
        assert main(["compile", str(recipe), "--out", str(made), "--no-parity"]) == 0
    rng, lengths, count = np.random.default_rng(4), (5, 21, 13), 12
    rows = [[2, *rng.integers(3, 500, length - 1).tolist()] for length in lengths]
    model = og.Model(str(made))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=CONTEXT, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([row + [0] * (max(lengths) - len(row)) for row in rows], np.int32))
    found = []
    for _ in range(count):
        generator.generate_next_token()
        found.append(generator.get_next_tokens().tolist())
    expected = [eager(artifact)([row], count)[0] for row in rows]
    assert np.array(found).T.tolist() == expected
    assert len({token for row in expected for token in row}) > 6
