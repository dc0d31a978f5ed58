"""What stands behind an encoder: read from sentence-transformers' folders, or refused in a sentence."""

import json
import shutil

import numpy as np
import pytest

from gemma_deploy import reading
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint.sentence import DenseLayer, cut, pooled
from gemma_deploy.errors import CheckpointError, NotBuiltError
from gemma_deploy.testing import TINY_PROMPTS
from tests.encoders import write_encoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("sentence") / "checkpoint", num_hidden_layers=1)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole, tmp_path / "encoder")


def change(folder, name, **keys):
    path = folder / name
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: one for key, one in (value | keys).items() if one != "gone"}))


def opened(folder):
    return Checkpoint.open(folder, encoder=True)


def test_what_is_read(whole):
    checkpoint = opened(whole)
    head = checkpoint.config.sentence
    assert head.dense == (DenseLayer("2_Dense.linear", 64, 320), DenseLayer("3_Dense.linear", 320, 160))
    assert (head.dimensions, head.sizes, head.longest) == (160, (160, 128), 256)
    assert (dict(head.prompts), head.default_prompt) == (TINY_PROMPTS, None)
    assert list(checkpoint.tensors)[-3:] == ["model.norm.weight", "2_Dense.linear.weight", "3_Dense.linear.weight"]
    assert checkpoint.config.architecture.encoder
    assert checkpoint.config.to_dict()["sentence"]["dense"][0]["name"] == "2_Dense.linear"


def test_every_file_is_read_once(whole, monkeypatch):
    """What is checked is what the checkpoint's fingerprint is made of."""
    read, right = [], reading.read_bytes
    monkeypatch.setattr(reading, "read_bytes", lambda path, *kind, **more: read.append(path.name) or right(path, *kind))
    opened(whole)
    assert read.count("modules.json") == 1


def test_the_newer_spelling_of_sentence_transformers_6(folder):
    """As version 6.2 saves the same model."""
    before = opened(folder).config.sentence
    modules = json.loads((folder / "modules.json").read_text())
    for one in modules:
        one["type"] = "sentence_transformers.base.modules." + one["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling/config.json").write_text('{"embedding_dimension": 64, "pooling_mode": "mean"}')
    for number in (2, 3):
        change(folder, f"{number}_Dense/config.json", module_input_name="sentence_embedding")
    change(folder, "sentence_bert_config.json", max_seq_length="gone", transformer_task="feature-extraction")
    after = opened(folder).config.sentence
    assert (after.dense, after.prompts, after.longest) == (before.dense, before.prompts, None)


