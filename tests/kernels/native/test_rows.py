"""The native row operations against their definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inference_pio.kernels.kv_layer import CodedKV, KVCodes, KVLayer
from inference_pio.kernels.native.instruction_sets import INSTRUCTION_SETS
from inference_pio.kernels.native.library import KernelError, Library, cpu_flags, load, usable
from inference_pio.kernels.native.rows import embed, qk_norm_rope_write, rms_norm
from inference_pio.kernels.reference import ReferenceKernels
from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin

from ..coded_samples import empty_layer

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
any_shape = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Native:
    """A library and its teams of one and three threads."""

    library: Library
    teams: tuple[int, int]


@pytest.fixture(params=[known.name for known in INSTRUCTION_SETS])
def native(request: pytest.FixtureRequest) -> Native:
    if request.param not in usable(cpu_flags()):
        pytest.skip(f"this CPU has no {request.param}")
    library = load(request.param)
    return Native(library, (library.team(1), library.team(3)))


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@any_shape
@given(rows=st.integers(1, 9), cols=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_embed(native: Native, rows: int, cols: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(11, cols + 3).to(dtype)[:, :cols]
    ids = torch.randint(11, (rows,))
    for team in native.teams:
        assert torch.equal(embed(native.library, team, table, ids), table[ids].float())


@pytest.mark.parametrize("wrong", [-1, 11])
def test_embed_knows_its_table(native: Native, wrong: int) -> None:
    with pytest.raises(KernelError, match=rf"token id 1 is {wrong}; it lies in \[0, 10\]"):
        embed(native.library, native.teams[0], torch.randn(11, 4), torch.tensor([3, wrong]))


@any_shape
@given(
    rows=st.integers(0, 9),
    cols=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    from_stream=st.booleans(),
)
def test_rms_norm(
    native: Native, rows: int, cols: int, dtype: torch.dtype, from_stream: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, cols + 1)[:, :cols].to(torch.float32 if from_stream else dtype) * 3
    weight = torch.randn(cols).to(dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = normed.to(dtype) * weight
    kept = x.clone()
    outcomes = [rms_norm(native.library, team, x, weight, 1e-6) for team in native.teams]
    close(outcomes[0], expected)
    assert torch.equal(outcomes[1], outcomes[0])
    assert torch.equal(x, kept)
    if rows:
        alone = rms_norm(native.library, native.teams[0], x[-1:], weight, 1e-6)
        assert torch.equal(alone, outcomes[0][-1:])


def test_rms_norm_rounds_to_bfloat16_before_the_weight(native: Native) -> None:
    """As the models were trained: the order shows in one element of many."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1024).bfloat16(), torch.randn(1024).bfloat16()
    got = rms_norm(native.library, native.teams[0], x, weight, 1e-6)
    expected = ReferenceKernels().rms_norm(x, weight, 1e-6)
    wide = x.float()
    once = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).bfloat16()
    assert (got != expected).float().mean() < 1e-4  # where the last bit of the scale decides
    assert (once != expected).float().mean() > 0.05


def test_rms_norm_in_another_dtype(native: Native) -> None:
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        rms_norm(native.library, native.teams[0], torch.ones(1, 4).bfloat16(), torch.ones(4), 1e-6)


