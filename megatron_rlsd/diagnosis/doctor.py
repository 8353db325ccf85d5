"""All checks in order; what a check needs and another one found missing makes it skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.data import Tokenizer, load_tokenizer
from megatron_rlsd.data.positions import build_prompts
from megatron_rlsd.diagnosis import inputs, machine, model, servers, versions
from megatron_rlsd.diagnosis.agreement import check_agreement
from megatron_rlsd.diagnosis.check import Check, Doubt, Skip, run_check
from megatron_rlsd.diagnosis.collective import check_collectives
from megatron_rlsd.diagnosis.hidden_text import check_hidden_text
from megatron_rlsd.hf_bridge import Family, ModelDims, family_for, load_hf_config
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.runtime import one_voice
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.megatron_versions import check_megatron_version
from megatron_rlsd.types import Problem

Needed = TypeVar("Needed")

LEFT_TO_THE_RUN = {"fast kernels", "trainer and servers", "teacher", "servers"}
"""Checks of what a run says or waits for by itself."""


class Doctor:
    """Checks a machine and, with a configuration, what it names. Nothing is left running."""

    def __init__(
        self,
        config_path: Path | None = None,
        overrides: list[str] | None = None,
        *,
        world_size: int | None = None,
        local_processes: int | None = None,
        deep: bool = False,
    ) -> None:
        """``world_size``: the trainer's processes, ``local_processes``: those on this machine,
        where known."""
        self._path, self._overrides = config_path, overrides or []
        self._world_size, self._local, self._deep = world_size, local_processes, deep
        self._config: Config | None = None
        self._hf_config: dict[str, Any] | None = None
        self._family: Family | None = None
        self._model: ModelDims | None = None

    def checks(self, *, machine_too: bool = True) -> Iterator[Check]:
        """One after the other, as they are done."""
        if machine_too:
            yield from self._machine()
        if self._path is None:
            yield run_check("fast kernels", machine.check_fast_kernels)
            yield run_check("trainer and servers", check_agreement)
            return
        yield run_check("config", self._read_config)
        if self._config is None:
            return
        for name, work in self._configured(self._config):
            yield run_check(name, work)

    def _machine(self) -> Iterator[Check]:
        yield from versions.version_checks()
        yield run_check("device", machine.check_device)
        yield run_check("collectives", check_collectives)

    def _configured(self, config: Config) -> Iterator[tuple[str, Callable[[], str]]]:
        """Each check's name and work; one may use what an earlier one has read."""
        yield "fast kernels", lambda: machine.check_fast_kernels(config)
        yield "megatron-core", lambda: ".".join(map(str, check_megatron_version()))
        yield "sglang environment", lambda: versions.check_sglang(config)
        yield "trainer and servers", lambda: self._check_agreement(config)
        yield "model config", lambda: self._read_model(config)
        yield "weights", lambda: model.check_weights(config)
        yield "tokenizer", lambda: model.check_tokenizer(config, self._vocab_size())
        yield "teacher", lambda: model.check_teacher(config, self._vocab_size())
        yield (
            "layout",
            lambda: model.check_parallel(
                config, needed(self._model, "the model's config.json"), self._world_size
            ),
        )
        yield "processes", lambda: machine.check_processes(config, self._local)
        yield "run_dir", lambda: machine.check_space(config, self._model)
        yield "data", lambda: self._check_data(config)
        if config.environment.plays:
            yield "environment", lambda: self._check_environment(config)
        yield "rewards", lambda: self._check_rewards(config)
        yield "hidden text", lambda: check_hidden_text(config, _tokenizer(config))
        yield "servers", lambda: servers.check_servers(config)
        if self._deep:
            yield "engine against trainer", lambda: self._check_engine(config)

    def refuse(self, config: Config) -> None:
        """Raise UserError that says everything for which a run with ``config`` cannot start.

        What a run waits for by itself is left out: servers may start later than the trainer.
        Doubts are told as notices; a fault of a check is raised as it is.
        """
        problems: dict[str, None] = {}
        doubts = []
        for name, work in self._configured(config):
            if name in LEFT_TO_THE_RUN:
                continue
            try:
                work()
            except Skip:
                continue
            except Doubt as doubt:
                doubts.append(f"{name}: {doubt}")
            except UserError as error:
                problems[str(error)] = None
        for text in doubts if not problems else ():
            one_voice.notice(text)
        if len(problems) == 1:
            raise UserError(*problems)
        if problems:
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(f"{len(problems)} things speak against this run:{listed}")

    def _vocab_size(self) -> int:
        return int(needed(self._hf_config, "the model's config.json")["vocab_size"])

    def engine_check(self) -> Check:
        """The deep check alone, for the ranks that only help."""
        run_check("config", self._read_config)
        return run_check("engine against trainer", lambda: self._check_engine(self._config))

    def _check_engine(self, config: Config | None) -> str:
        # Imported late: it pulls in Megatron, which the other checks do without.
        from megatron_rlsd.diagnosis.deep import check_engine

        return check_engine(needed(config, "the config"))

    def _read_config(self) -> str:
        assert self._path is not None
        self._config = load_config(self._path, self._overrides)
        return str(self._path)

    def _read_model(self, config: Config) -> str:
        hf_config = load_hf_config(config.model.hf_path)
        self._family = family_for(hf_config)
        self._hf_config = hf_config
        self._model = self._family.dims(hf_config)
        return model.check_hf_config(self._family, hf_config)

    def _check_agreement(self, config: Config) -> str:
        try:
            return check_agreement(config)
        except EngineError as error:
            raise Skip(f"needs an SGLang environment: {error}") from error

    def _check_data(self, config: Config) -> str:
        hf_config = needed(self._hf_config, "the model's config.json")
        return inputs.check_data(config, build_prompts(config, hf_config, _tokenizer(config)))

    def _check_environment(self, config: Config) -> str:
        problems = _problems(config)
        return inputs.check_environment(
            config, _tokenizer(config), problems[0] if problems else None
        )

    def _check_rewards(self, config: Config) -> str:
        return inputs.check_rewards(config, _problems(config))


def _tokenizer(config: Config) -> Tokenizer:
    try:
        return load_tokenizer(config.tokenizer, config.model.hf_path)
    except UserError as error:
        raise Skip("needs a tokenizer") from error


def _problems(config: Config) -> list[Problem]:
    """The first ones; none where the data check says why."""
    try:
        return inputs.first_problems(config)
    except UserError:
        return []


def needed(value: Needed | None, what: str) -> Needed:
    """Skip the check where another one failed to get what it needs."""
    if value is None:
        raise Skip(f"needs {what}")
    return value
