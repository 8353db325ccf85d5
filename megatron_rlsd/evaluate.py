"""How well does a model solve held-out problems? pass@k, avg@k and maj@k with their intervals.

    rlsd evaluate --model FOLDER --data [NAME=]FILE ... [CONFIG.yaml] [key=value ...]

FOLDER is a Hugging Face folder or a Megatron checkpoint of any layout; neither an optimizer nor an
export is made. Prompts, reward and tokenizer are those of CONFIG.yaml, or of the run that wrote the
model, if it lies in a run's folder. The responses come from the embedded engine (with --nproc N on
N ranks), from servers that are started (--servers N), or from servers that run (--url URL),
which are asked and otherwise left alone.

The results go to OUT/results.json and, response by response, to OUT/responses/NAME.jsonl.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what may be missing is imported
    from megatron_rlsd.runtime.missing import tell_missing

    tell_missing()

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_rlsd.config import Config, config_parser
from megatron_rlsd.config.loading import parse_config, refuse_masks, with_overrides
from megatron_rlsd.observability.metrics_file import finite_or_none, move_aside
from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError, tell

if TYPE_CHECKING:  # the help needs no torch
    from megatron_rlsd.experience.evaluated_model import EvaluatedModel
    from megatron_rlsd.experience.evaluation import Responses, SetResult
    from megatron_rlsd.rollout.engine import RolloutEngine
    from megatron_rlsd.types import Problem

DEFAULT_RESPONSE_TOKENS = 4096
"""Where no configuration says more, and the model's context allows it."""
KEPT = ("plugins", "model", "tokenizer", "prompts", "environment", "reward", "data", "eval")
"""Sections that decide an evaluation; of others only what is named below."""
KEPT_ROLLOUT = ("engine", "temperature", "max_response_tokens", "stop_token_ids")
NOTABLE_TRUNCATION = 0.05


def parser() -> argparse.ArgumentParser:
    made = config_parser(__doc__, "rlsd evaluate", optional=True)
    made.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    made.add_argument(
        "--data", action="append", metavar="[NAME=]FILE", help="default: data.eval of the config"
    )
    made.add_argument(
        "--preset",
        metavar="BENCHMARK",
        help="prompt, reward and sampling of gsm8k, aime24, ... (rlsd prepare)",
    )
    made.add_argument("--problems", type=int, help="the first ones of each set; default: all")
    made.add_argument("--reward", help="default: the config's, or math_verify")
    engines = made.add_mutually_exclusive_group()
    engines.add_argument("--servers", type=int, metavar="N", help="start N SGLang servers")
    engines.add_argument("--url", action="append", help="a server that runs; may be repeated")
    made.add_argument("--samples", type=int, metavar="N", help="sampled responses a problem")
    made.add_argument("--k", type=int, nargs="+", help="of pass@k and maj@k; default: 1 and N")
    made.add_argument("--greedy", action=argparse.BooleanOptionalAction, default=None)
    made.add_argument("--temperature", type=float)
    made.add_argument("--top-p", type=float)
    made.add_argument("--top-k", type=int)
    made.add_argument("--max-tokens", type=int, help="of a response")
    made.add_argument("--seed", type=int)
    made.add_argument("--out", type=Path, help="default: evaluations/MODEL")
    return made


def main(argv: list[str]) -> int:
    return evaluate(parser().parse_intermixed_args(argv))


def evaluate(arguments: argparse.Namespace) -> int:
    """What ``parser`` read, done; the exit code."""
    if arguments.config is not None and "=" in str(arguments.config):
        arguments.overrides.insert(0, str(arguments.config))
        arguments.config = None
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        return run(arguments, first)
    except UserError as error:
        return tell(error) if first else 2
    except KeyboardInterrupt:
        print("stopped; the results hold the sets that were finished", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, first: bool) -> int:
    """Evaluate and write; ``first``: this is the process that does so, others only help it."""
    from megatron_rlsd.experience.evaluated_model import (
        EvaluatedModel,
        answering,
        shared_by_ranks,
    )

    model = EvaluatedModel.at(arguments.model)
    base, origin = base_settings(arguments, model)
    out = arguments.out or Path("evaluations") / _name_of(model)
    config = configuration(arguments, model, base, out)
    if config.rollout.engine != "embedded" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("servers are asked by one process: start one")
    evaluation = Evaluation(config, model, out, has_base=origin is not None) if first else None
    if evaluation is not None:
        print(evaluation.heading(origin), flush=True)
    with ExitStack() as stack:
        engine = stack.enter_context(answering(config, model, out))
        shared = stack.enter_context(shared_by_ranks(engine))
        if shared is None:
            assert evaluation is not None
            evaluation.run(engine)
        else:
            shared.run_on_rank_zero(lambda: evaluation.run(shared) if evaluation else None)
    return 0


