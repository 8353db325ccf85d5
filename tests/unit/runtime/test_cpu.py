"""Each patch of runtime/cpu does what it is there for, and touches nothing outside Megatron."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

from megatron_rlsd.runtime import cpu, machine, megatron_versions
from megatron_rlsd.runtime.errors import UserError

machine.enable_megatron()

from megatron.core import jit  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402

needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU layer stays away on a CUDA machine"
)


def inside_megatron(code: str, **names):
    """Evaluate an expression as if it stood in a megatron.core module."""
    scope = {"__name__": "megatron.core.some_module", "torch": megatron_random.torch, **names}
    return eval(code, scope)


@needs_no_cuda
@pytest.mark.parametrize(
    "factory",
    [
        "zeros(2, device='cuda')",
        "ones(2, device=torch.cuda.current_device())",
        "empty(2, device='cuda', pin_memory=True)",
        "tensor([1, 2], device='cuda:0')",
        "arange(2, device='cuda')",
        "full((2,), 3.0, device='cuda')",
        "empty_like(torch.zeros(2), device='cuda')",
        "zeros_like(torch.zeros(2), device='cuda')",
        "ones_like(torch.zeros(2), device='cuda')",
        "full_like(torch.zeros(2), 1.0, device='cuda')",
        "rand(2, device='cuda')",
        "randn(2, device='cuda')",
        "eye(2, device='cuda')",
    ],
)
def test_factories_map_cuda_to_cpu(factory):
    assert inside_megatron(f"torch.{factory}").device.type == "cpu"


@needs_no_cuda
def test_streams_and_events_are_no_operations():
    inside_megatron("torch.cuda.Stream()").wait_stream(inside_megatron("torch.cuda.Stream()"))
    assert inside_megatron("torch.cuda.Event()").query()
    assert inside_megatron("torch.cuda.synchronize()") is None
    with inside_megatron("torch.cuda.stream(torch.cuda.current_stream())"):
        pass


@needs_no_cuda
def test_tensor_methods_answer_only_megatron():
    x = torch.zeros(2)
    assert inside_megatron("x.cuda()", x=x) is x
    assert inside_megatron("x.type()", x=x) == "torch.cuda.FloatTensor"
    assert inside_megatron("x.bfloat16().type()", x=x) == "torch.cuda.BFloat16Tensor"
    assert x.type() == "torch.FloatTensor"
    assert x.type(torch.float64).dtype == torch.float64
    with pytest.raises((RuntimeError, AssertionError)):
        x.cuda()


@needs_no_cuda
def test_rng_tracker_isolates_its_streams():
    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    expected_outside = torch.rand(4)
    torch.manual_seed(1)
    tracker.add("inner", 77)
    with tracker.fork("inner"):
        first = torch.rand(4)
    outside = torch.rand(4)
    with tracker.fork("inner"):
        second = torch.rand(4)
    generator = torch.Generator().manual_seed(77)
    assert torch.equal(first, torch.rand(4, generator=generator))
    assert torch.equal(second, torch.rand(4, generator=generator))
    assert torch.equal(outside, expected_outside)


@needs_no_cuda
def test_recompute_without_output_asks_for_no_fp8():
    assert megatron_random.CheckpointWithoutOutput().fp8 is False


@needs_no_cuda
def test_moe_counts_become_arrays():
    counts = moe_utils.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True)
    assert isinstance(counts, np.ndarray)
    assert counts.tolist() == [3, 1]
    assert moe_utils.maybe_move_tensor_to_cpu(None, as_numpy=True) is None
    assert moe_utils.te_general_gemm is None


@needs_no_cuda
def test_fused_helpers_are_not_compiled():
    def function(x):
        return x

    assert jit.jit_fuser(function) is function


def test_torch_itself_is_untouched():
    assert torch.zeros is not megatron_random.torch.zeros or torch.cuda.is_available()
    assert torch.cuda.Stream.__module__.startswith("torch")


@needs_no_cuda
def test_a_patch_without_its_target_raises():
    with pytest.raises(RuntimeError, match="jit_fuser"):
        cpu.PATCHES["megatron.core.jit"]({"__name__": "megatron.core.jit"})


@pytest.mark.process
@needs_no_cuda
def test_installing_after_megatron_is_refused():
    code = (
        "import sys, types\n"
        "sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "from megatron_rlsd.runtime.machine import enable_megatron\n"
        "enable_megatron()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "was imported before" in ended.stderr


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.20.0", "1.0.0rc1"])
def test_unsupported_megatron_is_named(monkeypatch, version):
    monkeypatch.setattr(megatron_versions, "version", lambda name: version)
    with pytest.raises(UserError, match=rf"{version}.*expected >= 0.16.1, < 0.20.0"):
        megatron_versions.check_megatron_version()


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.19.2", "0.19.0rc3"])
def test_supported_megatron_passes(monkeypatch, version):
    monkeypatch.setattr(megatron_versions, "version", lambda name: version)
    megatron_versions.check_megatron_version()


def test_missing_megatron_is_named(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(megatron_versions, "version", absent)
    with pytest.raises(UserError, match="not installed"):
        megatron_versions.check_megatron_version()
