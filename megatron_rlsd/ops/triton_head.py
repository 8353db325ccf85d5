"""The fused head on Triton: NVIDIA GPUs from compute capability 8.0 on, float16 to float32.

Shapes: as in ``chunks``, and B vocabulary blocks.

A chunk takes one product whose epilogue leaves softmax sums by vocabulary block and, where a
gradient is wanted, E = exp(z - block maximum) in the inputs' dtype; then, with the row's softmax
over all ranks known, a kernel that turns E into dz in place; then two library products,
d_hidden = dz W and d_weight += dz^T h, which read operands of the inputs' dtype and add in float32.
The weight is never copied, and no logit is stored.

Other ways to the same result: logits of a library product in float32, turned into E by a pass of
their own, take 1.3 times as long (docs/fused_head.md); logits in bfloat16 are wrong by 1e-2. With
exp(z - z_target) in the place of E the second kernel would go, but rows whose target is unlikely
would need an answer.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_rlsd.ops.collectives import LogSoftmax
from megatron_rlsd.ops.head import HeadInputs
from megatron_rlsd.runtime.rounding import round_up

EXP_BUDGET_BYTES = 5 * 2**28
"""Memory of E where chunk_tokens is not given. Each chunk reads and writes all of d_weight, so more
memory is less time: at V 151936 in bfloat16 this is 4,352 rows."""
SUMS_BUDGET_BYTES = 2**27
"""Memory of a chunk's block sums and of its rows' copy where nothing but sums is kept."""
ROWS_ALIGNMENT = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT16_PEAK = 2.0**14
"""What the largest possible dz is scaled to in float16, whose smallest number is 6e-8."""
FLOAT16_BLOCK_BYTES = 2**26
"""Memory of a product that is scaled before it is added to d_weight."""


def unavailable_reason(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why this backend cannot run, as the end of a sentence; None if it can.

    On a CPU it can where TRITON_INTERPRET was set before triton was imported. That is for tests:
    ``auto`` should not choose it there.

    Args:
        device: of the tensors.
        dtype: the widest of the inputs; None: not asked about.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    from megatron_rlsd.ops.triton_launch import INTERPRETED

    if dtype is not None and dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type} (or with TRITON_INTERPRET=1)"
    if torch.version.cuda is None:
        return "it has been written for NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    return _missing_product(device)


@cache
def _missing_product(device: torch.device) -> str | None:
    """Why torch does not add products of bfloat16 matrices to a float32 one; None: it does.

    Tried and not told from the release: builds between releases bear the number of the next one.
    """
    a, b = (torch.ones(shape, dtype=torch.bfloat16, device=device) for shape in ((1, 8), (8, 1)))
    total = torch.ones(1, 1, device=device)
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        total += torch.mm(a, b, out_dtype=torch.float32)
        found = total.item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        return (
            f"torch {torch.__version__} does not add a product of bfloat16 matrices to a float32 "
            f"one in place, as releases from 2.10 on do: {reason}"
        )
    if found != 17.0:
        return f"torch {torch.__version__} adds products of bfloat16 matrices wrongly"
    return None


class TritonChunk:
    """Implements ``chunks.Chunk``.

    Products of float32 inputs that make gradients follow torch's own TF32 setting; those that make
    log-probabilities never use TF32.
    """

    def __init__(self, inputs: HeadInputs) -> None:
        self.inputs = inputs
        # Here, since triton may be missing where only unavailable_reason is asked for.
        from megatron_rlsd.ops import triton_launch

        self._launch = triton_launch
        self.dtype = inputs.widest_dtype
        # Converted only where hidden is of a wider dtype.
        weight = inputs.shard.weight[: inputs.shard.num_real].to(self.dtype)
        self.weight_VD = weight if weight.stride(1) == 1 else weight.contiguous()
        self._hidden_CD = self._exp_CV = self.weight_VD.new_empty(0, 0)
        self._target_ids_C = self._partials_BKC = self.weight_VD.new_empty(0)

    def chunk_rows(self, n: int, *, with_gradient: bool) -> int:
        """Makes chunks of about equal size."""
        chunks = -(-n // self._rows_in_budget(with_gradient))
        return round_up(-(-n // max(chunks, 1)), ROWS_ALIGNMENT)

    def forward(self, rows_C: Tensor, *, keep: bool) -> Tensor:
        inputs, (V, _) = self.inputs, self.weight_VD.shape
        self._hidden_CD = inputs.hidden[rows_C].to(self.dtype)
        target_C = inputs.targets[rows_C] - inputs.shard.first
        is_own = (target_C >= 0) & (target_C < V)
        self._target_ids_C = torch.where(is_own, target_C, -1).to(torch.int32)
        C = rows_C.numel()
        if keep and self._exp_CV.shape[0] < C:
            self._exp_CV = self._launch.new_exp_buffer(C, V, self._hidden_CD)
        self._partials_BKC = self._launch.launch_product(
            self._hidden_CD,
            self.weight_VD,
            self._target_ids_C,
            scale=1 / inputs.temperature,
            softcap=inputs.softcap,
            with_entropy=inputs.with_entropy,
            exp_CV=self._exp_CV[:C] if keep else None,
        )
        return self._launch.launch_merge(self._partials_BKC)

    def backward(
        self,
        softmax: LogSoftmax,
        g_C: Tensor,
        e_C: Tensor | None,
        d_hidden_CD: Tensor | None,
        d_weight_VD: Tensor | None,
    ) -> None:
        scale = 1 / self.inputs.temperature
        gain_1 = None
        if self.dtype == torch.float16:
            gain_1 = FLOAT16_PEAK / (scale * _bound(softmax, g_C, e_C)).clamp(min=1e-30)
        d_logits_CV = self._exp_CV[: g_C.numel()]
        self._launch.launch_exp_to_gradient(
            d_logits_CV,
            self._partials_BKC,
            self._target_ids_C,
            log_probs_C=softmax.log_probs,
            max_logits_C=softmax.max_logit,
            log_sums_C=softmax.log_sum,
            d_log_probs_C=g_C.float().contiguous(),
            d_entropies_C=None if e_C is None else e_C.float().contiguous(),
            entropies_C=None if e_C is None else softmax.entropy,
            gain_1=gain_1,
            scale=scale,
            softcap=self.inputs.softcap,
        )
        if d_hidden_CD is not None:
            if gain_1 is None and d_hidden_CD.is_cuda and d_hidden_CD.dtype == self.dtype:
                torch.mm(d_logits_CV, self.weight_VD, out=d_hidden_CD)
            else:
                product_CD = _float32_product(d_logits_CV, self.weight_VD)
                d_hidden_CD.copy_(product_CD if gain_1 is None else product_CD.div_(gain_1))
        if d_weight_VD is not None and gain_1 is None:
            _add_product(d_weight_VD, d_logits_CV.T, self._hidden_CD)
        elif d_weight_VD is not None and gain_1 is not None:
            _add_scaled_product(d_weight_VD, d_logits_CV.T, self._hidden_CD, 1 / gain_1)

    def _rows_in_budget(self, with_gradient: bool) -> int:
        # Padding rows of the vocabulary count as well, so that it is as many on every rank.
        V_local, D = self.inputs.shard.weight.shape
        if with_gradient:
            size = EXP_BUDGET_BYTES // (V_local * self.dtype.itemsize)
        else:
            sums = 4 * (5 + 2 * self.inputs.with_entropy) * self._launch.vocab_blocks(V_local)
            size = SUMS_BUDGET_BYTES // (sums + D * self.dtype.itemsize)
        return size // ROWS_ALIGNMENT * ROWS_ALIGNMENT or max(size, 1)


def _bound(softmax: LogSoftmax, g_C: Tensor, e_C: Tensor | None) -> Tensor:
    """[1], at least the largest |dz| of the rows at temperature 1: |p (log p + H)| < 1 + H."""
    bound_C = g_C.abs()
    if e_C is not None:
        bound_C = bound_C + e_C.abs() * (1 + softmax.entropy)
    return bound_C.amax(0, keepdim=True)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, from operands of one float dtype."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # the interpreter's device has no such product


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in place, without a second buffer of total's size."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _add_scaled_product(total: Tensor, a: Tensor, b: Tensor, factor_1: Tensor) -> None:
    """total += factor a b, block by block, with a factor that stays on the device."""
    rows = max(FLOAT16_BLOCK_BYTES // (total.shape[1] * total.itemsize), 1)
    for first in range(0, total.shape[0], rows):
        block = total[first : first + rows]
        block.addcmul_(_float32_product(a[first : first + rows], b), factor_1)
