"""Memory of the KV cache on huge pages."""

from __future__ import annotations

import errno
import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch

from inference_pio.workers.model.huge_pages import HUGE_PAGE, zeros_on_huge_pages

LARGE = (3, 5, 1 << 20)  # 30 MiB in bfloat16

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")


def mapping_of(address: int) -> list[str] | None:
    """Lines of ``/proc/self/smaps`` about the mapping that holds an address."""
    found: list[str] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            if found is not None:
                break
            begin, end = (int(number, 16) for number in first.split("-"))
            found = [] if begin <= address < end else None
        elif found is not None:
            found.append(line)
    return found


@linux
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages"
)
def test_huge_pages_are_asked_for() -> None:
    tensor = zeros_on_huge_pages(LARGE, torch.bfloat16)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    lines = mapping_of(tensor.data_ptr())
    assert lines is not None
    (flags,) = [line for line in lines if line.startswith("VmFlags:")]
    assert "hg" in flags.split()
    (resident,) = [line for line in lines if line.startswith("Rss:")]
    assert int(resident.split()[1]) * 1024 >= tensor.nbytes, "touched when it is made"


@linux
def test_memory_goes_back_with_the_last_view() -> None:
    tensor = zeros_on_huge_pages(LARGE, torch.bfloat16)
    view, inside = tensor[1:, 2], tensor.data_ptr() + tensor.nbytes // 2
    del tensor
    gc.collect()
    view.fill_(1)
    assert mapping_of(inside) is not None
    del view
    gc.collect()
    assert mapping_of(inside) is None


@pytest.mark.parametrize("shape", [(2, 3), LARGE, (1, (2 << 20) - 1), (HUGE_PAGE + 1,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_it_is_zeros_of_the_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = zeros_on_huge_pages(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert tensor.sum(dtype=torch.int64) == tensor.numel()


def test_plain_memory_serves_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EINVAL, "no huge pages")

    monkeypatch.setattr(mmap, "mmap", refuse)
    tensor = zeros_on_huge_pages(LARGE, torch.bfloat16)
    assert tensor.shape == LARGE
    assert not tensor.any()