def base_settings(
    arguments: argparse.Namespace, model: EvaluatedModel
) -> tuple[dict[str, Any], Path | None]:
    """What the configuration says that an evaluation needs, and which file that is."""
    origin = arguments.config or model.run_config()
    if origin is None:
        return {}, None
    if not origin.is_file():
        raise UserError(f"config file {origin} does not exist")
    try:
        raw = yaml.safe_load(origin.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{origin} must hold a mapping of config sections")
    base = {name: raw[name] for name in KEPT if name in raw}
    rollout = raw.get("rollout") or {}
    base["rollout"] = {key: rollout[key] for key in KEPT_ROLLOUT if key in rollout}
    for engine in ("embedded", "sglang"):
        base["rollout"][engine] = dict(rollout.get(engine) or {})
    base["train"] = {"seed": (raw.get("train") or {}).get("seed", 0)}
    return base, origin


def configuration(
    arguments: argparse.Namespace, model: EvaluatedModel, base: dict[str, Any], out: Path
) -> Config:
    """The base with the command line's settings; UserError names what does not fit."""
    from megatron_rlsd.experience.evaluated_model import own_dtype

    raw: dict[str, Any] = {**base, "run_dir": str(out)}
    sections = {
        name: dict(base.get(name) or {}) for name in ("model", "data", "rollout", "eval", "train")
    }
    raw |= sections
    sections["model"] = raw["model"] = {
        "hf_path": str(model.hf_files),
        "dtype": sections["model"].get("dtype", own_dtype(model)),
    }
    raw.setdefault("reward", {"functions": [{"name": "math_verify"}]})
    raw.setdefault("prompts", {"max_prompt_tokens": 1_000_000})
    if arguments.preset:
        _apply_preset(arguments, raw, sections["eval"])
    if arguments.reward:
        raw["reward"] = {**raw["reward"], "functions": [{"name": arguments.reward}]}
    if arguments.data:
        sections["data"]["eval"] = [_source(text) for text in arguments.data]
        sections["eval"]["num_problems"] = None
    if not sections["data"].get("eval"):
        raise UserError("there are no problems to solve: name them with --data [NAME=]FILE.jsonl")
    # What the model was trained on does not matter here, and need not be on this machine.
    sections["data"]["train"] = sections["data"]["eval"]
    rollout = sections["rollout"]
    if arguments.servers is not None:
        rollout["engine"] = "sglang"
        servers = {"num_servers": arguments.servers, "urls": []}
        rollout["sglang"] = {**(rollout.get("sglang") or {}), **servers}
    if arguments.url:
        rollout["engine"] = "sglang"
        rollout["sglang"] = {**(rollout.get("sglang") or {}), "urls": arguments.url}
    given = {
        "num_problems": arguments.problems,
        "n_samples": arguments.samples,
        "pass_at_k": arguments.k,
        "greedy": arguments.greedy,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": arguments.top_k,
        "max_response_tokens": arguments.max_tokens,
    }
    sections["eval"] |= {key: value for key, value in given.items() if value is not None}
    if arguments.samples is not None and arguments.k is None:
        sections["eval"]["pass_at_k"] = sorted({1, max(1, arguments.samples)})
    if arguments.seed is not None:
        sections["train"]["seed"] = arguments.seed
    # All responses of a set are asked for at once, however many; each by itself is bounded.
    raw["distributed"] = {"timeout_seconds": 31 * 86400}
    if rollout.get("engine") == "sglang":
        rollout["sglang"]["generate_timeout_seconds"] = 30 * 86400
    config = parse_config(with_overrides(raw, arguments.overrides), origin="the evaluation")
    refuse_masks(config, "the run's config.yaml")
    return config


def _apply_preset(
    arguments: argparse.Namespace, raw: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The benchmark's prompt, reward and sampling, whatever a configuration says of these."""
    from megatron_rlsd.data.benchmarks import benchmark

    preset = benchmark(arguments.preset).settings()
    raw["prompts"] = {**raw["prompts"], **preset["prompts"]}
    reward = {key: value for key, value in raw["reward"].items() if key != "correctness"}
    raw["reward"] = {**reward, **preset["reward"]}
    settings.pop("answer_pattern", None)
    settings |= preset["eval"]


def _source(text: str) -> dict[str, Any]:
    name, separator, path = text.partition("=")
    if not separator or Path(text).exists():
        return {"kind": _kind(Path(text)), "path": text, "shuffle": False}
    return {"kind": _kind(Path(path)), "path": path, "name": name, "shuffle": False}


def _kind(path: Path) -> str:
    """What a file or folder without a configuration is read as."""
    if path.suffix == ".parquet":
        return "parquet"
    if path.is_dir():
        return "hf" if (path / "state.json").exists() else "parquet"
    return "jsonl"


def _name_of(model: EvaluatedModel) -> str:
    """runs/x/hf/final -> x-final: a model's own folder is often called the same."""
    path = model.path.absolute()
    run = path.parent.parent.name if model.run_config() else ""
    return f"{run}-{path.name}" if run else path.name


class Evaluation:
    """The sets of problems, and what becomes of them; in one process."""

    def __init__(self, config: Config, model: EvaluatedModel, out: Path, *, has_base: bool) -> None:
        """Raises UserError for data, prompts and lengths that do not fit, before a model is read.

        ``has_base``: a configuration says how long responses are; else it is as long as fits.
        """
        from megatron_rlsd.data import PromptBuilder, evaluation_sets, load_tokenizer

        self.model, self.out = model, out
        self.tokenizer = load_tokenizer(config.tokenizer, model.hf_files)
        self.prompts = PromptBuilder(config.prompts, config.teacher, self.tokenizer)
        self.sets = evaluation_sets(config.data.eval, config.eval.num_problems)
        self.config = self._fitting(config, has_base)
        self.longest_prompt: int

    def _fitting(self, config: Config, has_base: bool) -> Config:
        from megatron_rlsd.data import PromptTooLong

        longest = 0
        too_long: list[tuple[str, PromptTooLong]] = []
        for name, problems in self.sets.items():
            for problem in problems:
                try:
                    longest = max(longest, len(self.prompts.student(problem)))
                except PromptTooLong as error:
                    too_long.append((name, error))
        if too_long:
            name, first = too_long[0]
            raise UserError(
                f"{len(too_long)} problems have prompts of more than prompts.max_prompt_tokens="
                f"{first.max_tokens} tokens and would be left out of the result, the first of set "
                f"{name}: {first.problem_id} with {first.num_tokens}; raise it"
            )
        wanted, limit = config.eval.max_response_tokens, config.eval_response_tokens
        most = self.model.max_positions
        if wanted is None and not has_base:
            fits = DEFAULT_RESPONSE_TOKENS if most is None else most - longest
            limit = min(DEFAULT_RESPONSE_TOKENS, fits)
        if limit < 1 or (most is not None and longest + limit > most):
            raise UserError(
                f"the longest prompt has {longest} tokens; with responses of {limit} it does not "
                f"fit into the model's {most} positions: set --max-tokens to at most "
                f"{(most or 0) - longest}"
            )
        settings = config.eval.model_copy(update={"max_response_tokens": limit})
        return config.model_copy(update={"eval": settings})

    def heading(self, origin: Path | None) -> str:
        config, settings = self.config, self.config.eval
        engine = "embedded engine"
        if config.rollout.engine == "sglang":
            urls = config.rollout.sglang.urls
            engine = f"SGLang at {', '.join(urls)}" if urls else "SGLang servers, started here"
        samples = [] if not settings.greedy else ["greedy"]
        if settings.n_samples:
            nucleus = f", top_p {settings.top_p:g}" * (settings.top_p < 1)
            nucleus += f", top_k {settings.top_k}" * (settings.top_k > 0)
            samples.append(
                f"{settings.n_samples} a problem at temperature {settings.temperature:g}{nucleus}"
            )
        step = f", step {self.model.step}" if self.model.step is not None else ""
        rewards = ", ".join(each.name for each in config.reward.functions)
        counts = ", ".join(f"{name} ({len(each)})" for name, each in self.sets.items())
        prompts = "the question alone; name a configuration to add what it says"
        lines = {
            "model": f"{self.model.path}{step}, {config.model.dtype}, {engine}",
            "prompts": f"as in {origin}" if origin else prompts,
            "reward": rewards,
            "problems": counts,
            "sampling": f"{' and '.join(samples)}; at most {settings.max_response_tokens} tokens; "
            f"seed {config.train.seed}",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())

    def run(self, engine: RolloutEngine) -> None:
        """Every set in turn; results.json holds those that are finished."""
        from rich.console import Console

        from megatron_rlsd.experience import GroupBuilder
        from megatron_rlsd.experience.evaluation import evaluate_set
        from megatron_rlsd.experience.playing import open_player
        from megatron_rlsd.observability.tables import results_table
        from megatron_rlsd.rewards import RewardPool

        config = self.config
        console = Console(width=None if sys.stdout.isatty() else 100)
        self.out.mkdir(parents=True, exist_ok=True)
        moved = move_aside([self.out / "results.json", self.out / "responses"])
        if moved:
            names = ", ".join(path.name for path in moved)
            console.print(f"{self.out} holds earlier results, now {names}", highlight=False)
        results = self.about(engine)
        started = time.monotonic()
        with ExitStack() as stack:
            rewards = stack.enter_context(RewardPool(config.reward))
            player = open_player(config, self.prompts, self.tokenizer, engine)
            episodes = stack.enter_context(player)
            if episodes is not None:
                episodes.wait_until_ready()
            rewards.wait_until_ready()
            builder = GroupBuilder(config, self.prompts, self.tokenizer, engine, rewards, episodes)
            for name, problems in self.sets.items():
                with console.status(f"{name}: starting") as status:

                    def progress(done: int, total: int, name: str = name) -> None:
                        status.update(f"{name}: {done}/{total} responses")

                    engine.on_progress = progress
                    result = evaluate_set(builder, name, problems, config)
                self.write_responses(name, result, builder.solved)
                results["sets"][name] = set_results(problems, result)
                results["seconds"] = round(time.monotonic() - started, 1)
                labels = getattr(engine, "labels", None)
                results["weight_versions"] = labels or [str(engine.weight_version)]
                write_whole(
                    self.out / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"
                )
        console.print(results_table(results["sets"]))
        for doubt in doubts(results):
            console.print(f"WARNING: {doubt}", highlight=False, soft_wrap=True)
        console.print(f"results    {self.out / 'results.json'}", highlight=False, soft_wrap=True)

    def about(self, engine: RolloutEngine) -> dict[str, Any]:
        """What the results are of: enough to make them again."""
        import megatron_rlsd
        from megatron_rlsd.experience.evaluated_model import described

        config = self.config
        example = next(problems[0] for problems in self.sets.values())
        served = engine.models() if hasattr(engine, "models") else None
        return {
            "model": described(self.model),
            "served_models": served,
            "version": megatron_rlsd.__version__,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": {
                **config.eval.model_dump(mode="json", exclude={"interval", "at_start"}),
                "seed": config.train.seed,
                "dtype": config.model.dtype,
                "engine": config.rollout.engine,
                "reward": config.reward.model_dump(mode="json")["functions"],
                "prompts": config.prompts.model_dump(mode="json"),
                "environment": config.environment.model_dump(mode="json"),
            },
            "first_prompt": self.tokenizer.decode(self.prompts.student(example)),
            "sets": {},
        }

    def write_responses(self, name: str, result: SetResult, solved: Any) -> None:
        from megatron_rlsd.observability.samples import sample_row

        rows = []
        for kind, responses in (("greedy", result.greedy), ("sampled", result.sampled)):
            for trajectory in responses.trajectories if responses else ():
                found = {"kind": kind, "solved": solved(trajectory)}
                rows.append(found | sample_row(trajectory))
        path = self.out / "responses" / f"{name}.jsonl"
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def set_results(problems: list[Problem], result: SetResult) -> dict[str, Any]:
    """One set's numbers as JSON data; an accuracy with the bounds of its 95 % interval."""

    def numbers(responses: Responses | None) -> dict[str, Any] | None:
        if responses is None:
            return None
        accuracies = {
            name: None if each is None else asdict(each)
            for name, each in responses.accuracies.items()
        }
        facts = {name: finite_or_none(value) for name, value in responses.facts().items()}
        return {"n": responses.n, "accuracies": accuracies, **facts}

    content = json.dumps([[p.messages, p.answer] for p in problems], sort_keys=True)
    return {
        "problems": len(problems),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "greedy": numbers(result.greedy),
        "sampled": numbers(result.sampled),
    }


def doubts(results: dict[str, Any]) -> list[str]:
    """What makes the numbers say less than they seem to."""
    found = []
    for name, each in results["sets"].items():
        for kind in ("greedy", "sampled"):
            facts = each[kind]
            if facts and facts["truncated_share"] > NOTABLE_TRUNCATION:
                limit = results["settings"]["max_response_tokens"]
                found.append(
                    f"{name}: {facts['truncated_share']:.0%} of the {kind} responses were cut at "
                    f"{limit} tokens (--max-tokens) and count as they stood then"
                )
            if facts and facts["reward_error_share"]:
                found.append(
                    f"{name}: the reward failed on {facts['reward_error_share']:.1%} of the "
                    f"{kind} responses, which belong to no number above"
                )
    if len(results["weight_versions"]) > 1:
        found.append(
            f"the servers' weights changed meanwhile: {', '.join(results['weight_versions'])}"
        )
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
