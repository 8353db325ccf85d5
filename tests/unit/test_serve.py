"""What the serving program refuses, and where it says its servers are; tests/slurm starts some."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import Config, SGLangConfig
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.rollout.sglang.process import FREE_PORTS, free_port
from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.serve import (
    Stopped,
    announced_urls,
    main,
    serve,
    settings_to_serve,
    stopped_by_signals,
)


@pytest.fixture
def served(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """A configuration to serve; keyword arguments are keys of rollout.sglang."""

    def make(**settings: Any) -> Config:
        return make_config(
            rollout={
                "engine": "sglang",
                "sglang": {
                    "device": "cpu",
                    "start_timeout_seconds": 20,
                    "generate_timeout_seconds": 20,
                    **settings,
                },
            }
        )

    return make


def test_what_is_no_server_configuration_is_refused(
    make_config: Callable[..., Config], served: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"rollout\.engine=embedded: only sglang has servers"):
        serve(make_config())
    with pytest.raises(UserError, match=r"urls=\['http://n:1'\]: these servers run already"):
        serve(served(urls=["http://n:1"]))
    without = served()
    without.model.hf_path = str(tmp_path)
    with pytest.raises(UserError, match=f"model.hf_path={tmp_path}: no config.json"):
        serve(without)


def test_more_gpus_than_the_node_has_are_refused(served: Callable[..., Config]) -> None:
    """On any machine: it would have to have ten thousand of them."""
    config = served(device="cuda", first_gpu=4, num_servers=2500, tensor_parallel=4)
    with pytest.raises(UserError, match=r"first_gpu=4 \+ num_servers=2500 x .* = 10004 GPUs"):
        settings_to_serve(config)


def test_settings_are_those_given_but_for_what_serving_needs(served: Callable[..., Config]) -> None:
    config = served(num_servers=3, args={"context_length": 512})
    settings = settings_to_serve(config)
    assert settings.args == {"context_length": 512}
    assert settings.port in FREE_PORTS
    assert announced_urls(settings) == [f"http://127.0.0.1:{settings.port + i}" for i in range(3)]
    assert settings_to_serve(served(port=40000)).port == 40000
    # What a server binds to be reached from anywhere is not an address for anyone.
    anywhere = SGLangConfig(host="0.0.0.0", port=7)
    assert announced_urls(anywhere) == [f"http://{socket.gethostname()}:7"]


def test_neighbouring_ports_are_all_free() -> None:
    first = free_port("127.0.0.1", 3)
    listeners = [socket.socket() for _ in range(3)]
    for offset, listener in enumerate(listeners):
        listener.bind(("127.0.0.1", first + offset))
        listener.close()
    with pytest.raises(EngineError, match=r"no 2 free ports on 192\.0\.2\.1 .*assign"):
        free_port("192.0.2.1", 2)


def test_servers_that_do_not_start_are_reported_and_leave_no_urls(
    served: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    config = served(python="/no/python")
    urls = Path(config.run_dir) / "servers/n7/urls"
    write_whole(urls, "http://of.an.earlier.run\n")
    with pytest.raises(EngineError, match="no SGLang environment: /no/python"):
        serve(config)
    assert not urls.exists()


def test_the_program_tells_a_mistake_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert capsys.readouterr().err == f"error: config file {tmp_path}/absent.yaml does not exist\n"
    for arguments, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code


def test_a_signal_stops_once_and_an_ignored_one_does_not() -> None:
    def serve_until_signalled() -> None:
        with stopped_by_signals():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                # While the servers end: not again.
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)

    # Tests that a shell started in the background ignore SIGINT.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Stopped, match="SIGTERM"):
        serve_until_signalled()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGINT"), stopped_by_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGINT, interrupt)
