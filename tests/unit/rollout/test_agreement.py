"""What trainer and servers must load alike: asked before servers start, refused with a remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import Config, SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang import agreement
from megatron_rlsd.rollout.sglang.agreement import (
    Libraries,
    agreeing,
    nccl_refusal,
    own_libraries,
    set_nccl_switches,
)
from megatron_rlsd.rollout.sglang.loaded_libraries import loaded_libraries
from megatron_rlsd.rollout.sglang.process import HERE, server_environment

OURS = "/trainer/nccl/libnccl.so.2"
THEIRS = "/servers/nccl/libnccl.so.2"


def told(nccl: list[int] | None, file: str | None, torch: str, cuda: str | None = "13.0") -> Any:
    return {"torch": torch, "cuda": cuda, "nccl": nccl, "nccl_file": file}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., SGLangConfig]:
    """Servers whose Python tells ``theirs``, for a trainer that loads ``ours``."""

    def make(ours: Any, theirs: Any, **settings: Any) -> SGLangConfig:
        monkeypatch.setattr(agreement, "own_libraries", lambda: Libraries.of("/ours", ours))
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\necho a greeting\necho '{json.dumps(theirs)}'\n")
        python.chmod(0o755)
        agreement._asked.cache_clear()
        return SGLangConfig(**{"python": str(python), "device": "cuda", **settings})

    return make


OLD, NEW = told([2, 27, 5], OURS, "2.9.0"), told([2, 30, 7], THEIRS, "2.14.1")


@pytest.mark.process
def test_servers_of_the_same_nccl_are_started_as_they_are(pair: Any) -> None:
    config = pair(told([2, 30, 7], OURS, "2.13.0"), NEW)
    assert agreeing(config, "broadcast") == config


@pytest.mark.process
def test_an_older_trainer_is_refused_with_both_versions_both_pythons_and_what_to_do(
    pair: Any, tmp_path: Path
) -> None:
    with pytest.raises(EngineError) as caught:
        agreeing(pair(OLD, NEW), "broadcast")
    message = str(caught.value)
    for part in (
        f"the trainer (/ours) loads 2.27.5, the servers ({tmp_path}/python) 2.30.7",
        "pip install nvidia-nccl-cu13==2.30.7 into /ours",
        f"LD_PRELOAD={THEIRS}",
        "weight_sync.transport=disk",
    ):
        assert part in message


@pytest.mark.process
def test_servers_get_the_newer_nccl_of_their_trainer_and_it_is_said(
    pair: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = told([2, 30, 7], OURS, "2.13.0")
    config = pair(newer, told([2, 30, 5], THEIRS, "2.14.1"), env={"LD_PRELOAD": "/x.so"})
    preload = server_environment(agreeing(config, "broadcast"))["LD_PRELOAD"]
    # What they were to load anyway stays.
    assert preload == f"{OURS}:/x.so"
    assert "NCCL 2.30.7 of the trainer in place of the older 2.30.5" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        # Another CUDA's library would find no symbols of its runtime.
        (told([2, 30, 7], OURS, "2.13.0"), told([2, 27, 3], THEIRS, "2.8.0", "12.8"), "one CUDA"),
        # Nothing to preload: it is a part of torch's own library.
        (told([2, 30, 7], None, "2.13.0"), told([2, 30, 5], THEIRS, "2.14.1"), "within its torch"),
    ],
)
def test_no_library_is_preloaded_where_that_is_not_sound(
    pair: Any, ours: Any, theirs: Any, reason: str
) -> None:
    with pytest.raises(EngineError, match=reason):
        agreeing(pair(ours, theirs), "broadcast")


@pytest.mark.parametrize(
    "settings", [{"device": "cpu"}, {"urls": ["http://n:1"]}], ids=["cpu", "urls"]
)
def test_servers_that_need_no_nccl_or_run_already_are_not_asked(pair: Any, settings: Any) -> None:
    config = pair(OLD, NEW, **settings)
    assert agreeing(config, "broadcast") == config


@pytest.mark.process
def test_a_torch_without_nccl_is_no_mismatch(pair: Any) -> None:
    config = pair(told(None, None, "2.13.0+cpu", None), NEW)
    assert agreeing(config, "broadcast") == config


@pytest.mark.process
def test_other_transports_do_not_care_for_nccl(pair: Any) -> None:
    for transport in ("disk", "ipc"):
        config = pair(OLD, NEW)
        assert agreeing(config, transport) == config


@pytest.mark.process
def test_ipc_handles_that_the_servers_cannot_read_are_refused(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    newer, older = told([2, 30, 7], OURS, "2.13.0a0+8145d630e8"), told([2, 28, 9], THEIRS, "2.11.0")
    with pytest.raises(EngineError, match=r"2\.11\.0 of the servers .* refuses .* 2\.13\.0a0"):
        agreeing(pair(newer, older), "ipc")
    agreeing(pair(older, newer), "ipc")
    assert caplog.messages == []
    # Nothing is known against it, and nothing for it.
    agreeing(pair(told([2, 31, 0], OURS, "2.15.0"), newer), "ipc")
    assert "the trainer's torch 2.15.0" in caplog.text


@pytest.mark.process
def test_a_python_that_cannot_tell_is_named_with_its_last_words(pair: Any, tmp_path: Path) -> None:
    config = pair(OLD, NEW)
    (tmp_path / "python").write_text("#!/bin/sh\necho no torch here >&2\nexit 1\n")
    with pytest.raises(EngineError, match=r"/python cannot say .*: no torch here"):
        agreeing(config, "broadcast")


@pytest.mark.process
def test_this_pythons_libraries_are_those_that_a_process_of_it_tells() -> None:
    command = [sys.executable, str(HERE / "loaded_libraries.py")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(answer.stdout) == loaded_libraries()
    assert own_libraries().torch == loaded_libraries()["torch"]


@pytest.mark.process
def test_the_library_that_is_loaded_counts_not_the_one_torch_was_built_with(tmp_path: Path) -> None:
    """With a torch of sorts, whose constant says 2.28.9, and two libraries to load."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "__version__ = '2.11.0'\n"
        "class version: cuda = '13.0'\n"
        "class cuda:\n class nccl:\n  version = staticmethod(lambda: (2, 28, 9))\n"
    )

    def library(folder: Path, code: int) -> Path:
        folder.mkdir(exist_ok=True)
        source, built = folder / "nccl.c", folder / "libnccl.so.2"
        source.write_text(f"int ncclGetVersion(int *v) {{ *v = {code}; return 0; }}\n")
        flags = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", str(built), str(source)]
        subprocess.run([compiler, *flags], check=True)
        return built

    own, other = library(tmp_path / "own", 23005), library(tmp_path / "other", 23007)
    empty = tmp_path / "empty.c"
    empty.write_text("")
    linked = [str(empty), f"-L{own.parent}", "-l:libnccl.so.2", f"-Wl,-rpath,{own.parent}"]
    torch_library = str(package / "lib" / "libtorch_cuda.so")
    flags = ["-shared", "-fPIC", "-Wl,--no-as-needed", "-o", torch_library, *linked]
    subprocess.run([compiler, *flags], check=True)

    def ask(**env: str) -> Any:
        command = [sys.executable, str(HERE / "loaded_libraries.py")]
        env = {**os.environ, "PYTHONPATH": str(tmp_path), **env}
        answer = subprocess.run(
            command, env=env, capture_output=True, text=True, check=True, timeout=60
        )
        return json.loads(answer.stdout)

    assert ask() == told([2, 30, 5], str(own), "2.11.0")
    assert ask(LD_PRELOAD=str(other)) == told([2, 30, 7], str(other), "2.11.0")


