"""What a run tells: metrics.jsonl, TensorBoard, samples, progress on the terminal, a summary."""

from megatron_rlsd.observability.logger import MetricsLogger
from megatron_rlsd.observability.metrics_file import read_metrics

__all__ = ["MetricsLogger", "read_metrics"]
