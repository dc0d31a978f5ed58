#!/usr/bin/env python3
"""Train the bundled demo checkpoint, `frontend.checkpoint: demo`: a Gemma 1 of 1.6 million parameters.

    nice -n 10 python scripts/train_demo.py --out gemma_deploy/demo

Text: docstrings, comments and reference topics of the Python standard library of the interpreter that runs this
(PSF licence), so nothing is downloaded. About 12 minutes on two cores. Same interpreter, torch build, processor and
number of threads: same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from demo_data import BOS, CHAT_TEMPLATE, END_OF_TURN, EOS, PAD, collect, train_tokenizer, write_tokenizer
from transformers import GemmaConfig, GemmaForCausalLM

BLOCK = 256  # tokens per training sequence
BATCH = 8
HELD_OUT_BYTES = 24_000
README = """# The demo checkpoint

A Gemma 1 ({parameters:,} parameters: hidden size {hidden}, {layers} layers, {heads} heads of {head_dim}, one key/value
head, tied table, {vocab} tokens) that stands in for a real checkpoint wherever one is not at hand. It writes text that
looks like Python documentation. It knows nothing; do not rely on what it says.

- Text: docstrings, block comments and reference topics (`pydoc_data`) of the standard library of Python {python}:
  {documents:,} documents, {tokens:,} tokens. Copyright Python Software Foundation, PSF License Version 2
  (`LICENSE-PSF.txt`); text that speaks of another copyright or licence is left out.
- Command: `nice -n 10 python scripts/train_demo.py --out gemma_deploy/demo` (seed {seed}, {steps} steps of {batch} x
  {block} tokens, {threads} threads, {minutes:.0f} minutes on a shared two-core machine, torch {torch}).
- It saw sequences of {block} tokens; beyond that its text gets worse, though positions up to {positions} are allowed.
- `heldout.txt`: the first part of the held-out text, for tests and comparisons. No training document is in it.
- One in {chat_share} training documents is a conversation in Gemma's own form ("What does shlex.split do?"), so that
  `<end_of_turn>` means something.

Held-out part ({held_tokens:,} tokens), measured on the bfloat16 weights that are stored:

| model | loss (nats per token) | perplexity |
| --- | --- | --- |
| this one | {loss:.3f} | {ppl:.1f} |
| token frequencies of the training text | {unigram:.3f} | {unigram_ppl:.0f} |
| the same model untrained | {untrained:.3f} | {untrained_ppl:.0f} |
"""


def main() -> None:
    """Collect, train, write, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write, made if missing")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)

    licence = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    train_texts, held_texts, chats = collect()
    tokenizer = train_tokenizer(train_texts)
    write_tokenizer(tokenizer, args.out)
    documents = [*train_texts, *chats]
    encoded = [encode(tokenizer, text) for text in documents]
    held = torch.cat([encode(tokenizer, text) for text in held_texts])
    counts = torch.bincount(torch.cat(encoded), minlength=tokenizer.get_vocab_size())
    model = GemmaForCausalLM(config(tokenizer.get_vocab_size()))
    spread_initial_weights(model)
    untrained = loss_on(model, held)
    unigram = -((counts[held] + 1).log() - (counts + 1).sum().log()).mean().item()
    print(f"{len(documents)} documents, {int(counts.sum())} tokens; held out {len(held)}; ", end="")
    print(f"untrained {untrained:.3f}, token frequencies {unigram:.3f}", flush=True)

    seconds = train(model, encoded, held, steps=args.steps, seed=args.seed)
    model.to(torch.bfloat16)
    save(model, args.out)
    (args.out / "heldout.txt").write_text("\n\n".join(held_texts)[:HELD_OUT_BYTES], encoding="utf-8")
    (args.out / "LICENSE-PSF.txt").write_text(licence, encoding="utf-8")
    loss = loss_on(model.float(), held)
    c = model.config
    text = README.format(
        parameters=model.num_parameters(), hidden=c.hidden_size, layers=c.num_hidden_layers,
        heads=c.num_attention_heads, head_dim=c.head_dim, vocab=c.vocab_size, python=platform.python_version(),
        documents=len(documents), tokens=int(counts.sum()), seed=args.seed, steps=args.steps, batch=BATCH, block=BLOCK,
        threads=args.threads, minutes=seconds / 60, torch=torch.__version__, positions=c.max_position_embeddings,
        chat_share=round(len(documents) / len(chats)), held_tokens=len(held), loss=loss, ppl=math.exp(loss),
        unigram=unigram, unigram_ppl=math.exp(unigram), untrained=untrained, untrained_ppl=math.exp(untrained),
    )  # fmt: skip
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}")
    sample(model, tokenizer)


