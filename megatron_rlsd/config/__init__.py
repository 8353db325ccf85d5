"""Configuration: one model per component, YAML plus ``key=value``; unknown keys are refused."""

from megatron_rlsd.config.alarms import AlarmsConfig
from megatron_rlsd.config.command_line import config_parser
from megatron_rlsd.config.data import (
    ColumnsConfig,
    CurriculumConfig,
    DataConfig,
    FileSource,
    GuessingGameSource,
    HfSource,
    JsonlSource,
    ParquetSource,
    PromptConfig,
    ReasoningGymSource,
    Source,
)
from megatron_rlsd.config.environment import SESSIONS, EnvironmentConfig, SessionsConfig
from megatron_rlsd.config.loading import dump_config, flattened, load_config, parse_config
from megatron_rlsd.config.model import (
    Fusion,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    TokenizerConfig,
)
from megatron_rlsd.config.operation import (
    CheckpointConfig,
    DistributedConfig,
    MlflowConfig,
    ObservabilityConfig,
    WandbConfig,
)
from megatron_rlsd.config.reward import (
    HttpRewardConfig,
    RewardConfig,
    RewardFunctionConfig,
    RewardServerConfig,
)
from megatron_rlsd.config.rollout import (
    AsynchronousConfig,
    EmbeddedEngineConfig,
    RolloutConfig,
    SGLangConfig,
    WeightSyncConfig,
)
from megatron_rlsd.config.root import Config
from megatron_rlsd.config.section import Section
from megatron_rlsd.config.training import (
    AlgorithmConfig,
    EvalConfig,
    OptimizerConfig,
    SFTConfig,
    TeacherConfig,
    TeacherServerConfig,
    TrainConfig,
)

__all__ = [
    "SESSIONS",
    "AlarmsConfig",
    "AlgorithmConfig",
    "AsynchronousConfig",
    "CheckpointConfig",
    "ColumnsConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "DistributedConfig",
    "EmbeddedEngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "FileSource",
    "Fusion",
    "GuessingGameSource",
    "HfSource",
    "HttpRewardConfig",
    "JsonlSource",
    "MlflowConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParquetSource",
    "PrecisionConfig",
    "PromptConfig",
    "ReasoningGymSource",
    "RewardConfig",
    "RewardFunctionConfig",
    "RewardServerConfig",
    "RolloutConfig",
    "SFTConfig",
    "SGLangConfig",
    "Section",
    "SessionsConfig",
    "Source",
    "TeacherConfig",
    "TeacherServerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "WandbConfig",
    "WeightSyncConfig",
    "config_parser",
    "dump_config",
    "flattened",
    "load_config",
    "parse_config",
]