def gone(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def keys(name, **given):
    return lambda folder: change(folder, name, **given)


def pooling(**given):
    return keys("1_Pooling/config.json", **given)


def modules(edit):
    def changed(folder):
        path = folder / "modules.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return changed


def pickled(folder):
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")


def other_weights(folder):
    shutil.copy(folder / "3_Dense/model.safetensors", folder / "2_Dense/model.safetensors")


BAD = {
    "no modules.json": (gone("modules.json"), "is missing"),
    "no 2_Dense": (gone("2_Dense"), "2_Dense is not there, and modules.json names it"),
    "no weights": (gone("2_Dense/model.safetensors"), "2_Dense/model.safetensors is not there"),
    "pickled weights": (pickled, r"2_Dense/model.safetensors is not there \(pickled weights are never opened\)"),
    "another width": (
        keys("3_Dense/config.json", in_features=128),
        "3_Dense/config.json: reads 128 channels, and what stands before it gives 320",
    ),
    "another shape": (other_weights, r"linear.weight is \[160, 320\], its config says \[320, 64\]"),
    "CLS": (pooling(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True), "pooling is 'cls_token'"),
    "two ways": (pooling(pooling_mode_max_tokens=True), "pooling is 'max, mean'"),
    "an unknown way": (pooling(pooling_mode="lasttoken"), "pooling is 'lasttoken', and only the mean over tokens"),
    "a way that is no text": (pooling(pooling_mode=7), "pooling is 'none'"),
    "another width of the encoder": (pooling(word_embedding_dimension=768), "pools 768 channels, the encoder has 64"),
    "without the prompt": (pooling(include_prompt=False), "include_prompt is false"),
    "tanh": (
        keys("2_Dense/config.json", activation_function="torch.nn.modules.activation.Tanh"),
        "activation_function is 'torch.nn.modules.activation.Tanh', and only Identity is built",
    ),
    "no activation said": (keys("2_Dense/config.json", activation_function="gone"), "Tanh'"),
    "a bias": (keys("2_Dense/config.json", bias=True), "a bias is not built"),
    "a residual": (keys("2_Dense/config.json", use_residual=True), "use_residual is not built"),
    "no sizes": (keys("2_Dense/config.json", in_features="wide"), "expected two sizes"),
    "no normalisation": (modules(lambda all_: all_[:-1]), "names the modules Transformer, Pooling, Dense, Dense"),
    "another module": (
        modules(lambda all_: [*all_[:2], all_[2] | {"type": "sentence_transformers.models.LSTM"}, *all_[3:]]),
        "LSTM",
    ),
    "a folder outside": (modules(lambda all_: [*all_[:2], all_[2] | {"path": "../2_Dense"}, *all_[3:]]), "../2_Dense"),
    "an absolute folder": (modules(lambda all_: [*all_[:2], all_[2] | {"path": "/etc"}, *all_[3:]]), "'/etc'"),
    "no list": (modules(lambda all_: {"a": 1}), "is no list of modules"),
    "a default prompt that is none": (
        keys("config_sentence_transformers.json", default_prompt_name="title"),
        "default_prompt_name 'title' is none of query, document",
    ),
    "a default prompt that is no text": (
        keys("config_sentence_transformers.json", default_prompt_name=[]),
        r"default_prompt_name '\[\]' is none of query, document",
    ),
    "a prompt with half a character": (
        keys("config_sentence_transformers.json", prompts={"query": "a", "do\ud800c": "b", "text": "\udfff"}),
        r"prompts 'do\\ud800c', 'text': half a character",
    ),
    "prompts that are no texts": (keys("config_sentence_transformers.json", prompts={"a": 1}), "prompts is no object"),
    "lower case": (keys("sentence_bert_config.json", do_lower_case=True), "do_lower_case is true"),
    "no length": (keys("sentence_bert_config.json", max_seq_length=-1), "max_seq_length is -1"),
    "soft caps": (keys("config.json", attn_logit_softcapping=30.0), "attn_logit_softcapping: got 30.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_carried_out_is_said(folder, name):
    spoil, said = BAD[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        opened(folder)
    assert caught.value.next_step


def test_all_of_it_at_once(folder):
    pooling(pooling_mode_mean_tokens=False)(folder)
    keys("2_Dense/config.json", bias=True, activation_function="torch.nn.Tanh")(folder)
    gone("3_Dense")(folder)
    with pytest.raises(CheckpointError, match=r"4 thing\(s\) behind the encoder") as caught:
        opened(folder)
    assert len(caught.value.problems) == 4


def test_other_commands_say_what_it_is(whole):
    with pytest.raises(NotBuiltError, match=r"is an encoder \(EmbeddingGemma\): it makes vectors of texts"):
        Checkpoint.open(whole)
    with pytest.raises(NotBuiltError, match="adapters are not added to one"):
        Checkpoint.open(whole, whole, encoder=True)


def test_other_generations_stay_causal(folder):
    change(folder, "config.json", model_type="gemma2")
    with pytest.raises(CheckpointError, match="use_bidirectional_attention"):
        opened(folder)


def test_a_change_behind_the_encoder_changes_the_fingerprint(folder):
    before = opened(folder)
    change(folder, "config_sentence_transformers.json", prompts={"query": "q: "})
    assert opened(folder).fingerprint() != before.fingerprint()
    assert opened(folder).weights_fingerprint() != before.weights_fingerprint()


def test_a_cut_vector_has_length_1_again_and_the_same_direction():
    vectors = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cut(vectors, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found, vectors[:, :3] / np.linalg.norm(vectors[:, :3], axis=1)[:, None], atol=1e-6)
    assert not cut(np.zeros((1, 4), np.float32), 2).any()


def test_the_mean_leaves_padding_out(whole):
    """In NumPy alone, of numbers that are easy to add."""
    head = opened(whole).config.sentence
    weights = {"2_Dense.linear.weight": np.eye(320, 64), "3_Dense.linear.weight": 2 * np.eye(160, 320)}
    hidden = np.zeros((1, 3, 64))
    hidden[0, :, 0], hidden[0, 2, 1] = (1, 3, 100), 100
    found = pooled(hidden, np.array([[1, 1, 0]]), head, weights=weights)
    np.testing.assert_array_equal(found[0], np.eye(1, 160)[0])
