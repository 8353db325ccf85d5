"""The examples of docs/extending.md do what the guide says, and mistakes in plug-ins are told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from megatron_rlsd import train
from megatron_rlsd.algorithms import registry, response_advantages
from megatron_rlsd.commands import convert
from megatron_rlsd.config import Config, RewardConfig, load_config
from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.ops import PolicyLossConfig, policy_loss
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, Group, Problem, RewardInput, RewardResult
from tests.batches import plain_rows, trajectory
from tests.distributed.ranks import run_on_ranks
from tests.test_algorithms import Scorer, sampled

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples/extensions"
CONCISE = EXAMPLES / "algorithm/concise.py"
HASTY = EXAMPLES / "algorithm/hasty.py"
PHI3 = EXAMPLES / "model_family/phi3.py"


@pytest.fixture(scope="module")
def phi3(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3 with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("phi3") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    base = transformers.AutoConfig.from_pretrained(tiny_model)
    config = transformers.Phi3Config(
        vocab_size=base.vocab_size,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 250000.0},
        initializer_range=0.1,
    )
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return folder


def small(run_dir: Path, model: Path, *overrides: str) -> Config:
    """examples/extensions/tiny.yaml with a reward in which random models vary."""
    reward = model.parent / "even_digits.py"
    if not reward.exists():
        shutil.copy(ROOT / "examples/rewards/even_digits.py", reward)
    changes = [
        f"run_dir={run_dir}",
        f"plugins=[{CONCISE}, {PHI3}]",
        f"model.hf_path={model}",
        "rollout.max_response_tokens=10",
        f"reward.functions=[{{name: '{reward}:even_digits'}}]",
        "reward.workers=1",
        "train.steps=1",
        "train.record_steps=all",
        "train.max_tokens_per_microbatch=512",
        "observability.tensorboard=false",
        "observability.progress=none",
        "distributed.timeout_seconds=120",
    ]
    return load_config(EXAMPLES / "tiny.yaml", [*changes, *overrides])


def test_the_reward_gives_a_part_for_a_number_nearby(tmp_path: Path) -> None:
    entry = {"name": f"{EXAMPLES}/reward/closeness.py:closeness", "params": {"tolerance": 0.2}}
    problem = Problem("p", ({"role": "user", "content": "?"},), answer="50")
    texts = {"3 and so 50": 1.0, "#### 45": 0.5, "-50": 0.0, "none": 0.0}
    samples = [RewardInput(problem, text, 3, 9, "stop") for text in texts]
    samples.append(RewardInput(problem, "50", 9, 9, "length"))
    samples.append(RewardInput(Problem("q", problem.messages, "x"), "50", 3, 9, "stop"))
    with RewardPool(RewardConfig(functions=[entry], workers=1)) as pool:
        results = pool.score(samples)
    assert [r.value for r in results[:-1]] == pytest.approx([*texts.values(), 0.0])
    assert results[-1].value is None
    assert "could not convert" in results[-1].errors["closeness"]


def test_a_reward_that_a_plugin_registers_is_known_by_its_name(tmp_path: Path) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text(
        "from megatron_rlsd.rewards import register_reward\n\n\n"
        "@register_reward('brevity')\n"
        "def brevity(sample, scale=1.0):\n    return -scale * sample.num_tokens\n"
    )
    config = load_config(
        EXAMPLES / "tiny.yaml",
        [
            f"plugins=[{plugin}]",
            "algorithm.name=rlsd",
            "reward={functions: [{name: brevity, params: {scale: 2}}], workers: 1}",
        ],
    )
    problem = Problem("p", ({"role": "user", "content": "?"},), answer="50")
    with RewardPool(config.reward) as pool:
        (result,) = pool.score([RewardInput(problem, "x", 7, 9, "stop")])
    assert result.value == -14


def group(rewards: list[float], lengths: list[int]) -> Group:
    problem = Problem("p", (), "1")
    return Group(
        problem,
        [
            trajectory(
                problem,
                Generation.of([5] * length, [0.0] * length, "stop", 0),
                reward=RewardResult(reward, {}),
            )
            for reward, length in zip(rewards, lengths, strict=True)
        ],
    )


def test_the_algorithm_prefers_short_right_responses(tmp_path: Path, tiny_model: Path) -> None:
    algorithm = small(tmp_path, tiny_model).algorithm
    assert (algorithm.advantage, algorithm.rlsd_lambda) == ("own", 0.8)
    found = response_advantages(group([1, 0, 1, 1], [30, 5, 10, 15]), algorithm)
    adjusted = torch.tensor([0.8, 0, 1, 0.95], dtype=torch.float64)
    expected = (adjusted - adjusted.mean()) / (adjusted.std() + 1e-6)
    assert found == pytest.approx(expected.tolist())
    assert response_advantages(group([1, 1], [3, 9]), algorithm) == [0, 0]
    with pytest.raises(UserError, match=r"contradicts algorithm.name=concise: it computes its own"):
        small(tmp_path, tiny_model, "algorithm.advantage=group_std")
    with pytest.raises(UserError, match="its weight lies between 0 and 2 by itself"):
        small(tmp_path, tiny_model, "algorithm.evidence_clip=0.2")


def train_on_ranks(folder: str, model: str) -> None:
    """On every rank: tensor parallel, and a learning rate that moves no weight."""
    layout = ("parallel.tensor=2", "optimizer.lr=1.0e-30")
    train.train(small(Path(folder) / "two", Path(model), *layout))


def test_a_run_with_an_algorithm_and_a_model_family_of_ones_own(phi3: Path, tmp_path: Path) -> None:
    config = small(tmp_path / "one", phi3)
    train.train(config)
    run_on_ranks(train_on_ranks, 2, str(tmp_path), str(phi3), seconds=400)
    one, two = (
        next(m for m in read_metrics(tmp_path / run / "metrics.jsonl") if "train/loss" in m)
        for run in ("one", "two")
    )

    # The loss by its formula, from transformers' log-probabilities in float64.
    rows = plain_rows(read_step(tmp_path / "one", 0).batch)
    score, terms = Scorer(phi3), []
    for row in rows:
        response = row.response_ids
        lp = sampled(score(row.prompt_ids, response), response)
        with torch.no_grad():
            gain = sampled(score(row.teacher_prompt_ids, response), response) - lp
        A = row.advantage
        weight = 2 / (1 + (-gain if A > 0 else gain).exp())
        A_hat = A * (0.2 + 0.8 * weight)
        terms.append(-A_hat * (lp - lp.detach()).exp())
        assert row.rollout_log_probs == pytest.approx(lp.tolist(), abs=1e-4)
    loss = torch.cat(terms).mean()
    loss.backward()
    squares = [(p.grad**2).sum() for p in score.model.parameters() if p.grad is not None]
    assert any(row.advantage for row in rows)
    assert one["train/loss"] == pytest.approx(loss.item(), abs=2e-5)
    assert one["train/grad_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), 1e-4)
    for key in ("train/loss", "train/grad_norm", "algorithm/evidence_weight_mean"):
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key

    # Two ranks read, split, joined and wrote the weights without changing a bit.
    before, after = SafetensorsFolder(phi3), SafetensorsFolder(tmp_path / "two/hf/final")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.slice(name), after.slice(name)) for name in before.tensors)


def test_a_run_whose_rule_chooses_hints_and_credits_tokens(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The loss by its formula; both prompts have the hint that the file says."""
    settings = (f"plugins=[{HASTY}]", "algorithm.name=hasty", "reward.solved_threshold=0.5")
    config = small(tmp_path / "run", tiny_model, *settings)
    train.train(config)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    measured = next(line for line in lines if "train/loss" in line)
    rows = plain_rows(read_step(tmp_path / "run", 0).batch)
    score, terms, credited = Scorer(tiny_model), [], 0
    for row in rows:
        A, response = row.advantage, row.response_ids
        assert len(row.contrast_prompts) == (row.teacher_prompt_ids is not None)
        A_hat = torch.full((len(response),), A, dtype=torch.float64)
        if A and row.contrast_prompts:
            prompts = (row.teacher_prompt_ids, *row.contrast_prompts)
            with torch.no_grad():
                one, other = (sampled(score(prompt, response), response) for prompt in prompts)
            A_hat = A * (1 + 0.5 * ((1 if A > 0 else -1) * (one - other) / 0.5).tanh())
            credited += 1
        terms.append(-A_hat)
    assert credited > 1
    loss = torch.cat(terms).mean().item()
    assert measured["train/loss"] == pytest.approx(loss, abs=2e-5)
    flat = torch.cat([torch.full((len(r.response_ids),), -r.advantage) for r in rows]).mean()
    assert abs(loss - flat.item()) > 1e-4


