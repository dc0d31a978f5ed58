#!/usr/bin/env bash
# transformers' multi-token candidate generator hands a drafter the key of a guess that was wrong.
#
# version   transformers 5.23.0, torch 2.13.0, numpy 2.4.6.
# expected  SinglePositionMultiTokenCandidateGenerator gives the drafter the keys and values of the text so far. Of N
#           tokens the model has read N - 1: the newest comes from its last logits. After a step of which some guesses
#           were wrong there are N - 1 keys of the text too, with those of wrong guesses behind them.
# seen      Keys are cut to N, not to N - 1. Where all guesses were right there are N - 1 of them; where one was wrong
#           the drafter also attends to the first wrong guess, at the position of the newest token, and is told (N - 1)
#           the same position for its own query. Text is unchanged, guesses are worse.
#
# Output:
#   text of 10 tokens, all 3 guesses right: 9 keys
#   text of 8 tokens, 1 of 3 guesses right: 8 keys, the last of them of the wrong guess
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6

cd "$work"
HOME="$work" OMP_NUM_THREADS=1 "$work/venv/bin/python" - <<'PYTHON'
import os
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

seen = []


class Gemma4AssistantStub(nn.Module):
    """Notes the keys that it is given; the generator asks for no more than the name."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(num_assistant_tokens=1)

    def forward(self, inputs_embeds, shared_kv_states, **_):
        seen.append(shared_kv_states["full_attention"][0][0, 0, :, 0].tolist())
        return SimpleNamespace(logits=torch.zeros(1, 1, 16), last_hidden_state=torch.zeros(1, 1, 4))


def keys_given(text, read, right):
    """Of a text; `read` tokens were read, those of wrong guesses at the end; a key is the number of its token."""
    generator = SinglePositionMultiTokenCandidateGenerator(
        Gemma4AssistantStub(), nn.Embedding(16, 4), GenerationConfig(max_length=64)
    )
    generator.is_main_model_prefill = False
    keys = torch.tensor(read, dtype=torch.float32)[None, None, :, None]
    outputs = SimpleNamespace(
        hidden_states=[torch.zeros(1, 4, 4)], shared_kv_states={"full_attention": (keys, keys)}
    )
    generator.get_candidates(torch.tensor([text]), {}, outputs, is_first_iteration=False, n_last_matches=right)
    return seen[-1]


start = [2, 3, 4, 5, 6, 7]  # the last was not read before the step
all_right = keys_given([*start, 8, 9, 10, 11], [*start, 8, 9, 10], 3)
one_right = keys_given([*start, 8, 12], [*start, 8, 9, 10], 1)
wrong = "the last of them of the wrong guess" if one_right[-1] == 9 else "all of the text"
print(f"text of 10 tokens, all 3 guesses right: {len(all_right)} keys")
print(f"text of 8 tokens, 1 of 3 guesses right: {len(one_right)} keys, {wrong}")
if len(all_right) != 9 or one_right[-1] != 9:
    sys.exit("CHANGED: other keys are given")
PYTHON
