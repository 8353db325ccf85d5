"""Exports of several kinds of tokenizers, for programs that read them: what prompts they make."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data import Tokenizer, load_tokenizer
from megatron_rlsd.data.probes import CONVERSATION, TEXTS
from tests.unit.data.hf_folders import CHATML, byte_level, metaspace, write_folder

LATIN = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
)
LATIN += "{{ m.content }}</s>{% endif %}{% endfor %}"
CONVERSATIONS = [
    list(CONVERSATION),
    [{"role": "user", "content": " ".join(TEXTS)}],
    [{"role": "user", "content": "  x\n\n"}, {"role": "assistant", "content": ""}, CONVERSATION[0]],
]
KINDS: dict[str, dict[str, Any]] = {
    "own template": {
        "folder": {"model_type": "qwen3", "template": None},
        "run": {"chat_template": CHATML},
    },
    "llama's class, bytes": {
        "folder": {"model_type": "llama", "tokenizer_class": "LlamaTokenizerFast"},
        "run": {},
    },
    "own code": {
        "folder": {
            "model_type": "deepseek_v3",
            "tokenizer_class": "Ours",
            "auto_map": {"AutoTokenizer": ["ours.Ours", None]},
        },
        "run": {},
    },
    "from sentencepiece": {
        "backend": metaspace,
        "folder": {
            "model_type": "llama", "tokenizer_class": "LlamaTokenizerFast", "template": LATIN,
            "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True,
        },
        "run": {},
    },
    "arguments of the template": {
        "folder": {
            "model_type": "qwen3",
            "template": CHATML.replace("assistant\n{%", "assistant\n{{ hint }}<think>{%"),
        },
        "run": {"chat_template_kwargs": {"hint": "a 'b' \"c\"\n"}},
    },
}  # fmt: skip


def exports(tmp_path: Path, sentencepiece_model: Path) -> dict[Path, Tokenizer]:
    """Export -> the tokenizer that the run had which wrote it."""
    made = {}
    for number, kind in enumerate(KINDS.values()):
        backend = kind.get("backend", byte_level)()
        source = write_folder(tmp_path / f"model_{number}", backend, **kind["folder"])
        made[source] = load_tokenizer(TokenizerConfig(**kind["run"]), source)
    made[sentencepiece_model] = load_tokenizer(TokenizerConfig(), sentencepiece_model)
    found = {}
    for number, (source, tokenizer) in enumerate(made.items()):
        out = tmp_path / f"export_{number}"
        out.mkdir()
        (out / "config.json").write_bytes((source / "config.json").read_bytes())
        tokenizer.save(out)
        found[out] = tokenizer
    return found


def rendered_by(python: Path, script: Path, folders: list[Path]) -> list[list[list[int]]]:
    """Of each folder the token ids of each conversation, as another program has them.

    ``script`` gets {"folders": [...], "conversations": [...]} and prints {"prompts": ...} last.
    """
    done = subprocess.run(
        [python, script],
        input=json.dumps({"folders": list(map(str, folders)), "conversations": CONVERSATIONS}),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"prompts"')]
    prompts: list[list[list[int]]] = json.loads(lines[-1])["prompts"]
    return prompts


def rendered_by_transformers(folder: Path) -> list[list[int]]:
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return [
        theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in CONVERSATIONS
    ]
