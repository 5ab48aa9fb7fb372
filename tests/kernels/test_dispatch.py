"""Which kernels are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from inference_pio.kernels import dispatch
from inference_pio.kernels.dispatch import OVERRIDE, select_kernels
from inference_pio.kernels.native import library
from inference_pio.kernels.native.library import Library, LibraryError, cpu_flags, load, usable

CPU = torch.device("cpu")
SETS = usable(cpu_flags())
NATIVE_DTYPES = [torch.float32, torch.bfloat16]

needs_native = pytest.mark.skipif(not SETS, reason="no native kernels for this CPU")


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(OVERRIDE, raising=False)
    dispatch._best_library.cache_clear()
    yield
    dispatch._best_library.cache_clear()


def only(*names: str) -> object:
    """A ``load`` that refuses every other library."""

    def refusing(name: str) -> Library:
        if name not in names:
            raise LibraryError(f"libpio_{name}.so is missing")
        return load(name)

    return refusing


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_best_set_of_the_cpu_is_the_default(dtype: torch.dtype) -> None:
    assert select_kernels(CPU, dtype).name == f"native:{SETS[0]}"


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_the_override_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, name)
    assert select_kernels(CPU, torch.float32).name == name


@pytest.mark.parametrize("name", SETS)
def test_the_override_names_a_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, f"native:{name}")
    assert select_kernels(CPU, torch.float32).name == f"native:{name}"
    monkeypatch.setenv(OVERRIDE, "native")
    assert select_kernels(CPU, torch.float32).name == f"native:{SETS[0]}"


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("meta", torch.float32), ("meta", torch.bfloat16)]
)
def test_what_native_kernels_do_not_compute_is_torchs(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert select_kernels(torch.device(device), dtype).name == "torch"
    monkeypatch.setenv(OVERRIDE, "native")
    with pytest.raises(ValueError, match=f"float32 and bfloat16 on the CPU, not .* on {device}"):
        select_kernels(torch.device(device), dtype)


@needs_native
def test_the_next_lower_set_serves_where_one_does_not_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "load", only(SETS[-1]))
    for _ in range(2):
        assert select_kernels(CPU, torch.float32).name == f"native:{SETS[-1]}"
    # Once a process, not for each model.
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(SETS) - 1
    for name, text in zip(SETS, said, strict=False):
        assert f"{name} are left out: libpio_{name}.so is missing" in text


def test_torch_serves_where_no_set_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "load", only())
    assert select_kernels(CPU, torch.bfloat16).name == "torch"
    assert len(caplog.records) == len(SETS)
    monkeypatch.setenv(OVERRIDE, "native")
    with pytest.raises(ValueError, match="no library works here; this CPU has"):
        select_kernels(CPU, torch.bfloat16)


def test_a_set_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = frozenset({"avx2", "fma", "f16c"})
    load.cache_clear()
    monkeypatch.setattr(library, "cpu_flags", lambda: flags)
    monkeypatch.setattr(dispatch, "cpu_flags", lambda: flags)
    monkeypatch.setenv(OVERRIDE, "native:amx")
    with pytest.raises(
        ValueError, match=r"'native:amx', but this CPU lacks .*amx_bf16 .*; this CPU has avx2$"
    ):
        select_kernels(CPU, torch.float32)
    monkeypatch.setattr(library, "cpu_flags", frozenset)
    monkeypatch.setattr(dispatch, "cpu_flags", frozenset)
    with pytest.raises(ValueError, match="this CPU has no set that they know"):
        select_kernels(CPU, torch.float32)
    monkeypatch.delenv(OVERRIDE)
    assert select_kernels(CPU, torch.float32).name == "torch"


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("meta", torch.float32, "CUDA devices, not on meta; with TRITON_INTERPRET=1"),
        ("cpu", torch.float32, "CUDA devices, not on cpu; with TRITON_INTERPRET=1"),
    ],
)
def test_triton_is_refused_where_it_cannot_run(
    device: str, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(OVERRIDE, "triton")
    with pytest.raises(ValueError, match=f"is 'triton', but its kernels run on {reason}"):
        select_kernels(torch.device(device), dtype)


def test_triton_is_interpreted_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_kernels(CPU, torch.float32).name != "triton"  # for tests only: by the override
    monkeypatch.setenv(OVERRIDE, "triton")
    assert select_kernels(CPU, torch.float32).name == "triton"
    with pytest.raises(ValueError, match="but its interpreter has no bfloat16"):
        select_kernels(CPU, torch.bfloat16)


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(OVERRIDE, "triton")
    with pytest.raises(ValueError, match="but the package triton is not installed"):
        select_kernels(torch.device("cuda"), torch.float32)


def test_a_cuda_device_without_triton_computes_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert select_kernels(torch.device("cuda"), torch.bfloat16).name == "torch"
    assert "the package triton is not installed" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_is_the_default_on_a_device(dtype: torch.dtype) -> None:
    assert select_kernels(torch.device("cuda"), dtype).name == "triton"


@pytest.mark.parametrize("choice", ["fast", "torch:amx", "reference:avx2", "native2", "triton:3"])
def test_an_unknown_override_is_refused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, choice)
    with pytest.raises(ValueError, match=f"INFERENCE_PIO_KERNELS is '{choice}'; it is 'native'"):
        select_kernels(CPU, torch.float32)


def test_an_unknown_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "native:sse")
    with pytest.raises(ValueError, match="there are no kernels for 'sse', only for amx"):
        select_kernels(CPU, torch.float32)


@needs_native
def test_native_kernels_take_as_many_threads_as_torch_has() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            kernels = select_kernels(CPU, torch.float32)
            assert kernels._team == load(SETS[0]).team(count)  # type: ignore[attr-defined]
    finally:
        torch.set_num_threads(before)