@any_shape
@given(
    tokens=st.integers(1, 7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    half=st.integers(1, 70),
    block_size=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_qk_norm_rope_write(
    native: Native,
    tokens: int,
    kv_heads: int,
    group: int,
    half: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    dim, num_heads = 2 * half, group * kv_heads
    positions = torch.randint(40_000, (tokens,))
    cos, sin = rope_cos_sin(positions, inverse_frequencies(1e6, dim, CPU))
    qkv = torch.randn(tokens, (num_heads + 2 * kv_heads) * dim).to(dtype)
    weight = torch.randn(num_heads + kv_heads, dim)
    num_blocks = tokens + 2
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    before = torch.randn(num_blocks, 2, kv_heads, block_size, dim).to(dtype)
    reference = before.clone()
    expected = ReferenceKernels().qk_norm_rope_write(
        qkv.clone(), weight, cos, sin, reference, slots, 1e-6
    )
    for team in native.teams:
        cache, rows = before.clone(), qkv.clone()
        q = qk_norm_rope_write(native.library, team, rows, weight, cos, sin, cache, slots, 1e-6)
        torch.testing.assert_close(q, expected, atol=3e-2, rtol=2e-2)
        close_float = dtype == torch.float32
        torch.testing.assert_close(
            cache,
            reference,
            atol=1e-5 if close_float else 3e-2,
            rtol=1e-5 if close_float else 2e-2,
        )
        # Slots of other tokens and all values are the same bits.
        written = torch.zeros(num_blocks * block_size, dtype=torch.bool)
        written[slots] = True
        untouched = ~written.view(num_blocks, block_size)
        by_slot, as_before = cache.permute(0, 3, 1, 2, 4), before.permute(0, 3, 1, 2, 4)
        assert torch.equal(by_slot[untouched], as_before[untouched])
        assert torch.equal(cache[:, 1], reference[:, 1])


@any_shape
@given(
    tokens=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 70),
    block_size=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    codes=st.sampled_from(["int8", "fp8"]),
    exponent=st.integers(-40, 40),
)
def test_keys_and_values_become_the_reference_s_codes(
    native: Native,
    tokens: int,
    kv_heads: int,
    half: int,
    block_size: int,
    dtype: torch.dtype,
    codes: KVCodes,
    exponent: int,
) -> None:
    torch.manual_seed(0)
    dim = 2 * half
    cos, sin = rope_cos_sin(torch.arange(tokens) * 999, inverse_frequencies(1e6, dim, CPU))
    qkv = (torch.randn(tokens, 3 * kv_heads * dim) * 2.0**exponent).to(dtype)
    weight = torch.randn(2 * kv_heads, dim)
    slots = torch.randperm((tokens + 2) * block_size)[:tokens]

    def written(write: Callable[[KVLayer], Tensor]) -> tuple[CodedKV, Tensor]:
        layer = empty_layer((tokens + 2, kv_heads, block_size, dim), codes, dtype)
        assert isinstance(layer, CodedKV)
        return layer, write(layer)

    reference, expected_q = written(
        lambda kv: ReferenceKernels().qk_norm_rope_write(
            qkv.clone(), weight, cos, sin, kv, slots, 1e-6
        )
    )
    outcomes = [
        written(
            lambda kv, team=team: qk_norm_rope_write(
                native.library, team, qkv.clone(), weight, cos, sin, kv, slots, 1e-6
            )
        )
        for team in native.teams
    ]
    layer, q = outcomes[0]
    assert torch.equal(outcomes[1][0].data_N2KB, layer.data_N2KB)
    torch.testing.assert_close(q, expected_q, atol=3e-2, rtol=2e-2)
    assert torch.equal(layer.data_N2KB[:, 1], reference.data_N2KB[:, 1]), "values, bit by bit"
    # Keys are computed with other roundings, so a number between two codes may take the other.
    got, expected = (kv.dequantized(kv.data_N2KB)[:, 0] for kv in (layer, reference))
    step = expected.abs().amax(-1, keepdim=True) / (127 if codes == "int8" else 14)
    assert ((got - expected).abs() <= step * 1.001).all()
    assert (got - expected).abs().gt(step * 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_is_nan_and_its_neighbours_are_not(
    native: Native, codes: KVCodes, poison: float
) -> None:
    layer = empty_layer((1, 1, 4, 40), codes, torch.float32)
    assert isinstance(layer, CodedKV)
    qkv, angles = torch.randn(2, 120), torch.ones(2, 20)
    qkv[0, 81] = poison  # of the first token's value
    qk_norm_rope_write(
        native.library, native.teams[0], qkv, torch.ones(2, 40), angles, angles, layer,
        torch.tensor([1, 2]), 1e-6,
    )  # fmt: skip
    keys, values = layer.dequantized(layer.data_N2KB)[0, :, 0]
    assert values[1].isnan().all()
    assert not values[[0, 2, 3]].isnan().any()
    assert not keys.isnan().any()


@pytest.mark.parametrize("wrong", [-1, 48])
def test_a_slot_outside_of_the_cache_is_an_error(native: Native, wrong: int) -> None:
    cache = torch.zeros(3, 2, 1, 16, 8)
    qkv, weight, angles = torch.randn(2, 24), torch.ones(2, 8), torch.ones(2, 4)
    slots = torch.tensor([0, wrong])
    with pytest.raises(KernelError, match=rf"slot 1 is {wrong}; it lies in \[0, 47\]"):
        qk_norm_rope_write(
            native.library, native.teams[0], qkv, weight, angles, angles, cache, slots, 1e-6
        )
    assert not cache.any()


def test_operands_that_do_not_fit(native: Native) -> None:
    cache, angles, slots = torch.zeros(3, 2, 1, 16, 8), torch.ones(2, 4), torch.zeros(2).long()
    for qkv, kv, message in (
        (torch.randn(2, 23), cache, "does not hold 1 \\+ 2 \\* 1 heads of 8"),
        (torch.randn(2, 24).bfloat16(), cache, "bfloat16 and the cache is torch.float32"),
        (torch.randn(2, 24), cache.transpose(0, 3), "no gaps are allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            qk_norm_rope_write(
                native.library, native.teams[0], qkv, torch.ones(2, 8), angles, angles, kv, slots,
                1e-6,
            )  # fmt: skip
