"""Seconds of one training step, from counted operations and bytes and from assumed rates.

No overlap of communication with computation is assumed: the estimate is that of a run that has
none, and errs to the slow side otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.eight_bit import eight_bit_layers
from megatron_rlsd.parallel.layout import layers_of_stage
from megatron_rlsd.parallel.memory import RankParameters, rank_parameters, state_bytes
from megatron_rlsd.planning.activations import Kernels
from megatron_rlsd.planning.experts import ExpertLayer
from megatron_rlsd.planning.memory import cache_bytes_per_token, model_parameters
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.servers import Servers
from megatron_rlsd.planning.work import Lengths, StepTokens

TERA, GIGA = 1e12, 1e9
HASH_PASSES = 80
"""Times that hashing on a GPU reads or writes each byte: plain torch operations, some 20 for each
of two sums."""
DECODE_STRIDE = 32
"""Tokens that the model of decoding takes at once."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of the phases of one step, and the update's use of the GPUs' peak."""

    rollout: float | None
    """None: the configuration does not say how many GPUs serve."""
    score: float
    update: float
    weight_sync: float
    bubble: float
    """Share of the update that stages of the pipeline wait."""
    communication: float
    """Share of the update."""
    mfu: float
    """The update's model FLOP utilization: operations of one forward and one backward pass by the
    peak."""
    overlaps: bool = False
    """Asynchronous: the next rollout runs while this step trains."""

    @property
    def training(self) -> float:
        return self.score + self.update + self.weight_sync

    @property
    def total(self) -> float:
        rollout = self.rollout or 0.0
        return max(rollout, self.training) if self.overlaps else rollout + self.training


@dataclass(frozen=True)
class _Layers:
    """Operations of one token's forward pass."""

    products: float
    """Those of experts too."""
    attention: float
    experts: float


