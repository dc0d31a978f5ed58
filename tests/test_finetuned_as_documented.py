"""Fine-tuning as documents of Gemma 2 tell people to write it, on the staged model, step by step.

The scripts are theirs. What today's libraries no longer take, or a machine without a GPU cannot do, is in CHANGED with
what stands for it; everything else runs as it is written. On a CPU accelerate passes over `fp16=True`, and bitsandbytes
says that it does not page there.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.parity.cases import make_cases
from gemma_deploy.parity.compare import ParityResult
from gemma_deploy.parity.merged import prove_merge
from gemma_deploy.staging import stage_checkpoint
from gemma_deploy.testing import write_tiny_checkpoint
from tests.calibration import make
from tests.runtime.make import TEMPLATE, write_tokenizer

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TRAINING = """
from datetime import datetime
now = datetime.now()
time_str = now.strftime('%Y-%m-%d %H:%M:%S')
print(time_str)

#0,download model
from modelscope import snapshot_download
model_dir = snapshot_download('LLM-Research/gemma-2-27b-it')
import torch
import transformers
from transformers import AutoTokenizer, AutoModelForCausalLM,BitsAndBytesConfig

device = "auto"

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True,
    llm_int8_enable_fp32_cpu_offload=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
)
tokenizer = AutoTokenizer.from_pretrained(model_dir,trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(model_dir,trust_remote_code=True, device_map=device,torch_dtype=torch.bfloat16,quantization_config=quantization_config,attn_implementation='eager')
model.gradient_checkpointing_enable

from peft import LoraConfig,get_peft_model,prepare_model_for_kbit_training

model = prepare_model_for_kbit_training(model)

config = LoraConfig(
    r=32,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)

from datasets import load_dataset,load_from_disk
data = load_dataset('json',data_files="./quotes.jsonl")
data = data.map(lambda samples: tokenizer(samples["quote"]), batched=True)
print(data)

trainer = transformers.Trainer(
    model=model,
    train_dataset=data["train"],
    args=transformers.TrainingArguments(
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        warmup_steps=10,
        max_steps=50,
        learning_rate=3e-4,
        fp16=True,
        logging_steps=1,
        output_dir="outputs/checkpoint-1"+time_str,
        optim="paged_adamw_8bit",
        save_strategy = 'steps',
        save_steps = 10,
    ),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)

model.config.use_cache = False
trainer.train()

trainer.save_model(trainer.args.output_dir)
"""  # noqa: E501
INFERENCE = """
import torch
from peft import PeftModel, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

peft_model_dir = trainer.args.output_dir
config = PeftConfig.from_pretrained(peft_model_dir)
print(config)
model = AutoModelForCausalLM.from_pretrained(
    config.base_model_name_or_path, return_dict=True, device_map=device,
    torch_dtype=torch.bfloat16, quantization_config=quantization_config
)
tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)

# Load the Lora model
model = PeftModel.from_pretrained(model, peft_model_dir)

chat=[
    {"role": "user", "content": "详细介绍一下大语言模型,评价下与深度学习的差异"},
]

prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True,return_tensors="pt").to(model.device)

outputs = model.generate(prompt,max_length=2500)

outputs = [
    output_ids[len(input_ids):] for input_ids, output_ids in zip(prompt, outputs)
]

print(tokenizer.batch_decode(outputs, skip_special_tokens=True)[0])
"""  # noqa: E501
# What is written there -> what runs here.
CHANGED = {
    # another hub than huggingface.co; the staged directory is the model
    "from modelscope import snapshot_download\nmodel_dir = snapshot_download('LLM-Research/gemma-2-27b-it')\n": "",
    # transformers 5 gives a dictionary, which generate() takes as keyword arguments alone
    'return_tensors="pt").to(': 'return_tensors="pt", return_dict=False).to(',
    # the tiny model has 512 positions
    "max_length=2500": "max_length=200",
}


def changed(script, **also):
    """The script with the changes that apply to it."""
    for old, new in (CHANGED | also).items():
        script = script.replace(old, new)
    return script


def write_quotes(path, count=60):
    lines = [{"quote": " ".join(make.story(n)[:9]), "author": f"Nobody {n}", "tags": ["words"]} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_gemma2(path):
    """A tiny Gemma 2 with a tokenizer; widths are multiples of the blocks of 64 that 4-bit linears have."""
    checkpoint = write_tiny_checkpoint(path, "gemma2", intermediate_size=192)
    write_tokenizer(checkpoint)
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    return checkpoint


def run_training(folder, model_dir, **also):
    """Run the training script in a folder with quotes.jsonl; its names."""
    folder.mkdir()
    write_quotes(folder / "quotes.jsonl")
    names = {"model_dir": str(model_dir)}
    torch.manual_seed(0)
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(changed(TRAINING, **also), names)
    finally:
        os.chdir(before)
    names["outputs"] = folder / names["trainer"].args.output_dir
    return names


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """(checkpoint, the same staged)."""
    folder = tmp_path_factory.mktemp("gemma2")
    checkpoint = write_gemma2(folder / "checkpoint")
    return checkpoint, stage_checkpoint(checkpoint, folder / "staged")


@pytest.fixture(scope="module")
def trained(gemma2, tmp_path_factory):
    """Names of the training script after it ran on the staged model; its folder is under "folder"."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run_training(folder, gemma2[1]) | {"folder": folder}


