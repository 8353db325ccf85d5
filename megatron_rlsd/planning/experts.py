"""What a layer's experts cost that does not follow from their operations.

Two sizes spread experts over ranks: expert parallelism, which gives each rank some of them, and
expert tensor parallelism, which splits each one. Split experts need every row on every rank of
their group, and their products get narrow; many whole experts on a rank get few rows each. Both
show in the time of what reads and writes memory, and of what starts kernels, not in operations.

H hidden size, F feed-forward rows of an expert, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.planning.activations import Kernels
from megatron_rlsd.planning.rates import Rates

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer on one rank."""

    model: ModelDims
    parallel: ParallelConfig
    item: int
    """Bytes of a number."""
    kernels: Kernels

    @property
    def held(self) -> int:
        """Experts of which this rank has all or a part."""
        return self.model.num_experts // self.parallel.expert

    def products(self, tokens: float) -> float:
        """Operations of one pass over ``tokens``, those of one replica."""
        return 2.0 * self._rows(tokens) * 3 * self.model.hidden_size * self._width

    def pass_seconds(self, tokens: float, rates: Rates, gain: float = 1.0) -> float:
        """Return the seconds of one forward pass over ``tokens``, those of one micro-batch of a
        replica: the longer of computing and of moving weights and rows through memory, and the
        start of every expert.

        gain: how much faster than in bfloat16 products compute.
        """
        hidden, rows = self.model.hidden_size, self._rows(tokens)
        speed = gain * rates.peak_tflops * TERA * rates.product_efficiency
        compute = self.products(tokens) / speed
        weights = self.held * 3 * hidden * self._width
        # Read and written: the input, gate and up, their product, the result.
        moved = rows * (2 * hidden + 5 * self._width)
        memory = self.item * (weights + moved) / (rates.hbm_gbs * GIGA)
        # Transformer Engine's grouped products start all experts of a layer at once.
        starts = 1 if self.kernels == "transformer_engine" else self.held
        return max(compute, memory) + starts * rates.expert_start_us / 1e6

    def exchanged(self, tokens: float) -> tuple[float, float]:
        """Bytes that a rank gets in one pass over ``tokens`` of a replica: between the groups that
        hold different experts, and within a group that splits them. There and back."""
        hidden = self.item * self._own(tokens) * self.model.hidden_size
        routed = hidden * self.model.experts_per_token
        experts, split = self.parallel.expert, self.parallel.expert_tensor_size
        return 2 * (experts - 1) / experts * routed, 2 * (split - 1) * routed

    def _own(self, tokens: float) -> float:
        """Tokens of a rank: experts take what sequence parallelism splits."""
        return tokens / (self.parallel.tensor * self.parallel.context)

    def _rows(self, tokens: float) -> float:
        """Rows that this rank's experts get in all if every expert gets as many."""
        split = self.parallel.expert_tensor_size
        return self._own(tokens) * self.model.experts_per_token * split

    @property
    def _width(self) -> float:
        return self.model.expert_ffn_size / self.parallel.expert_tensor_size
