"""Tokenizers in every form that files take, and chat templates in the manner of the real ones, for these tests."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy import paths

DEMO = paths.demo_checkpoint_dir()
TEXT = (
    "The list of all the values:  two spaces,\ta tab,\n\n\nlines, naïve €5, 日本語, 👩\u200d🚀, <mask>, <end_of_turn>, "
    "<start_of_turn>user\nx<unused7><image_soft_token> <extra> <|own|><pad>"
)
SETTINGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def copy_demo(directory: Path, *, weights: bool = False, **settings: Any) -> Path:
    """The bundled checkpoint with other settings of its tokenizer; a value of None takes the key out."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in DEMO.iterdir():
        if weights or file.suffix != ".safetensors":
            shutil.copyfile(file, directory / file.name)
    edit(directory / SETTINGS, settings)
    return directory


def edit(file: Path, changes: dict[str, Any]) -> None:
    """Change keys of a JSON file; a value of None takes the key out."""
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")


def token(content: str, number: int | None = None, **flags: bool) -> dict[str, Any]:
    """An added token as JSON files write it."""
    known = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    return ({} if number is None else {"id": number}) | {"content": content} | known | flags


def write_sentencepiece(path: Path, pieces: list[tuple[str, float, int]]) -> Path:
    """A SentencePiece model: field 1 of the message, repeated, is (text, score, kind)."""

    def field(number: int, kind: int, value: bytes) -> bytes:
        return varint(number << 3 | kind) + (varint(len(value)) if kind == 2 else b"") + value

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    data = b""
    for text, score, kind in pieces:
        data += field(
            1, 2, field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))
        )
    path.write_bytes(data + field(2, 2, field(3, 0, varint(2))))  # and the settings of its training: a BPE
    return path


