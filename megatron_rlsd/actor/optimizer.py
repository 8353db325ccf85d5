"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule for the actor."""

from __future__ import annotations

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlsd.actor.model import HeadGPTModel
from megatron_rlsd.config import OptimizerConfig
from megatron_rlsd.hf_bridge.quantized import is_quantized
from megatron_rlsd.parallel.groups import ParallelGroups


def wrap_data_parallel(
    chunks: list[HeadGPTModel],
    config: TransformerConfig,
    optimizer: OptimizerConfig,
    groups: ParallelGroups,
) -> list[DistributedDataParallel]:
    """Gradients summed in float32 over data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        bucket_size=optimizer.bucket_parameters,
        fp8_param_gather=any(is_quantized(p) for chunk in chunks for p in chunk.parameters()),
    )
    wrapped = [
        DistributedDataParallel(
            config,
            ddp_config,
            Float16Module(config, chunk) if config.bf16 else chunk,
            pg_collection=groups.megatron,
            # Only the chunk whose backward pass comes last leaves time to hide communication in.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    if optimizer.overlap_grad_reduce:
        # The schedule enters it for all micro-batches but the last one.
        functions = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = functions[0] if len(functions) == 1 else functions
    return wrapped


def build_optimizer(
    model: list[DistributedDataParallel],
    config: TransformerConfig,
    settings: OptimizerConfig,
    total_updates: int,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW (norm weights and biases not decayed, as Megatron does) and its schedule.

    Update k (from 0) runs at the schedule's value for k + 1, so that a warm-up over W updates
    starts at lr / W, reaches lr at update W - 1, and no update is spent at a rate of 0.
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=settings.distributed,
            overlap_param_gather=settings.overlap_param_gather,
            fp8_recipe=config.fp8_recipe if config.fp8_param else None,
        ),
        model,
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=min(settings.min_lr, settings.lr),
        lr_warmup_steps=settings.lr_warmup_steps,
        lr_decay_steps=max(total_updates, settings.lr_warmup_steps + 1),
        lr_decay_style=settings.lr_schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(increment=1)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return optimizer, scheduler


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next update."""
    return max(group["lr"] for group in optimizer.param_groups)


def named_parameters(chunks: list[HeadGPTModel]) -> dict[str, torch.nn.Parameter]:
    """Every parameter of this rank, the chunk number in front of Megatron's name."""
    return {
        f"{number}.{name}": parameter
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
