"""Parts of a model: the chain computes what the whole does, each part reads its own tensors alone."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli import cli
from gemma_deploy.errors import CheckpointError, NotBuiltError, UsageError
from gemma_deploy.partition import spans_of
from gemma_deploy.patched import configured
from gemma_deploy.split import (
    REGISTRY,
    ModelFactory,
    SplitChain,
    Trunk,
    from_pretrained_split,
    load_part,
    register,
    save_part,
)
from gemma_deploy.testing import write_tiny_checkpoint

POINTS = (1, 2)


@pytest.fixture(scope="module")
def chain(parts):
    return SplitChain(parts)


def test_the_chain_is_the_whole_bit_for_bit(stock, chain, prompt):
    ids, mask = prompt
    with torch.no_grad():
        expected, got = (model(ids, attention_mask=mask, labels=ids) for model in (stock, chain))
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.loss, got.loss)


@pytest.mark.parametrize(
    "model_type", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma3_text"))],
    indirect=True, scope="session",
)  # fmt: skip
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"cache_implementation": "static", "disable_compile": True},
        pytest.param({"use_cache": False}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "beams", "sampling", "static-cache", "no-cache"],
)
def test_the_chain_generates_the_whole_models_tokens(stock, chain, prompt, how):
    ids, mask = prompt
    results = []
    for model in (stock, chain):
        torch.manual_seed(7)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=16, **{"do_sample": False, **how}))
    assert torch.equal(*results)


def test_each_part_has_a_cache_of_its_own_layers(chain, prompt):
    seen = []
    handles = [
        part.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True)
        for part in chain.parts
    ]
    with torch.no_grad():
        cache = chain(prompt[0], use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    assert [len(part.layers) for part in seen] == [part.span.stop - part.span.start for part in chain.parts]
    assert [layer for part in seen for layer in part.layers] == cache.layers
    assert cache.get_seq_length() == 40


def test_gradients_pass_through_the_chain(stock, prompt, checkpoint_dir, model_type):
    chain = SplitChain(
        ModelFactory.create_split_models(model_type, checkpoint_dir, *POINTS, dtype=torch.float32)
    ).train()
    whole = AutoModelForCausalLM.from_pretrained(checkpoint_dir, attn_implementation="eager", dtype=torch.float32)
    for model in (whole.train(), chain):
        model(prompt[0], labels=prompt[0]).loss.backward()
    trunk = chain.parts[1]
    expected = whole.model.layers[1].mlp.up_proj.weight.grad
    assert torch.equal(trunk.model.layers[0].mlp.up_proj.weight.grad, expected)
    # one table in two parts: its gradient is the sum of theirs
    both = chain.parts[0].model.embed_tokens.weight.grad + chain.parts[2].lm_head.weight.grad
    torch.testing.assert_close(both, whole.model.embed_tokens.weight.grad, rtol=0, atol=1e-6)


def test_a_part_reads_its_own_tensors_alone(checkpoint_dir, monkeypatch):
    read = set()
    rows = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda self, name, *span: (read.add(name), rows(self, name, *span))[1])
    checkpoint = Checkpoint.open(checkpoint_dir)
    read.clear()
    part = from_pretrained_split(checkpoint, spans_of(checkpoint.config.num_hidden_layers, POINTS)[1])
    assert read == {name for name in checkpoint.tensors if name.startswith("model.layers.1.")}
    assert part.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16  # the config's
    assert set(part.state_dict()) == {name.replace("model.layers.1.", "model.layers.0.") for name in read}


def test_parts_are_saved_and_loaded(parts, stock, prompt, tmp_path):
    for part in parts:
        save_part(part, tmp_path / part.span.name)
    with safe_open(tmp_path / "trunk" / "model.safetensors", "pt") as file:
        assert all(name.startswith("model.layers.0.") for name in file.keys())  # noqa: SIM118 (no mapping)
    chain = SplitChain([load_part(tmp_path / name) for name in ("bottom", "trunk", "top")])
    with torch.no_grad():
        assert torch.equal(stock(prompt[0]).logits, chain(prompt[0]).logits)
    with pytest.raises(UsageError, match="exists already"):
        save_part(parts[0], tmp_path / "bottom")


def test_each_part_stays_on_its_own_device(checkpoint_dir, model_type, prompt):
    chain = SplitChain(
        ModelFactory.create_split_models(model_type, checkpoint_dir, *POINTS, device=["cpu", "meta", "meta"])
    )
    assert [str(part.device) for part in chain.parts] == ["cpu", "meta", "meta"]
    assert str(chain.device) == "cpu"
    for rotary in (rotary for part in chain.parts[1:] for rotary in part.model.rotary.values()):
        rotary.freeze(*(table.to("meta") for table in rotary.make_tables(64)))  # no maximum of positions without data
    out = chain(prompt[0], attention_mask=prompt[1], use_cache=False)
    assert (str(out.logits.device), tuple(out.logits.shape)) == ("meta", (2, 40, 512))


@pytest.mark.parametrize("tied", [True, False])
def test_the_command_writes_parts_that_load(tmp_path, prompt, tied):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma2", tie_word_embeddings=tied)
    out = tmp_path / "parts"
    result = CliRunner().invoke(cli, ["split", str(checkpoint), str(out), "--points", "2,3,4"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    index = json.loads((out / "split.json").read_text())
    assert [(part["name"], part["start"], part["stop"]) for part in index["parts"]] == [
        ("bottom", 0, 2), ("trunk1", 2, 3), ("trunk2", 3, 4), ("top", 4, 5),
    ]  # fmt: skip
    assert {file.name for file in (out / "top").iterdir()} == {"config.json", "model.safetensors"}
    chain = SplitChain.from_split(out)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(whole(prompt[0]).logits, chain(prompt[0]).logits)
    with pytest.raises(UsageError, match="--force"):
        cli.main(["split", str(checkpoint), str(out)], standalone_mode=False)
    cli.main(["split", str(checkpoint), str(out), "--parts", "2", "--force"], standalone_mode=False)
    assert [part.kind for part in SplitChain.from_split(out).parts] == ["bottom", "top"]
    assert not out.with_name("parts.partial").exists()


def test_a_killed_split_leaves_nothing_that_looks_finished_and_continues(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", "gemma")
    out = tmp_path / "parts"
    code = (
        "import os, signal\n"
        "from gemma_deploy.split import writing\n"
        "write, count = writing.write_params, []\n"
        "def once(*args, **kwargs):\n"
        "    count.append(1)\n"
        "    if len(count) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*args, **kwargs)\n"
        "writing.write_params = once\n"
        "from gemma_deploy.cli import main\n"
        f"main(['split', {str(checkpoint)!r}, {str(out)!r}, '--points', '1,2'])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    first = (out.with_name("parts.partial") / "bottom" / "model.safetensors").stat()
    cli.main(["split", str(checkpoint), str(out), "--points", "1,2"], standalone_mode=False)
    again = (out / "bottom" / "model.safetensors").stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)
    assert {file.name for file in out.iterdir()} == {"bottom", "trunk", "top", "split.json"}


def test_what_does_not_fit_is_refused(parts, checkpoint_dir, model_type, tmp_path):
    other = "gemma2" if model_type != "gemma2" else "gemma"
    with pytest.raises(UsageError, match=f"the checkpoint is a {model_type}"):
        ModelFactory.create_split_models(other, checkpoint_dir, 1, 2)
    with pytest.raises(UsageError, match="at least one layer each"):
        ModelFactory.create_split_models(model_type, checkpoint_dir, 2, 2)
    with pytest.raises(UsageError, match="2 devices for 3 parts"):
        ModelFactory.create_split_models(model_type, checkpoint_dir, 1, 2, device=["cpu", "cpu"])
    for wrong in ([], parts[:2], [parts[0], parts[2]], parts[::-1]):
        with pytest.raises(UsageError, match="no whole model"):
            SplitChain(wrong)
    with pytest.raises(CheckpointError, match=r"split\.json: is missing"):
        SplitChain.from_split(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not the config of a part"):
        load_part(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("attention_dropout", "x"), ("initializer_range", [])])
def test_what_transformers_refuses_in_a_config_is_told_by_its_key(parts, tmp_path, key, value):
    folder = save_part(parts[1], tmp_path / "trunk")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=f"transformers refuses the model's config: .*{key}"):
        load_part(folder)


CONFIGS_OF_PARTS = {
    "no part": (lambda here: here.clear(), "start and stop: expected whole numbers from 0 to"),
    "too many layers": (lambda here: here.update(stop=99), "start and stop: expected whole numbers from 0 to"),
    "text": (lambda here: here.update(start="0"), "start and stop: expected whole numbers from 0 to"),
    "scale": (lambda here: here.update(embed_scale="x"), "embed_scale: got 'x', expected exact or bf16"),
    "name": (lambda here: here.update(name=[]), "name: got '[]', expected text"),
}


@pytest.mark.parametrize("name", CONFIGS_OF_PARTS)
def test_a_config_that_says_no_part(parts, tmp_path, name):
    change, words = CONFIGS_OF_PARTS[name]
    folder = save_part(parts[1], tmp_path / "trunk")
    config = json.loads((folder / "config.json").read_text())
    change(config["gemma_deploy_part"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_part(folder)
    assert any(words in problem for problem in error.value.problems)


@pytest.mark.parametrize("names", ["x", [], [{}], [{"name": 5}], [{"name": "../trunk"}], [{"name": "/etc"}], [None]])
def test_a_split_that_names_other_places(tmp_path, names):
    (tmp_path / "split.json").write_text(json.dumps({"parts": names}))
    with pytest.raises(CheckpointError, match=r"split\.json: is no split model"):
        SplitChain.from_split(tmp_path)


def test_a_part_with_a_tensor_too_few_is_refused(parts, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_part(parts[1], tmp_path / "trunk")
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_part(folder)
    assert error.value.problems == ("missing: model.layers.0.mlp.up_proj.weight", "left over: extra.weight")


def test_a_new_family_joins_with_a_decorator(monkeypatch):
    @register("gemma9", "trunk")
    class Gemma9Trunk(Trunk):
        pass

    monkeypatch.delitem(REGISTRY, ("gemma9", "trunk"))
    with pytest.raises(ValueError, match="gemma trunk is Trunk already"):
        register("gemma", "trunk")(Gemma9Trunk)
    from gemma_deploy.split.registry import part_class

    with pytest.raises(NotBuiltError, match="nothing is registered as trunk of model_type 'gemma9'"):
        part_class("gemma9", "trunk")
    register("gemma9", "trunk")(Gemma9Trunk)
    assert part_class("gemma9", "trunk") is Gemma9Trunk
    monkeypatch.delitem(REGISTRY, ("gemma9", "trunk"))


def test_a_dtype_that_transformers_makes_nothing_of_is_refused():
    """It is looked at when a model is built, not when the config is."""

    class Config:
        def to_dict(self):
            raise IndexError("list index out of range")

    with pytest.raises(CheckpointError, match="transformers refuses the model's config: list index out of range"):
        configured(lambda **keys: Config(), {"dtype": "x"})
