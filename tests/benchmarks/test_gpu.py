"""The parts of ``bench gpu`` that need no GPU, and the whole of its parity check interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference_pio.benchmarks import gpu
from inference_pio.benchmarks.gpu_parity import (
    Checked,
    Sizes,
    check_all,
    parity_rows,
    require_parity,
)
from inference_pio.kernels.torch_ops import TorchKernels
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.model.config import ModelConfig

SMALL = Sizes(
    hidden=24,
    inner=40,
    num_heads=2,
    kv_heads=1,
    head_dim=16,
    block_size=16,
    lengths=((20, 1), (3, 1), (0, 5), (9, 4)),
    rows=(1, 6),
    vocabulary=300,
)
OPERATIONS = {
    *("RMSNorm", "QK-norm, RoPE", "KV write"),
    *("attention, decode", "attention, prefill", "attention, mixed"),
    *("linear", "linear, float32 out", "SwiGLU"),
    *("sampling", "log-probabilities"),
}
TRITON_OPERATIONS = OPERATIONS | {
    *("int8 linear", "w8a8 linear", "int4 linear", "w4a8 linear", "nf4 linear", "fp8 linear"),
    *("layer, decode", "layer, mixed"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_cuda_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"needs a CUDA device, but torch .*; bench speed measures"
    ):
        gpu.require_cuda()


def test_the_workload_is_that_of_the_table() -> None:
    wanted = gpu.workload(5000)
    assert wanted == gpu.workload(5000)
    assert wanted != gpu.workload(5000, seed=1)
    assert len(wanted) == 256
    for sizes in ([len(one.prompt) for one in wanted], [one.output_tokens for one in wanted]):
        assert 100 <= min(sizes) < 120
        assert 1000 < max(sizes) <= 1024
        assert 500 < sum(sizes) / 256 < 620
    assert max(max(one.prompt) for one in wanted) < 5000


def test_a_round_of_the_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LENGTHS", (3, 9))
    engine = Engine(EngineConfig(kv_cache_bytes=2**24, max_num_seqs=8, prefix_caching=False))
    seen: list[str] = []
    rates = gpu.measure_workload(engine, 2, seen.append, count=5)
    assert len(rates) == 2
    assert min(rates) > 0
    due = sum(
        one.output_tokens for seed in range(3) for one in gpu.workload(500, count=5, seed=seed)
    )
    assert engine.stats().generated_tokens == due
    assert seen == ["workload", "workload, round 1 of 2", "workload, round 2 of 2"]
    engine.check_integrity()
    row = gpu.workload_row(rates, "bfloat16", 5, "bench gpu")
    assert (row.case, row.unit) == ("5 requests, 3 to 9 in and out", "tok/s")
    assert row.low == min(rates)


def test_transformers_with_a_static_cache(embedded_dir: Path) -> None:
    peer = gpu.StaticTransformers(str(embedded_dir), "float32")
    assert peer.decode_rate(2, 6, 3) > 0
    assert peer.prefill_rate(9) > 0


def test_sizes_are_the_models_own(embedded_dir: Path) -> None:
    sizes = Sizes.of(ModelConfig.from_folder(embedded_dir))
    assert (sizes.hidden, sizes.inner) == (160, 448)
    assert (sizes.num_heads, sizes.kv_heads, sizes.head_dim) == (4, 2, 32)


def test_torchs_kernels_are_the_reference() -> None:
    checked = check_all(TorchKernels(), SMALL, torch.float32, torch.device("cpu"))
    require_parity(checked)
    assert {one.operation for one in checked} == OPERATIONS
    rows = parity_rows(checked, "float32", "torch", "bench gpu")
    assert {row.case for row in rows} == OPERATIONS
    assert {row.system for row in rows} == {"torch / reference"}


def test_every_triton_kernel_is_checked(device: torch.device) -> None:
    from inference_pio.kernels.triton_kernels import TritonKernels

    checked = check_all(TritonKernels(), SMALL, torch.float32, device)
    require_parity(checked)
    assert {one.operation for one in checked} == TRITON_OPERATIONS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_kernel_at_the_sizes_of_qwen3(dtype: torch.dtype) -> None:
    from inference_pio.kernels.triton_kernels import TritonKernels

    device = torch.device("cuda")
    for hidden, inner, heads in ((1024, 3072, 16), (2560, 9728, 32)):
        sizes = Sizes(hidden, inner, heads, 8, 128)
        require_parity(check_all(TritonKernels(), sizes, dtype, device))


def test_a_kernel_that_differs_is_named() -> None:
    class Wrong(TorchKernels):
        def rms_norm(self, x_TC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
            return super().rms_norm(x_TC, weight_C, eps) * 1.01

    checked = check_all(Wrong(), SMALL, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"on this device: RMSNorm by 0\.01, at most 0\.0001$"):
        require_parity(checked)
    with pytest.raises(ValueError, match="linear by nan"):
        require_parity([Checked("linear", float("nan"), 1.0)])