class StepTimer:
    """Estimates for one model, configuration and set of assumptions."""

    def __init__(
        self,
        config: Config,
        model: ModelDims,
        *,
        world_size: int,
        gpus_per_node: int,
        rates: Rates,
        lengths: Lengths,
        tokens: StepTokens,
        kernels: Kernels = "cuda",
        servers: Servers | None = None,
    ) -> None:
        self._config, self._model, self._rates = config, model, rates
        self._world, self._per_node = world_size, gpus_per_node
        self._lengths, self._tokens = lengths, tokens
        self._servers = servers
        self._parallel = config.parallel
        self._item = 2 if config.model.dtype == "bfloat16" else 4
        self._experts = ExpertLayer(model, config.parallel, self._item, kernels)
        self._replicas = world_size // (
            self._parallel.tensor * self._parallel.pipeline * self._parallel.context
        )

    def step(self, *, with_rollout: bool = True) -> StepTime:
        """``with_rollout`` False leaves out what no layout of the trainer changes."""
        tokens, peak = self._tokens, self._rates.peak_tflops * TERA * self._world
        compute, talk, bubble = self._passes(tokens.student, training=True)
        reduce = tokens.updates * (self.gradients() + self._optimizer())
        update = compute + talk + bubble + reduce
        operations = self.update_operations(
            tokens.student, tokens.responses, tokens.prompt + tokens.response
        )
        epochs = self._config.train.epochs_per_rollout
        return StepTime(
            rollout=self.rollout() if with_rollout else None,
            score=self._score(),
            update=epochs * (update - reduce) + reduce,
            weight_sync=self.weight_sync(),
            bubble=bubble / update,
            communication=(talk + reduce) / update,
            overlaps=self._config.rollout.asynchronous.max_staleness > 0,
            mfu=operations * epochs / peak / (epochs * (update - reduce) + reduce),
        )

    def update_operations(self, tokens: float, responses: float, length: float) -> float:
        """Floating-point operations of one forward and one backward pass over ``tokens`` tokens in
        sequences of ``length``; the head works on ``responses`` of them."""
        whole = self._forward(range(self._model.num_layers), length)
        return 3 * (tokens * (whole.products + whole.attention) + responses * self._head())

    def weight_sync(self) -> float:
        """Until every server has the weights; colocated also to move the optimizer's state away and
        back. Comparisons count with their share of a publication."""
        settings, rates = self._config.weight_sync, self._rates
        size = self._item * model_parameters(self._model, self._config)
        gather = self._gather_weights(size)
        if self._servers is None:
            return gather
        servers = self._servers.count
        to_host = size / (rates.pcie_gbs * GIGA)
        if settings.transport == "disk":
            # What was written is read once by each server, and by rank 0 to hash it.
            seconds = gather + (1 + servers) * size / (rates.disk_gbs * GIGA)
        else:
            # Every bucket goes to each server, or group of them, by itself, and to main memory,
            # while the next one is gathered: the slowest of the three counts.
            way, times = rates.nvlink_gbs, servers
            if settings.transport == "broadcast":
                nodes = math.ceil(servers / self._config.rollout.sglang.num_servers)
                way = rates.network_gbs
                times = {"server": servers, "node": nodes, "all": 1}[settings.broadcast_group]
            seconds = max(gather, to_host, times * size / (way * GIGA))
        if settings.verify_interval:
            seconds += self.verification() / settings.verify_interval
        if self._config.rollout.colocated:
            seconds += 2 * self._state() / (rates.pcie_gbs * GIGA)
        return seconds

    def verification(self) -> float:
        """The time of one comparison of all servers: hashing here; theirs is one pass over their
        memory."""
        size = self._item * model_parameters(self._model, self._config)
        seconds = HASH_PASSES * size / (self._rates.hbm_gbs * GIGA)
        if self._config.weight_sync.transport == "disk":
            seconds += size / (self._rates.disk_gbs * GIGA)
        return seconds

    def _gather_weights(self, size: float) -> float:
        """Until every rank has had whole tensors: shards from their stage, then from each rank that
        splits them."""
        parallel = self._parallel
        held = rank_parameters(self._model, type(parallel)(), 0)
        experts = size * held.experts / held.total
        spread = parallel.expert * parallel.expert_tensor_size
        seconds = 0.0
        for part, ranks in ((size - experts, parallel.tensor), (experts, spread)):
            if parallel.pipeline > 1:
                seconds += part / ranks / self._bandwidth(parallel.tensor * parallel.pipeline)
            seconds += (part * (ranks - 1) / ranks + part) / self._bandwidth(ranks)
        return seconds

    def rollout(self) -> float | None:
        """Until the last response ends; each engine decodes what fits it at once."""
        settings = self._config.rollout
        if self._servers is None:
            engines, gpus, at_once = self._world, 1, settings.embedded.max_batch_size
        elif self._servers.beside is None:
            return None
        else:
            engines, gpus = self._servers.count, self._servers.tensor_parallel
            at_once = settings.sglang.max_in_flight
        count = math.ceil(self._tokens.trajectories / engines)
        waiting = self._lengths.responses(settings.max_response_tokens, count)
        return self._decode(waiting, gpus, at_once) + self._prefill(count, gpus)

    def _decode(self, waiting: list[int], gpus: int, at_once: int) -> float:
        rates = self._rates
        bandwidth = gpus * rates.hbm_gbs * GIGA * rates.hbm_efficiency
        cache = cache_bytes_per_token(self._model, self._item)
        whole = self._item * model_parameters(self._model, self._config)
        seconds, running = 0.0, [[n, n] for n in waiting[-at_once:]]
        waiting = waiting[: -len(running)]
        while running:
            held = sum(total - left + self._lengths.prompt for left, total in running)
            step = self._read_share(len(running)) * whole + held * cache
            tokens = min(DECODE_STRIDE, max(left for left, _ in running))
            seconds += tokens * (step / bandwidth + rates.decode_overhead_ms / 1000)
            running = [[left - tokens, total] for left, total in running if left > tokens]
            while waiting and len(running) < at_once:
                running.append([waiting[-1], waiting[-1]])
                waiting.pop()
        return seconds

    def _read_share(self, batch: int) -> float:
        """The share of the weights that a decoding step reads: not the experts that no token
        chose."""
        model = self._model
        if not model.moe_layers:
            return 1.0
        one = 1 - model.experts_per_token / model.num_experts
        held = rank_parameters(model, type(self._parallel)(), 0)
        return (held.dense + held.experts * (1 - one**batch)) / held.total

    def _prefill(self, count: int, gpus: int) -> float:
        forward = self._forward(range(self._model.num_layers), self._tokens.prompt)
        distinct = count / self._config.rollout.n_samples_per_prompt
        operations = distinct * self._tokens.prompt * (forward.products + forward.attention)
        return operations / (gpus * self._rates.peak_tflops * TERA * 0.5)

    def _score(self) -> float:
        """Passes without gradients: teacher, old policy, reference; copies of snapshots."""
        config, seconds = self._config, 0.0
        if config.algorithm.rlsd_lambda:
            prompts = 1 + config.further_prompts
            seconds += sum(self._passes(prompts * self._tokens.teacher, training=False))
            if config.teacher.mode != "live":
                seconds += self._copy_weights()
        by_trainer = config.algorithm.off_policy.old_log_probs == "trainer"
        if (self._tokens.updates > 1 and by_trainer) or config.rollout.truncates:
            seconds += sum(self._passes(self._tokens.student, training=False))
        if config.algorithm.kl_coef:
            seconds += sum(self._passes(self._tokens.student, training=False))
            seconds += self._copy_weights()
        return seconds

    def _copy_weights(self) -> float:
        """A snapshot and the parameters change places, and change back: three or four copies, two
        at a time in opposite directions."""
        held = max(self._held(stage).total for stage in range(self._parallel.pipeline))
        return 2 * held * self._item / (self._rates.pcie_gbs * GIGA)

    def _passes(self, tokens: float, *, training: bool) -> tuple[float, float, float]:
        """Computing, communicating and waiting, in seconds, of one pass over ``tokens``."""
        parallel = self._parallel
        per_replica = tokens / self._replicas
        count = max(1.0, per_replica / self._config.train.max_tokens_per_microbatch)
        batches = math.ceil(count / self._tokens.updates) * self._tokens.updates
        if not training:
            batches = math.ceil(count)
        stages = range(parallel.pipeline)
        compute = max(self._compute(stage, per_replica, batches, training) for stage in stages)
        talk = max(self._talk(stage, per_replica, training) for stage in stages)
        updates = self._tokens.updates if training else 1
        waits = updates * (parallel.pipeline - 1) / parallel.virtual_pipeline / batches
        return compute, talk, waits * (compute + talk)

    def _compute(self, stage: int, tokens: float, batches: int, training: bool) -> float:
        rates, parallel = self._rates, self._parallel
        layers = layers_of_stage(parallel, self._model.num_layers, stage)
        length = self._tokens.prompt + self._tokens.response
        forward = self._forward(layers, length)
        precision = self._config.model.precision
        eight_bit = eight_bit_layers(precision, self._model.num_layers, layers)
        # A faster product counts as fewer operations.
        faster = self._forward(eight_bit, length)
        saved = (faster.products - faster.experts) * (1 - 1 / rates.fp8_gain)
        products, attention = (3.0, 3.0) if training else (1.0, 1.0)
        settings = self._config.model
        if training and settings.recompute == "full":
            products, attention = products + 1, attention + 1
        elif training and settings.recompute == "selective":
            attention += "core_attn" in settings.recompute_modules
            products += 0.6 * bool({"mlp", "moe"} & set(settings.recompute_modules))
        others = forward.products - forward.experts - saved
        seconds = products * others / rates.product_efficiency
        seconds += attention * forward.attention / rates.attention_efficiency
        seconds *= tokens
        if stage == parallel.pipeline - 1:
            share = self._tokens.responses / max(1.0, self._tokens.student)
            head = tokens * share * self._head() * (3 if training else 1)
            seconds += head / rates.product_efficiency
        seconds /= parallel.tensor * parallel.context * rates.peak_tflops * TERA
        for layer in self._model.moe_layers.intersection(layers):
            gain = rates.fp8_gain if layer in eight_bit else 1.0
            once = self._experts.pass_seconds(tokens / batches, rates, gain)
            seconds += products * batches * once
        return seconds

    def _talk(self, stage: int, tokens: float, training: bool) -> float:
        """Collectives within the layers, and messages between stages."""
        model, parallel = self._model, self._parallel
        tp, cp, ep = parallel.tensor, parallel.context, parallel.expert
        layers = layers_of_stage(parallel, model.num_layers, stage)
        directions = 2 if training else 1
        if training and self._config.model.recompute == "full":
            directions += 1
        hidden = self._item * tokens / cp * model.hidden_size
        moe = len(model.moe_layers.intersection(layers))
        seconds = 0.0
        if tp > 1:
            # Gather before and scatter after attention, and the same of a feed-forward part that
            # all tokens meet.
            parts = 2 * len(layers) - (0 if model.shared_expert_ffn_size else moe)
            each = 2 * (tp - 1) / tp * hidden
            seconds += parts * directions * each / self._bandwidth(tp)
        if cp > 1:
            keys = self._item * tokens * 2 * model.num_query_groups * model.head_dim / tp
            seconds += len(layers) * directions * (cp - 1) / cp * keys / self._bandwidth(tp * cp)
        if moe:
            split = parallel.expert_tensor_size
            between, within = self._experts.exchanged(tokens)
            exchange = between / self._bandwidth(max(tp, ep * split))
            seconds += moe * directions * (exchange + within / self._bandwidth(split))
        if parallel.pipeline > 1:
            messages = directions * parallel.virtual_pipeline * hidden / tp
            seconds += messages / self._bandwidth(self._world)
        return seconds

    def gradients(self) -> float:
        """Seconds to add up float32 gradients over the ranks that hold the same parameters; with
        the distributed optimizer weights come back."""
        # A gather of weights in place of the second half of an all-reduce.
        each = 4 + (self._item if self._config.optimizer.distributed else 4)
        stage = self._world // self._parallel.pipeline
        dense = stage // self._parallel.tensor
        experts = stage // (self._parallel.expert * self._parallel.expert_tensor_size)
        size = max(
            (dense - 1) / dense * held.dense + (experts - 1) / experts * held.experts
            for held in map(self._held, range(self._parallel.pipeline))
        )
        return size * each / self._bandwidth(self._world)

    def _optimizer(self) -> float:
        """Reads and writes all of the state once, and gradients."""
        return self._state() * (2 * 12 + 4 + 4) / 12 / (self._rates.hbm_gbs * GIGA)

    def _state(self) -> float:
        """Bytes of a rank's float32 masters and moments."""
        return max(
            state_bytes(
                self._model,
                self._parallel,
                world_size=self._world,
                stage=stage,
                dtype=self._config.model.dtype,
                distributed_optimizer=self._config.optimizer.distributed,
            ).optimizer
            for stage in range(self._parallel.pipeline)
        )

    def _held(self, stage: int) -> RankParameters:
        return rank_parameters(self._model, self._parallel, stage)

    def _bandwidth(self, ranks: int) -> float:
        """Bytes per second between ``ranks`` neighbours: NVLink while they are in one machine."""
        inside = ranks <= self._per_node
        return (self._rates.nvlink_gbs if inside else self._rates.network_gbs) * GIGA

    def _head(self) -> float:
        return 2.0 * self._model.vocab_size * self._model.hidden_size

    def _forward(self, layers: range | list[int], length: float) -> _Layers:
        """Operations of one token in these layers: two for each parameter that it meets."""
        model = self._model
        outer = 2 * model.vocab_size * model.hidden_size
        held = rank_parameters(model, type(self._parallel)(), 0)
        tied = model.vocab_size * model.hidden_size if model.tied_embeddings else outer
        moe = len(model.moe_layers)
        expert = 3 * model.hidden_size * model.expert_ffn_size
        dense_width = 3 * model.hidden_size * model.ffn_hidden_size
        rest = held.dense - tied - (model.num_layers - moe) * dense_width
        each = rest / model.num_layers
        routed = len(model.moe_layers.intersection(layers))
        experts = routed * model.experts_per_token * expert
        parameters = len(layers) * each + experts + (len(layers) - routed) * dense_width
        heads = model.num_attention_heads
        latent = model.latent
        channels = (
            latent.nope_head_dim + latent.rope_head_dim + latent.value_head_dim
            if latent
            else 2 * model.head_dim
        )
        # Two products over the half of the keys that a causal mask leaves.
        return _Layers(2 * parameters, len(layers) * heads * channels * length, 2 * experts)
