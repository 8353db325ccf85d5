from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.evaluate import main
from megatron_rlsd.rollout.sglang import SGLangClient
from tests.sglang.conftest import Publisher


def test_running_servers_are_asked_and_left_alone(
    published: Publisher, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"--url={server.url}" for server in published.engine.fleet.servers]
    paths = set()
    request = SGLangClient._request

    async def noted(self: SGLangClient, method: str, path: str, *rest: Any) -> bytes:
        paths.add(path)
        return await request(self, method, path, *rest)

    data = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{n} + 1 = ?", "answer": str(n + 1)} for n in range(4)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = ["--samples=3", "--max-tokens=6", f"--out={tmp_path / 'out'}"]
    key = "rollout.sglang.api_key=a key"
    # The servers' own health checks use the class, too.
    with monkeypatch.context() as patch:
        patch.setattr(SGLangClient, "_request", noted)
        assert main([f"--model={tiny_model}", f"--data={data}", *urls, *settings, key]) == 0
    assert paths <= {"/ready", "/model_info", "/generate", "/health"}
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = {s.client.label(Publisher.version) for s in published.engine.fleet.servers}
    assert set(found["weight_versions"]) == labels
    assert len(found["served_models"]) == 2
    assert found["sets"]["sums"]["sampled"]["n"] == 3
