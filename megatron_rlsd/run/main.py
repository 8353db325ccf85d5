"""The command line of the programs: the configuration, the exit code, and errors told once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from megatron_rlsd.checkpoint.manifest import CheckpointError
from megatron_rlsd.config import Config, ConfigError, load_config
from megatron_rlsd.data import DataError, TokenizerError
from megatron_rlsd.environments import EpisodeError
from megatron_rlsd.experience import ExperienceError
from megatron_rlsd.hf_bridge import HFBridgeError
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.recovery.recording import BadStepsError, RecordingError
from megatron_rlsd.rewards import RewardError
from megatron_rlsd.rollout.engine import EngineError
from megatron_rlsd.runtime.lifecycle import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    LostRankError,
    Preempted,
    stop_with_launcher,
    write_status,
)
from megatron_rlsd.runtime.machine import PlatformError
from megatron_rlsd.teacher.external import ExternalTeacherError
from megatron_rlsd.weight_sync import WeightSyncError

USER_ERRORS = (
    BadStepsError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    EpisodeError,
    ExperienceError,
    ExternalTeacherError,
    HFBridgeError,
    LayoutError,
    PlatformError,
    RecordingError,
    RewardError,
    TokenizerError,
    WeightSyncError,
)
"""What a user can mend: reported by message, without a traceback."""


def main(command: Callable[[Config], None], argv: list[str], usage: str) -> int:
    """Parse ``CONFIG.yaml [key=value ...]`` and run; a user's mistake is told in one message."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    try:
        config = load_config(argv[0], argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    stop_with_launcher()
    write_status(config.run_dir, None)
    status, code, message = "finished", 0, ""
    try:
        command(config)
    except Preempted as stop:
        status, code, message = "preempted", EXIT_PREEMPTED, str(stop)
        print(f"{message}; exit code {code}", file=sys.stderr)
    except USER_ERRORS as error:
        status, code, message = "failed", EXIT_USER_ERROR, f"error: {error}"
        print(message, file=sys.stderr)
    except Exception as error:
        code = EXIT_LOST_RANK if isinstance(error, LostRankError) else EXIT_FAILED
        status, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write_status(config.run_dir, status, code, message)
    return code
