"""LoRA and QLoRA of a 2B shape on a GPU: losses beside those of a CPU, tokens a second, peak memory.

    python benchmarks/gpu/finetune.py [--device cuda] [--methods lora,qlora] [--model-class patched]
    python benchmarks/gpu/finetune.py --device cpu --tiny        # does the script itself run?

Prepared for a GPU and not run on one yet: no figure of it is in the documents. It needs nothing from outside: the model
(Gemma 2 2B's shape, normal(0, 0.02)) and the tokens are random, from fixed seeds. The model takes 5 GB of disk under
--work and 12 GB of memory for the CPU's steps, which take minutes; on the device some 30 GB by estimate, most of them
for logits (4 GB in float32 for 4 x 1024 tokens, several times over).

First a few steps of one short window in float32 run on the CPU and on the device from the same first values, with the
same windows; their losses are compared. Then steps of full batches run on the device, LoRA in bfloat16, QLoRA on nf4
weights with bfloat16 products, gradient checkpointing on, and are timed.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

SHAPE = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
TINY = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_model(folder: Path, tiny: bool) -> Path:
    """A random Gemma 2 in bfloat16, and beside it the same with the patched classes."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    from gemma_deploy.staging import stage_checkpoint

    if not (folder / "stock").exists():
        torch.manual_seed(0)
        config = Gemma2Config(**(TINY if tiny else SHAPE))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "making")
        (folder / "making").rename(folder / "stock")
    if not (folder / "patched").exists():
        stage_checkpoint(folder / "stock", folder / "patched")
    return folder


def adapted(path: Path, method: str, device: str, dtype: Any) -> Any:
    """The model with an adapter whose first values do not depend on the device."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how: dict[str, Any] = {}
    if method == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=path.name == "patched",
        attn_implementation="eager",  # the soft caps
        dtype=dtype,
        device_map={"": device},
        **how,
    )
    model.config.use_cache = False
    if method == "qlora":
        model = prepare_model_for_kbit_training(model)
    else:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=SEVEN, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                parameter.copy_(values.to(parameter))
    return model.train()


def steps(model: Any, device: str, *, count: int, batch: int, length: int, autocast: bool) -> tuple[list[float], float]:
    """Losses of so many steps of AdamW on random tokens, and the seconds of those after the first two."""
    import torch

    generator = torch.Generator().manual_seed(2)
    vocab = model.config.vocab_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    windows = torch.randint(3, vocab, (4, batch, length), generator=generator).to(device)  # four, again and again
    losses, started = [], 0.0
    for step in range(count):
        if step == min(2, count - 1):
            if device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
        ids = windows[step % len(windows)]
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    found = [float(loss) for loss in losses]  # waits for the device
    return found, time.perf_counter() - started


@click.command()
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--tiny", is_flag=True, help="A model of three small layers.")
@click.option("--methods", default="lora,qlora", show_default=True)
@click.option("--model-class", default="patched", show_default=True, type=click.Choice(["patched", "stock"]))
@click.option("--steps", "count", default=20, show_default=True, help="Timed steps; the first two are not counted.")
@click.option("--compared", default=3, show_default=True, help="Steps whose losses are compared with a CPU's.")
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=1024, show_default=True, help="Tokens of a window.")
@click.option("--work", type=click.Path(path_type=Path), help="Where the random model is kept; a temporary folder.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the figures there as well.")
def main(
    device: str,
    tiny: bool,
    methods: str,
    model_class: str,
    count: int,
    compared: int,
    batch: int,
    length: int,
    work: Path | None,
    file: Path | None,
) -> None:
    """Compare and time."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("no GPU that torch sees; --device cpu --tiny shows that the script runs")
    if tiny:
        batch, length = min(batch, 2), min(length, 32)
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = write_model(folder, tiny) / model_class
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        click.echo(f"{where}, torch {torch.__version__}, {model_class} class, {batch} x {length} tokens a step")
        for method in methods.split(","):
            losses = {}
            for place in dict.fromkeys(("cpu", device)):
                model = adapted(path, method, place, torch.float32)
                losses[place], _ = steps(model, place, count=compared, batch=1, length=min(128, length), autocast=False)
                del model
            apart = max(abs(a - b) / abs(b) for a, b in zip(losses[device], losses["cpu"], strict=True))
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            model = adapted(path, method, device, torch.bfloat16)
            made, seconds = steps(model, device, count=count, batch=batch, length=length, autocast=True)
            del model
            timed = max(1, count - 2) * batch * length
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            click.echo(
                f"{method:6} losses {', '.join(f'{loss:.5f}' for loss in losses[device])}; relative to the CPU's "
                f"{apart:.1e}  {timed / seconds:.0f} tokens/s"
                + (f", peak {peak:.1f} GiB" if peak is not None else "")
                + f"  loss {made[0]:.3f} -> {made[-1]:.3f}"
            )
            figures.append(
                {
                    "method": method,
                    "device": where,
                    "losses": losses,
                    "relative_difference": apart,
                    "tokens_per_s": timed / seconds,
                    "peak_gib": peak,
                    "trained_losses": made,
                }
            )
    if file is not None:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
