"""What codes change at the real 0.6B shapes with random weights: ``pytest -m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.workers.config import KVCacheDType
from inference_pio.workers.model.qwen3 import Qwen3Model
from inference_pio.workers.model.random_checkpoint import make_random_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LENGTH = 384


@pytest.fixture(scope="module")
def folder(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    make_random_checkpoint("qwen3-0.6b", folder, data_dir / "hf-qwen3-0.6b", 0)
    return folder


def logits(model: Qwen3Model, kv_cache_dtype: KVCacheDType) -> Tensor:
    """After a prompt, and after each of sixteen tokens behind it."""
    ids = torch.randint(0, 150_000, (LENGTH,), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(LENGTH // 64, 64, kv_cache_dtype)
    rows, done = [], 0
    for count in (LENGTH - 16, *[1] * 16):
        context = build_context([ContextItem(range(LENGTH // 64), done, count)], 64, model.device)
        hidden_TC = model.forward(ids[done : done + count], context, cache)
        rows.append(model.logits(hidden_TC[-1:]))
        done += count
    return torch.cat(rows)


def divergence(found: Tensor, expected: Tensor) -> float:
    """The largest KL of any row, in nats."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize(("codes", "most_kl"), [("int8", 1e-3), ("fp8", 2e-2)])
def test_logits_stay_near(folder: Path, codes: KVCacheDType, most_kl: float) -> None:
    model = Qwen3Model.load(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    expected, found = logits(model, "auto"), logits(model, codes)
    kl, largest = divergence(found, expected), float((found - expected).abs().max())
    print(f"{codes}: KL {kl:.2e}, largest difference of a logit {largest:.3f}")
    assert 0 < kl < most_kl
