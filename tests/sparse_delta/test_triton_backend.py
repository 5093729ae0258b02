"""The Triton kernels: compiled for an H100 without one, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dowser_peft import bitmask
from dowser_peft.sparse_delta import scatter_delta, sparse_delta_linear

ROOT = Path(__file__).parents[2]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def compiled(kernel: Any, signature: dict[str, Any], constants: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # pointers and sizes of an ordinary layer: multiples of 16, which a launch finds out by itself
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if isinstance(kind, str)
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


MATRIX = {"mask_bytes": "i32", "columns": "i32", "stride_row": "i32", "stride_column": "i32"}


@pytest.mark.parametrize("contiguous", [True, False])
def test_kernels_compile_for_an_h100(contiguous: bool) -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    code = f"from {__name__} import check_compiled; check_compiled({contiguous})"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def check_compiled(contiguous: bool) -> None:
    from dowser_peft.sparse_delta.triton_backend import CHUNK, _count_kernel, _gather_kernel, _scatter_kernel

    constants = {"CONTIGUOUS": contiguous, "BYTES": CHUNK // 8}
    lists = {"masks": ("*u8",) * 2, "offsets": ("*i64",) * 2, "values": ("*fp32", "*bf16"), "sizes": ("i32",) * 2}
    scatter = compiled(
        _scatter_kernel,
        {"weight": "*bf16", "out": "*bf16", **lists, "numel": "i64", **MATRIX},
        {"DELTAS": 2, **constants},
    )
    pointers = {"dense": "*bf16", "values": "*fp32", "mask": "*u8", "offsets": "*i64"}
    gather = compiled(_gather_kernel, {**pointers, "size": "i32", "numel": "i64", **MATRIX}, constants)
    count = compiled(_count_kernel, {"mask": "*u8", "counts": "*i32", "mask_bytes": "i32"}, {"BYTES": CHUNK // 8})
    for kernel in (scatter, gather, count):
        assert kernel.asm["cubin"] and ".local" not in kernel.asm["ptx"]
    if contiguous:  # eight bfloat16 weights of a thread at once
        assert "ld.global.v4.b32" in scatter.asm["ptx"] and "st.global.v4.b32" in scatter.asm["ptx"]
        assert "ld.global.v4.b32" in gather.asm["ptx"]


def large_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(11008, 4096, device="cuda", dtype=dtype)
    mask = torch.rand(weight.numel(), device="cuda") < 0.1
    return weight, bitmask.pack(mask), 0.01 * torch.randn(int(mask.sum()), device="cuda")


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_layer_and_its_memory(dtype: torch.dtype) -> None:
    weight, mask, values = large_case(dtype)
    expected = scatter_delta(weight, [mask], [values], backend="torch")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = scatter_delta(weight, [mask], [values])
    assert torch.equal(result, expected)
    assert torch.cuda.max_memory_allocated() - before < 2 * weight.nbytes + (4 << 20)  # result and == of the assert


@pytest.mark.gpu
@NEEDS_CUDA
def test_nothing_waits_for_the_gpu_and_a_captured_step_follows_the_mask() -> None:
    weight, mask, values = large_case(torch.bfloat16)
    values.requires_grad_()
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    other = bitmask.pack(bitmask.unpack(mask, weight.numel()).flip(0))

    def step() -> tuple[torch.Tensor, ...]:
        y = sparse_delta_linear(x, weight, None, [mask], [values])
        return y, *torch.autograd.grad(y.float().square().sum(), (x, values))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, expected)
        mask.copy_(other)
