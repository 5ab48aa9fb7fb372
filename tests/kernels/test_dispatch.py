"""Which kernels are chosen."""

from __future__ import annotations

import pytest
import torch

from inference_pio.kernels.dispatch import OVERRIDE, select_kernels

CPU = torch.device("cpu")


def test_the_override_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "torch"):
        monkeypatch.setenv(OVERRIDE, name)
        assert select_kernels(CPU, torch.float32).name == name


def test_torch_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert select_kernels(CPU, torch.bfloat16).name == "torch"


def test_an_unknown_override_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "fast")
    with pytest.raises(ValueError, match="INFERENCE_PIO_KERNELS is 'fast'"):
        select_kernels(CPU, torch.float32)