def config(vocab_size: int) -> GemmaConfig:
    """Gemma 1 in small: multi-query attention, heads x head_dim (256) unlike the hidden size."""
    return GemmaConfig(
        architectures=["GemmaForCausalLM"], vocab_size=vocab_size, hidden_size=128, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, head_dim=64, max_position_embeddings=2048,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, tie_word_embeddings=True, use_cache=True,
        hidden_activation="gelu_pytorch_tanh", hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip


def spread_initial_weights(model: GemmaForCausalLM) -> None:
    """Scale the table so that the tied head starts near even odds, and what writes to the residual stream by depth."""
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.5 / math.sqrt(model.config.hidden_size))
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * model.config.num_hidden_layers))


def encode(tokenizer, text: str) -> torch.Tensor:
    """One document as tokens [length], from <bos> to <eos>."""
    return torch.tensor([BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS])


def train(
    model: GemmaForCausalLM, documents: list[torch.Tensor], held: torch.Tensor, *, steps: int, seed: int
) -> float:
    """Muon on the layers' matrices, AdamW on the table and the norms; warm-up, flat, then down to nothing."""
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    blocks = batches(documents, torch.Generator().manual_seed(seed))
    began = time.monotonic()
    running = 0.0
    for step in range(steps):
        scale = min(1.0, (step + 1) / 40, (steps - step) / (0.6 * steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        tokens = next(blocks)
        loss = cross_entropy(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 50 == 0:
            rate = (step + 1) * BATCH * BLOCK / (time.monotonic() - began)
            tail = f", held out {loss_on(model, held[: 64 * BLOCK]):.3f}" if (step + 1) % 250 == 0 else ""
            print(f"step {step + 1}: loss {running / 50:.3f}, {rate:.0f} tokens/s{tail}", flush=True)
            running = 0.0
    return time.monotonic() - began


def batches(documents: list[torch.Tensor], generator: torch.Generator):
    """Endless [BATCH, BLOCK + 1], the documents in a new order each time; every row begins with <bos>, as at use."""
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        shift = int(torch.randint(BLOCK, (1,), generator=generator))
        rows = stream[shift:].unfold(0, BLOCK + 1, BLOCK).clone()
        rows[:, 0] = BOS
        yield from rows[torch.randperm(len(rows), generator=generator)].split(BATCH)[:-1]


def cross_entropy(model: GemmaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats of tokens [rows, length], each predicted from those before it."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def loss_on(model: GemmaForCausalLM, stream: torch.Tensor) -> float:
    """Mean loss over whole blocks of a stream of tokens."""
    was_training = model.training
    model.eval()
    rows = stream.unfold(0, BLOCK + 1, BLOCK).clone()
    rows[:, 0] = BOS
    with torch.no_grad():
        losses = [cross_entropy(model, part).item() * len(part) for part in rows.split(BATCH)]
    model.train(was_training)
    return sum(losses) / len(rows)


def save(model: GemmaForCausalLM, out: Path) -> None:
    """config.json, generation_config.json and model.safetensors, and the chat template beside them."""
    model.generation_config.eos_token_id = [EOS, END_OF_TURN]
    model.save_pretrained(out)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((out / name).read_text(encoding="utf-8"))
        raw.pop("_from_model_config", None)
        (out / name).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def sample(model: GemmaForCausalLM, tokenizer) -> None:
    """Greedy text to look at."""
    model.eval()
    for prompt in ("Return the", "This module", "Raises an exception", "The", "A class which"):
        ids = torch.tensor([encode(tokenizer, prompt).tolist()[:-1]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        print(f"{prompt!r} -> {tokenizer.decode(out[0].tolist())!r}")


if __name__ == "__main__":
    main()
