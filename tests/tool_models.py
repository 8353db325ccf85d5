"""Chat templates with tools, as model families lay them out, and random models that call tools."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken
from transformers import Qwen3Config

from tests.models import save_random_model
from tests.unit.data.hf_folders import byte_level, write_folder

SHORT = (
    "{% if tools %}<|system|>Tools:{% for each in tools %} {{ each.function.name }}{% endfor %}"
    "<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Of a sentencepiece model; it names the tools."""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or m.content %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {%- if call.function.arguments is string %}{{- call.function.arguments }}
            {%- else %}{{- call.function.arguments | tojson }}{% endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
"""Tools in the system message; results of tools in a row share one turn of the user."""

LLAMA3 = """\
{%- macro turn(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}
{%- if tools is not defined %}{% set tools = none %}{% endif %}
{{- '<|begin_of_text|>' }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- turn('system') + system + '<|eot_id|>' }}
{%- if tools %}
    {%- set question = messages[0].content %}{% set messages = messages[1:] %}
    {{- turn('user') + 'Answer with a call of one of these functions.\\n\\n' }}
    {%- for tool in tools %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{% endfor %}
    {{- question + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- turn('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif m.role in ('tool', 'ipython') %}
        {{- turn('ipython') }}
        {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
        {%- else %}{{- m.content }}{% endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- turn(m.role) + (m.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- turn('assistant') }}{% endif %}"""
"""Tools before the first question; each result a turn of its own, as a JSON text."""

LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3}
CALLS = {
    "qwen3": ("<tool_call>\n", "arguments", "\n</tool_call>"),
    "llama3": ("", "parameters", ""),
}


def save_calling_model(folder: Path, family: str = "qwen3") -> Path:
    """A random model with whole calls of ``add`` and ``multiply`` among its tokens: a third of what
    it samples. The template is that of the family."""
    backend = byte_level()
    begin, arguments, end = CALLS[family]
    calls = [
        begin + json.dumps({"name": name, arguments: {"a": a, "b": b}}) + end
        for name in ("add", "multiply")
        for a in range(12)
        for b in range(12)
    ]
    backend.add_tokens([AddedToken(call, special=False, normalized=False) for call in calls])
    ends = "<|im_end|>"
    if family == "llama3":
        backend.add_special_tokens([AddedToken(name, special=True) for name in LLAMA3_TOKENS])
        ends = "<|eot_id|>"
    template = TEMPLATES[family]
    write_folder(folder / "files", backend, template=template, eos_token=ends)
    size = backend.get_vocab_size()
    config = Qwen3Config(
        vocab_size=-(-size // 8) * 8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=backend.token_to_id(ends),
        pad_token_id=backend.token_to_id("<|endoftext|>"),
    )
    return save_random_model(config, folder / "model", tokenizer_of=folder / "files")