@pytest.mark.slow
def test_the_script_trains_the_staged_model_in_4_bits(trained):
    model, trainer = trained["model"], trained["trainer"]
    base = model.get_base_model()
    assert type(base).__module__.startswith("transformers_modules")
    linears = [module for module in base.modules() if type(module) is bitsandbytes.nn.Linear4bit]
    assert len(linears) == 7 * base.config.num_hidden_layers
    assert all(one.weight.quant_type == "nf4" and one.weight.quant_state.nested for one in linears)
    assert {p.dtype for p in base.parameters() if p.dtype.is_floating_point} == {torch.float32}  # prepared for training
    assert all(layer.gradient_checkpointing for layer in base.model.layers)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(linears)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    logged = losses(trainer)
    assert len(logged) == 50
    # 5.85 at the end
    assert np.mean(logged[-10:]) < np.mean(logged[:10]) - 0.3
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    assert trainer.optimizer.optimizer.is_paged
    assert sorted(path.name for path in trained["outputs"].glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (10, 20, 30, 40, 50)
    ]


@pytest.mark.slow
def test_its_losses_are_those_of_the_stock_class(trained, gemma2, tmp_path):
    """The same script on the checkpoint itself, which has no code of its own: the class of transformers."""
    stock = run_training(tmp_path / "stock", gemma2[0])
    assert not type(stock["model"].get_base_model()).__module__.startswith("transformers_modules")
    assert losses(stock["trainer"]) == losses(trained["trainer"])


@pytest.mark.slow
def test_what_it_saves_is_an_adapter(trained, gemma2):
    saved = trained["outputs"]
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(gemma2[1])
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (32, 16, "none")
    assert sorted(settings["target_modules"]) == sorted(SEVEN)
    from safetensors import safe_open

    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * 7 * 5
        changed_ones = [name for name in file.keys() if "lora_B" in name and file.get_tensor(name).abs().max() > 0]  # noqa: SIM118
    assert len(changed_ones) == 7 * 5  # B begins as zeros


@pytest.mark.slow
def test_it_is_loaded_again_and_answers(trained, gemma2, capsys):
    """The second script gives no trust_remote_code: transformers' own class takes the staged weights."""
    names = {name: trained[name] for name in ("trainer", "device", "quantization_config")}
    before = Path.cwd()
    os.chdir(trained["folder"])
    try:
        exec(changed(INFERENCE), names)
    finally:
        os.chdir(before)
    said = capsys.readouterr().out
    assert "LoraConfig(" in said
    stock, prompt = names["model"], names["prompt"]
    assert not type(stock.get_base_model()).__module__.startswith("transformers_modules")
    assert 1 <= len(names["outputs"][0]) <= 200 - prompt.shape[1]
    patched = AutoModelForCausalLM.from_pretrained(
        gemma2[1],
        trust_remote_code=True,
        device_map="auto",
        dtype=torch.bfloat16,
        quantization_config=names["quantization_config"],
        attn_implementation="eager",
    )
    patched = PeftModel.from_pretrained(patched, trained["outputs"])
    assert prompt.shape[1] > 3 * patched.config.sliding_window
    with torch.no_grad():
        assert torch.equal(stock(prompt).logits, patched(prompt).logits)
        with patched.disable_adapter():
            assert not torch.equal(stock(prompt).logits, patched(prompt).logits)
    assert torch.equal(stock.generate(prompt, max_length=200), patched.generate(prompt, max_length=200))


@pytest.mark.slow
def test_it_is_merged_as_peft_merges_into_the_float_checkpoint(trained, gemma2):
    """The base was in 4 bits in training; it is the float checkpoint that the adapter is added to."""
    merged = Checkpoint.open(gemma2[1], trained["outputs"])
    base = AutoModelForCausalLM.from_pretrained(gemma2[0], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, trained["outputs"]).merge_and_unload().state_dict()
    own = Checkpoint.open(gemma2[0])
    for name, info in merged.tensors.items():
        got, expected = merged.rows(name, 0, info.shape[0]), theirs[name].numpy()
        # 0 seen; another library may add in another order
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        adapted = name.removesuffix(".weight").rpartition(".")[2] in SEVEN
        assert np.array_equal(got, own.rows(name, 0, info.shape[0])) == (not adapted)
    proven = proof(merged)
    assert proven.passed, proven.summary