def test_a_family_of_ones_own_is_converted(
    phi3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = convert.main
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert main(["to-megatron", str(phi3), megatron, "--tensor-parallel=2"]) == 2
    assert "a table of your own is named under plugins" in capsys.readouterr().err
    plugin = f"--plugin={PHI3}"
    assert main(["to-megatron", str(phi3), megatron, "--tensor-parallel=2", plugin]) == 0
    assert main(["to-hf", megatron, back, plugin]) == 0
    capsys.readouterr()
    assert main(["verify", str(phi3), back, plugin]) == 0
    said = capsys.readouterr().out
    assert "weights: 15 tensors bit-identical" in said
    difference = re.search(r"differ by at most (\S+) over \d+ tokens \(within", said)
    assert float(difference[1]) < 1e-4


def test_the_guide_shows_the_examples_as_they_are() -> None:
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)
    sources = [path.read_text() for path in EXAMPLES.rglob("*.py")]
    assert len(shown) == len(sources) == 4
    for block in shown:
        assert any(block in source for source in sources), block[:80]


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ("[nowhere.py]", r"plugin 'nowhere.py': there is no file /.*nowhere.py"),
        ("[no_such_module]", "plugin 'no_such_module': there is no module of this name; a file"),
        ("[{tmp}/broken.py]", r"could not be imported: KeyError: 'x' \(.*broken.py, line 2\)"),
        ("[{tmp}/taken.py]", "UserError: an algorithm named 'grpo' is registered already"),
        ("[{tmp}/keys.py]", "UserError: algorithm 'mine': algorithm has no key evidnce; it has"),
        ("[{tmp}/llama.py]", "LlamaForCausalLM belongs to the registered family llama already"),
        ("{tmp}/broken.py", "plugins: Input should be a valid list"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_told(plugins: str, message: str, tmp_path: Path) -> None:
    algorithm = "from megatron_rlsd.algorithms import Variant, register_algorithm\n"
    (tmp_path / "broken.py").write_text("table = {}\ntable['x']\n")
    (tmp_path / "taken.py").write_text(algorithm + "register_algorithm('grpo', Variant())")
    (tmp_path / "keys.py").write_text(
        algorithm + "register_algorithm('mine', Variant(defaults={'evidnce': 1}))"
    )
    (tmp_path / "llama.py").write_text(
        "from dataclasses import replace\n"
        "from megatron_rlsd.hf_bridge.families import FAMILIES, register_family\n"
        "register_family(replace(FAMILIES[0], name='mine'))"
    )
    with pytest.raises(UserError, match=message):
        load_config(EXAMPLES / "tiny.yaml", [f"plugins={plugins.replace('{tmp}', str(tmp_path))}"])


def test_a_name_that_no_plugin_registers_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no algorithm 'concise'; known: rlsd, .*under plugins"):
        load_config(EXAMPLES / "tiny.yaml", ["plugins=[]"])


def test_results_that_do_not_fit_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    algorithm = small(tmp_path, tiny_model).algorithm
    for wrong in ([1.0], [float("nan"), 0.0]):
        returned = mock.Mock(return_value=wrong)
        registry._OWN["concise"] = registry.OwnFunctions(advantages=returned)
        with pytest.raises(UserError, match="expected 2 finite numbers"):
            response_advantages(group([1, 0], [2, 2]), algorithm)
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"shape \[1\], expected one weight for each of 4 tokens"):
        policy_loss(
            torch.randn(4, 6),
            torch.randn(9, 6),
            torch.tensor([1, 2, 3, 4]),
            advantages=ones,
            loss_weights=ones,
            teacher_log_probs=-ones,
            config=PolicyLossConfig(evidence_weight=lambda gain, A, lp: gain.mean()[None]),
        )
