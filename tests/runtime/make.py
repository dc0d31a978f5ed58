"""A small tokenizer built like Gemma's (byte fallback, ▁ for spaces)."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
WORDS = ("▁the", "▁list", "user", "model", "\n")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if message['role'] == 'system' %}\n{{ raise_exception('no system turn') }}{% endif %}\n"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n<start_of_turn>model\n{% endif %}\n"
)


def write_tokenizer(directory: Path, *, template: str | None = TEMPLATE, more: tuple[str, ...] = ()) -> Path:
    """Write tokenizer.json, tokenizer_config.json and (if any) the chat template; `more`: special tokens besides."""
    letters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    pieces = [*SPECIAL, *more, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1 : end]))
            pieces.append(word[:end])
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *WORDS]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *more)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "tokenizer_class": "GemmaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def compile_tiny(
    root: Path,
    model_type: str,
    backend: dict,
    *,
    template: str | None = TEMPLATE,
    more: tuple[str, ...] = (),
    recipe: dict | None = None,
    **changes,
) -> Path:
    """A tiny checkpoint with a tokenizer, compiled without its gate: ROOT/checkpoint, ROOT/workspace/tiny.

    Args:
        more: special tokens; recipe: more sections of the recipe, and keys of `frontend`; changes: of the config.
    """
    from gemma_deploy.compile import compile_recipe  # needs torch
    from gemma_deploy.recipe import Recipe
    from gemma_deploy.testing import write_tiny_checkpoint

    checkpoint = write_tiny_checkpoint(root / "checkpoint", model_type, **changes)
    write_tokenizer(checkpoint, template=template, more=more)
    more = dict(recipe or {})
    sections = {
        "name": "tiny",
        "frontend": {
            "checkpoint": str(checkpoint),
            "shape": {"input_ids": [[64], [128]]},
            **more.pop("frontend", {}),
        },
        "backend": backend,
        "workspace": {"path": str(root / "workspace")},
        **more,
    }
    (root / "recipe.json").write_text(json.dumps(sections))  # JSON is YAML
    return compile_recipe(Recipe.load(root / "recipe.json"), parity=False).path