def test_nccls_own_refusal_is_told_with_both_versions_whoever_reports_it() -> None:
    words = "NCCL error: invalid usage\nLast error:\nMismatched NCCL version detected : rank {}"
    for text in ("1 version 23007 rank 0 version 22705", "0 version 22705 rank 2 version 23007"):
        said = nccl_refusal(RuntimeError(words.format(text)), "server 3 (http://n:1)")
        assert said is not None
        assert said.startswith("server 3 (http://n:1) loads NCCL 2.30.7 and the trainer")
        assert "2.27.5" in said
    assert nccl_refusal("connection reset", "server 3") is None


def test_the_trainers_nccl_switches_are_sglangs_where_both_meet(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in agreement.NCCL_SWITCHES:
        monkeypatch.setenv(name, "1")  # restored after the test, whatever it was
        monkeypatch.delenv(name)
    servers = {"engine": "sglang"}
    apart = {"distributed": {"timeout_seconds": 3600}}
    set_nccl_switches(make_config(rollout=servers, weight_sync={"transport": "disk"}, **apart))
    assert "NCCL_CUMEM_ENABLE" not in os.environ
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    set_nccl_switches(make_config(rollout=servers, weight_sync={"transport": "broadcast"}, **apart))
    # Set by hand it stays, and servers of ours inherit it.
    assert (os.environ["NCCL_CUMEM_ENABLE"], os.environ["NCCL_NVLS_ENABLE"]) == ("0", "1")
    env = server_environment(SGLangConfig())
    assert (env["NCCL_CUMEM_ENABLE"], env["NCCL_NVLS_ENABLE"]) == ("0", "1")


def test_what_suits_the_trainer_alone_does_not_reach_its_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    env = server_environment(SGLangConfig())
    assert not {"PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"} & env.keys()
    asked = server_environment(SGLangConfig(env={"CUDA_DEVICE_MAX_CONNECTIONS": "4"}))
    assert asked["CUDA_DEVICE_MAX_CONNECTIONS"] == "4"
