import pytest
import yaml

from megatron_rlsd.config import JsonlSource, dump_config, load_config
from megatron_rlsd.runtime.errors import UserError

VALID = {
    "run_dir": "runs/x",
    "model": {"hf_path": "models/x"},
    "data": {"train": [{"kind": "jsonl", "path": "train.jsonl"}]},
    "reward": {"functions": [{"name": "exact_match"}]},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**VALID, **changes}))
        return path

    return write


def test_overrides_reach_nested_keys_lists_and_new_sections(write):
    config = load_config(
        write(),
        [
            "optimizer.lr=1e-4",
            "parallel.tensor=2",
            "data.train.0.path=other.jsonl",
            "algorithm.dual_clip=null",
            "eval.pass_at_k=[1, 4]",
            "eval.n_samples=4",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.parallel.tensor == 2
    (source,) = config.data.train
    assert isinstance(source, JsonlSource)
    assert source.path == "other.jsonl"
    assert config.algorithm.dual_clip is None
    assert config.eval.pass_at_k == [1, 4]


def test_a_dumped_config_reads_back_equal(write, tmp_path):
    config = load_config(write(), ["train.global_batch_size=32"])
    dump_config(config, tmp_path / "dump.yaml")
    assert load_config(tmp_path / "dump.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rate=1",
            "optimizer.learning_rate: unknown key; known keys: lr, min_lr",
        ),
        ("optimiser.lr=1", "optimiser: unknown key"),
        ("optimizer.lr=fast", "optimizer.lr: .*valid number.*'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: .*greater than 0"),
        ("teacher.mode=thawed", "teacher.mode: .*'live', 'frozen', 'periodic' or 'ema'"),
        ("train.global_batch_size=7", "train.global_batch_size=7 must divide .* = 128"),
        ("eval.pass_at_k=[1, 8]", "eval.n_samples=1"),
        ("parallel.sequence=true", "sequence=true needs tensor > 1"),
        ("data.train.0.kind=csv", "data.train.0: .*'jsonl', 'parquet', 'hf', 'reasoning_gym'"),
        ("data.train.1.path=x", "'1' must be an index below 1"),
        ("run_dir.x=1", "run_dir is a value, not a section"),
        ("steps", "must look like section.key=value"),
    ],
)
def test_mistakes_are_named_with_what_was_expected(write, override, message):
    with pytest.raises(UserError, match=message):
        load_config(write(), [override])


def test_every_mistake_is_listed_at_once(write):
    with pytest.raises(UserError) as error:
        load_config(write(model={"hf_paht": "x"}, train={"steps": "many"}))
    for key in ("model.hf_path", "model.hf_paht", "train.steps"):
        assert key in str(error.value)


def test_missing_files_and_bad_yaml(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping of config sections, got list"):
        load_config(tmp_path / "list.yaml")


@pytest.mark.parametrize("override", ["rollout.top_p=0.9", "rollout.top_k=50"])
def test_another_models_scores_are_not_over_the_tokens_that_could_be_sampled(write, override):
    assert load_config(write(), [override]).rollout.truncates
    of_another = ["algorithm.name=opd", "teacher.hf_path=elsewhere", override]
    with pytest.raises(UserError, match=r"hf_path='elsewhere' needs rollout.top_p=1 and"):
        load_config(write(), of_another)


def test_servers_must_be_given_up_before_the_other_ranks_give_up_rank_zero(write):
    overrides = ["rollout.engine=sglang", "rollout.sglang.generate_timeout_seconds=1800"]
    with pytest.raises(UserError, match=r"generate_timeout_seconds=1800 must be below distr"):
        load_config(write(), overrides)
    load_config(write(), [*overrides, "distributed.timeout_seconds=1900"])
    load_config(write(), overrides[1:])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=embedded"], r"needs engine=sglang, not embedded"),
        (["rollout.sglang.urls=[http://x:1]"], r"needs sglang\.urls empty"),
        (["rollout.asynchronous.max_staleness=1"], r"needs asynchronous\.max_staleness=0"),
        (["weight_sync.transport=broadcast"], r"needs weight_sync\.transport=ipc or disk: nccl"),
    ],
)
def test_colocated_servers_need_an_arrangement_that_can_take_turns(write, overrides, message):
    colocated = ["rollout.engine=sglang", "rollout.colocated=true", "weight_sync.transport=ipc"]
    load_config(write(), colocated)
    with pytest.raises(UserError, match=message):
        load_config(write(), [*colocated, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("environment.sessions.agent=null", r"name=openai_sessions and sessions\.agent"),
        ("environment.sessions.agent=agent.py", r"sessions\.agent: .*pattern"),
        ("environment.name=calculator", r"go together, got name=calculator"),
        ("prompts.format_instruction=Think.", r"needs prompts\.system and .* empty"),
        ("prompts.system=Think.", r"the agent writes all messages"),
        ("rollout.asynchronous.max_staleness=1", r"max_staleness"),
    ],
)
def test_sessions_need_an_agent_that_writes_all_messages(write, override, message):
    sessions = ["environment.name=openai_sessions", "environment.sessions.agent=agent.py:run"]
    load_config(write(), [*sessions, "prompts.format_instruction=''"])
    with pytest.raises(UserError, match=message):
        load_config(write(), [*sessions, "prompts.format_instruction=''", override])