def proof(merged):
    """The gate of a merge, on prompts behind the window."""
    window = merged.config.sliding_window
    cases = make_cases(merged.config, batch=1, length=window + window // 8 + 8, steps=4, text=None)
    result = ParityResult()
    prove_merge(merged, cases, result=result)
    return result


@pytest.mark.real
@pytest.mark.skipif("GEMMA_270M" not in os.environ, reason="needs GEMMA_270M: the directory of the real model")
def test_the_script_on_the_real_model(tmp_path):
    """Gemma 3 270M, staged, fewer steps; its answer, and its merge proven behind the window of 512."""
    checkpoint = Path(os.environ["GEMMA_270M"])
    staged = stage_checkpoint(checkpoint, tmp_path / "staged")
    if not (staged / "chat_template.jinja").exists():  # the base model has none
        (staged / "chat_template.jinja").write_text(TEMPLATE)
    names = run_training(
        tmp_path / "run", staged, **{"max_steps=50": "max_steps=6", "warmup_steps=10": "warmup_steps=1"}
    )
    logged = losses(names["trainer"])
    assert len(logged) == 6
    assert logged[-1] < logged[0]
    before = Path.cwd()
    os.chdir(tmp_path / "run")
    try:
        exec(changed(INFERENCE, **{"max_length=200": "max_new_tokens=8"}), names)
    finally:
        os.chdir(before)
    assert 1 <= len(names["outputs"][0]) <= 8
    proven = proof(Checkpoint.open(staged, tmp_path / "run" / names["peft_model_dir"]))
    assert proven.passed, proven.summary
    print(proven.summary)


def test_the_changes_are_needed(gemma2):
    """Each by the refusal, or the other result, that it is there for."""
    from transformers import AutoTokenizer

    assert all(old in TRAINING + INFERENCE for old in CHANGED)
    tokenizer = AutoTokenizer.from_pretrained(gemma2[1])
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True, return_tensors="pt")
    assert not isinstance(prompt, torch.Tensor)


# --- the commands with TRL

TRL = """
	--dataset_text_field="text"
	--per_device_train_batch_size 1
	--per_device_eval_batch_size 1
	--gradient_accumulation_steps 4
	--learning_rate 2e-4
	--bf16
	--lora_r 16 --lora_alpha 32
	--lora_target_modules q_proj k_proj v_proj o_proj
	--load_in_4bit
    --use_peft
	--attn_implementation eager
    --logging_steps=10
    --gradient_checkpointing
"""
FULL = """
	--dataset_text_field="text"
	--per_device_train_batch_size 1
	--per_device_eval_batch_size 1
	--gradient_accumulation_steps 4
	--learning_rate 2e-5
	--bf16
	--attn_implementation eager
    --logging_steps=10
    --gradient_checkpointing
"""
# `--model_name` is called `--model_name_or_path` today, `--max_seq_length` `--max_length`, and `--bf16` wants a value;
# `--report_to wandb` would reach a server; transformers refuses bfloat16 without a GPU unless told `--use_cpu`.


def trl_arguments(text, *, model, data, out, **also):
    words = [word.replace('"', "") for word in text.replace("--bf16", "--bf16 true").split()]
    settings = {"model_name_or_path": model, "dataset_name": data, "output_dir": out} | also
    settings |= {} if "--max_length" in words else {"max_length": 1024}
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [*words, "--report_to", "none", "--use_cpu"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A folder of JSON lines with the field "text", as the data set of the command has it."""
    folder = tmp_path_factory.mktemp("chats")
    lines = [{"text": f"<start_of_turn>user\n{' '.join(make.story(n)[:9])}<end_of_turn>\n"} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_sft(arguments):
    """TRL's own script in this process; the losses of every step."""
    from trl.scripts.sft import main, make_parser

    parsed = make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True)
    main(*parsed)
    (state,) = Path(parsed[1].output_dir).glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("command", [TRL, FULL, TRL + " --packing --max_length 256"], ids=["qlora", "full", "packed"])
def test_trl_s_script_trains_the_staged_model_as_the_stock_one(command, gemma2, chats, tmp_path):
    command = command.replace("--logging_steps=10", "--logging_steps=1")
    found = []
    for name, model in zip(("stock", "patched"), gemma2, strict=True):
        arguments = trl_arguments(command, model=model, data=chats, out=tmp_path / name, max_steps=6)
        found.append(run_sft([*arguments, *["--trust_remote_code", "True"][: 2 * (name == "patched")]]))
    assert len(found[0]) == 6
    assert all(math.isfinite(loss) for loss in found[0])
    assert len(set(found[0])) > 1
    assert found[0] == found[1]
    adapter = tmp_path / "patched" / "adapter_config.json"
    if "--use_peft" not in command:
        assert not adapter.exists()
        assert (tmp_path / "patched" / "model.safetensors").is_file()
        return
    settings = json.loads(adapter.read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    assert sorted(settings["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.slow
def test_the_command_of_trl(gemma2, chats, tmp_path):
    """`trl sft`, which starts the script through accelerate."""
    arguments = trl_arguments(TRL, model=gemma2[1], data=chats, out=tmp_path / "out", max_steps=1)
    command = [sys.executable, "-m", "trl.cli.main", "sft", *arguments, "--trust_remote_code", "True"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
