"""The command and the recipe's section: what they take, and what they refuse in a sentence."""

import pytest

pytest.importorskip("trl")

from gemma_deploy.cli import main
from gemma_deploy.recipe import Recipe
from tests.finetune.make import QUICK, texts_file, tiny

RECIPE = """\
name: tuned
frontend: {{checkpoint: {checkpoint}, shape: {{input_ids: [[16], [32]]}}}}
backend: {{dtype: fp32}}
finetune:
  data: {data}
  out: {out}
  validation: 2
  lora: {{r: 2, alpha: 4}}
  sft: {{max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}}
"""


@pytest.fixture
def base(tmp_path):
    return tiny(tmp_path / "base", "gemma3_text")


def test_a_recipe_says_it_all_and_options_go_before_it(base, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(checkpoint=base, data=texts_file(tmp_path), out=tmp_path / "out"))
    assert main(["finetune", str(recipe), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 steps in" in said
    assert f"gemma-deploy compile {recipe} -s frontend.adapter={tmp_path / 'out' / 'adapter'}" in said


def test_the_section_changes_no_record_of_a_recipe_without_it(base, tmp_path):
    text = RECIPE.format(checkpoint=base, data="x", out="y")
    assert "finetune" not in Recipe.from_text(text.partition("finetune:")[0]).resolved()
    assert Recipe.from_text(text).resolved()["finetune"]["lora"]["r"] == 2


def test_wrong_keys_of_the_section_are_told_with_their_lines(base):
    from gemma_deploy.errors import RecipeError

    text = RECIPE.format(checkpoint=base, data="x", out="y") + "  max_lenght: 5\n  method: lorra\n"
    with pytest.raises(RecipeError) as raised:
        Recipe.from_text(text)
    assert "did you mean `finetune.max_length`" in str(raised.value)
    assert "did you mean `lora`" in str(raised.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing says data and out"),
        (["--data", "{data}"], "nothing says out"),
        (["--data", "{data}.no", "--out", "{out}"], "No such file"),
        (["--data", "{data}", "--out", "{out}", "--field", "quote"], "has no 'quote'"),
        (["--data", "{data}", "--out", "{out}", "--targets", "q_proj,x_proj"], "no linear of a layer is called x_proj"),
        (["--data", "{data}", "--out", "{out}", "--targets", " , "], "lora.targets"),
        (["--data", "{data}", "--out", "{out}", "--max-length", "9999"], "more than the model was made for"),
        (["--data", "{data}", "--out", "{out}", "--validation", "8"], "8 examples are to be held out, and there are 8"),
        (["--data", "{data}", "--out", "{out}", "--set", "max_step=1"], "did you mean max_steps"),
        (["--data", "{data}", "--out", "{out}", "--validation", "0", "--patience", "1"], "early stopping needs"),
        (["--data", "{data}", "--out", "{out}", "--alpha", "0"], "lora.alpha"),
        (["--data", "{data}", "--out", "{data}"], "exists already"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(base, tmp_path, capsys, words, said):
    names = {"data": str(texts_file(tmp_path)), "out": str(tmp_path / "out")}
    code = main(["finetune", "--checkpoint", str(base), *(word.format(**names) for word in words)])
    assert code == 2
    assert said in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "texts.jsonl"]


def test_dry_run_writes_nothing(base, tmp_path, capsys):
    words = ["--data", str(texts_file(tmp_path)), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(["finetune", "--checkpoint", str(base), *words]) == 0
    said = capsys.readouterr().out
    assert "data  8 examples" in said
    assert "nothing has been written" in said
    assert not (tmp_path / "out").exists()


def test_a_stop_token_of_the_base_stays_one(base, tmp_path):
    """Chat data end with <end_of_turn> and no <eos>: both end a reply of what is compiled with the adapter."""
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.finetune.run import finetune
    from gemma_deploy.text import Tokenizer, check_text
    from tests.finetune.make import CHATS, settings, write_lines

    file = write_lines(tmp_path / "chat.jsonl", [{"messages": turns} for turns in CHATS])
    result = finetune(settings(file, tmp_path / "out", lora={"r": 2}, sft=QUICK | {"max_steps": 1}), base)
    tokenizer = Tokenizer(result.adapter)
    end, eos = tokenizer.id_of("<end_of_turn>"), tokenizer.id_of("<eos>")
    assert {end, eos} <= set(check_text(Checkpoint.open(base)).stop_ids)
    from gemma_deploy.text import stop_tokens

    assert {end, eos} <= set(stop_tokens(tokenizer, (eos,)).ids)


def test_from_python(base, tmp_path):
    from gemma_deploy import fine_tune
    from gemma_deploy.errors import UsageError

    data, out = texts_file(tmp_path), tmp_path / "out"
    asked = {"validation": 2, "lora": {"r": 2}, "sft": QUICK | {"max_steps": 1}}
    planned = fine_tune(base, data, out, dry_run=True, **asked)
    assert planned.outcome is None
    assert planned.room.total > planned.room.result > 0
    assert not out.exists()
    with pytest.raises(UsageError) as raised:
        fine_tune(base, data, out, lorra={"r": 2}, method="lorra")
    assert [line.partition(":")[0] for line in raised.value.problems] == ["method", "lorra"]
    steps = []
    result = fine_tune(base, data, out, progress=lambda *told: steps.append(told), **asked)
    assert steps == [(1, 1)]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert result.adapter == out / "adapter"
    assert result.outcome.loss_after != result.outcome.loss_before