def pieces_of_demo() -> list[tuple[str, float, int]]:
    """The bundled vocabulary as SentencePiece has it: kinds 2 unknown, 3 control, 4 the user's own, 6 byte."""
    vocabulary = json.loads((DEMO / TOKENIZER).read_text(encoding="utf-8"))["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    kinds = {"<unk>": 2, "<pad>": 3, "<eos>": 3, "<bos>": 3, "<mask>": 4, "<start_of_turn>": 3, "<end_of_turn>": 3}
    kinds |= {ordered[700]: 4, ordered[701]: 4}
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    return [(text, -float(number), kinds.get(text, 6 if text in bytes_ else 1)) for number, text in enumerate(ordered)]


def write_gguf(path: Path, architecture: str, *, metadata: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A file of one tiny layer with the bundled vocabulary, as llama.cpp's converter writes it.

    Args:
        metadata: further keys, after `tokenizer.`; None takes one out.
        changes: tokens, kinds, scores, merges, model in place of what is usual.
    """
    import gguf

    pieces = pieces_of_demo()
    # llama.cpp stores runs of spaces as spaces
    tokens = [" " * len(text) if len(text) > 1 and set(text) == {"▁"} else text for text, _, _ in pieces]
    values: dict[str, Any] = {
        "ggml.model": changes.get("model", "llama"),
        "ggml.tokens": changes.get("tokens", tokens),
        "ggml.scores": changes.get("scores", [score for _, score, _ in pieces]),
        "ggml.token_type": changes.get("kinds", [kind for _, _, kind in pieces]),
        "ggml.bos_token_id": 2,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 0,
        "ggml.unknown_token_id": 3,
        **({"ggml.merges": changes["merges"]} if "merges" in changes else {}),
        **(metadata or {}),
    }
    hidden, inner, head, size = 32, 64, 16, len(values["ggml.tokens"] or []) or 8
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(head)
    writer.add_sliding_window(16)
    for key, value in values.items():
        if value is not None:
            add = writer.add_uint32 if type(value) is int else None
            add = writer.add_bool if type(value) is bool else add
            add = writer.add_string if isinstance(value, str) else add
            (add or writer.add_array)(f"tokenizer.{key}", value)
    shapes = {
        "token_embd": (size, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_q": (2 * head, hidden),
        "blk.0.attn_k": (head, hidden),
        "blk.0.attn_v": (head, hidden),
        "blk.0.attn_output": (hidden, 2 * head),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
    }
    if architecture != "gemma":
        shapes |= {"blk.0.post_attention_norm": (hidden,), "blk.0.post_ffw_norm": (hidden,)}
    if architecture == "gemma3":
        shapes |= {"blk.0.attn_q_norm": (head,), "blk.0.attn_k_norm": (head,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Each takes the same steps as the template of the generation that it is named after, in words of our own.
GEMMA_1 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no place for a system message') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% if message['role'] == 'assistant' %}"
    "{% set who = 'model' %}{% else %}{% set who = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + who + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set told = messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] -%}
    {%- set before, rest = told + '

', messages[1:] -%}
{%- else -%}
    {%- set before, rest = '', messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("turns must alternate") }}
    {%- endif -%}
    {%- set who = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + who + '\n' + (before if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("content of no known kind") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
FUNCTIONS = """{%- macro quoted(text) -%}<escape>{{ text }}<escape>{%- endmacro -%}
{%- macro shown(value) -%}
    {%- if value is string -%}{{ quoted(value) }}
    {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key, one in value | dictsort -%}
            {{ key }}:{{ shown(one) }}{{ ',' if not loop.last }}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is sequence -%}[{%- for one in value -%}{{ shown(one) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set rest = messages -%}
{%- if tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{ '<start_of_turn>developer\n' }}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}
        {{ messages[0]['content'] | trim }}{% set rest = messages[1:] %}
    {%- endif -%}
    {%- for tool in tools or [] -%}
        <start_function_declaration>declaration:{{ tool['function']['name'] -}}
        {{ shown({'description': tool.function.description, 'parameters': tool.function.parameters}) -}}
        <end_function_declaration>
    {%- endfor -%}
    {{ '<end_of_turn>\n' }}
{%- endif -%}
{%- set ns = namespace(last=none) -%}
{%- for message in rest -%}
    {%- if message['role'] == 'tool' -%}
        <start_function_response>response:{{ message['name'] }}{{ shown(message['content']) }}<end_function_response>
    {%- else -%}
        {{ '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\n' }}
        {%- if message['content'] is defined -%}{{ message['content'] | trim }}{%- endif -%}
        {%- for call in message.get('tool_calls', []) -%}
            <start_function_call>call:{{ call['function']['name'] }}{{ shown(call['function']['arguments']) -}}
            <end_function_call>
        {%- endfor -%}
        {{ '<end_of_turn>\n' if not message.tool_calls }}
    {%- endif -%}
    {%- set ns.last = message['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last != 'tool' -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
GEMMA_4 = """{%- macro without_thoughts(text) -%}
    {%- set ns = namespace(said='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.said = ns.said + (part.split('<|channel>')[0] if '<|channel>' in part else part) -%}
    {%- endfor -%}
    {{- ns.said | trim -}}
{%- endmacro -%}
{%- set ns = namespace(before=None, index=-1) -%}
{{ bos_token }}
{%- if (enable_thinking is defined and enable_thinking) or tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}{{ messages[0]['content'] | trim }}{%- endif -%}
    {%- for tool in tools | default([], true) -%}{{ '<|tool>' ~ tool | tojson ~ '<tool|>' }}{%- endfor -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for i in range(messages | length) if messages[i]['role'] not in ['system', 'developer'] -%}
    {%- set message = messages[i] -%}
    {%- set who = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + who + '\n' -}}
    {%- if message.reasoning_content is defined and loop.last -%}
        {{- '<|channel>thought\n' + message['reasoning_content'] + '\n<channel|>' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- without_thoughts(message['content']) if who == 'model' else message['content'] | trim -}}
    {%- else -%}
        {{- message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -}}
    {%- endif -%}
    {{- '<turn|>\n' -}}
    {%- set ns.before = who -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
TRAINING = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
<start_of_turn>model
{% generation %}{{ message.content | trim }}<end_of_turn>
{% endgeneration %}
    {%- else %}
<start_of_turn>{{ message.role }}
{{ message.content | trim }}<end_of_turn>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}
"""
TEMPLATES = {
    "gemma 1": GEMMA_1,
    "gemma 3": GEMMA_3,
    "functions": FUNCTIONS,
    "gemma 4": GEMMA_4,
    "training": TRAINING,
    "bundled": (DEMO / "chat_template.jinja").read_text(encoding="utf-8"),
}
