"""An -it checkpoint of every generation, used like any transformers model: pipeline, chat template, stop tokens."""

import json

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.job import Job
from gemma_deploy.recipe import Recipe
from gemma_deploy.runtime import Tokenizer
from gemma_deploy.runtime.generate import stop_token_ids
from gemma_deploy.stages.files import write_model_files
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint
from tests.manifests import manifest
from tests.runtime.make import SPECIAL, write_tokenizer

MESSAGES = [
    {"role": "user", "content": "the list"},
    {"role": "assistant", "content": "model"},
    {"role": "user", "content": " user "},
]
# https://ai.google.dev/gemma/docs/formatting; the template in write_tokenizer takes the same steps as Google's
SPELLED = (
    "<bos><start_of_turn>user\nthe list<end_of_turn>\n<start_of_turn>model\nmodel<end_of_turn>\n"
    "<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\n"
)
END_OF_TURN = SPECIAL.index("<end_of_turn>")


@pytest.fixture(scope="module")
def tuned(model_type, tmp_path_factory):
    """Checkpoint with tokenizer and two stop tokens, as -it checkpoints have them."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tuned") / model_type, model_type, seed=3)
    write_tokenizer(folder)
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 2, "eos_token_id": [1, END_OF_TURN], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def staged_tuned(tuned):
    return stage_checkpoint(tuned, tuned.with_name(f"{tuned.name}-staged"))


def recipe_of(checkpoint):
    return Recipe.from_text(
        f"name: tuned\nfrontend: {{checkpoint: '{checkpoint}', shape: {{input_ids: [[32], [64]]}}}}\n"
        "backend: {dtype: fp32}\n"
    )


def test_the_turns_are_spelled_as_google_does(staged_tuned, tuned, tmp_path):
    theirs = AutoTokenizer.from_pretrained(staged_tuned)
    assert theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) == SPELLED
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    write_model_files(Job.open(recipe_of(tuned)), tmp_path)
    ours = Tokenizer(tmp_path)
    assert ours.encode_chat(MESSAGES) == list(ids)
    assert list(ids).count(2) == 1


def test_the_artifact_and_the_staged_model_keep_every_stop_token(staged_tuned, tuned, tmp_path):
    assert Checkpoint.open(tuned).config.eos_token_ids == (1, END_OF_TURN)
    write_model_files(Job.open(recipe_of(tuned)), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, END_OF_TURN]
    assert stop_token_ids(manifest(model=Checkpoint.open(tuned).config.to_dict())) == (1, END_OF_TURN)
    assert json.loads((staged_tuned / "generation_config.json").read_text())["eos_token_id"] == [1, END_OF_TURN]


def test_a_pipeline_takes_messages_and_stops_at_the_second_stop_token(staged_tuned):
    pipe = pipeline("text-generation", model=str(staged_tuned), trust_remote_code=True, dtype=torch.float32)
    assert type(pipe.model).__module__.startswith("transformers_modules")
    assert pipe.model.generation_config.eos_token_id == [1, END_OF_TURN]
    turn = pipe(MESSAGES, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert turn[:-1] == MESSAGES
    assert turn[-1]["role"] == "assistant"
    ids = torch.tensor([pipe.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)])
    free = pipe.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[1])[0, ids.shape[1] :].tolist()
    stop = free[3]
    stopped = pipe.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[1, stop])
    assert stopped[0, ids.shape[1] :].tolist() == free[: free.index(stop) + 1]
    assert len(free) == 12 > free.index(stop) + 1
