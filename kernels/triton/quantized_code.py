"""Device code of products with quantized weights, which are read as the codes that they are.

``FORMAT`` is a ``CodeFormat``. Two codes in a byte are the columns 2j and 2j + 1: a tile of bytes
is multiplied as two tiles, with the even and with the odd inputs. Codes in groups are brought to
the activations' dtype, as ``QuantizedWeight.dequantize`` does; with one scale a row the sums
are scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _value(code, table_ptr, FORMAT: tl.constexpr):
    """What a code stands for, before zero point and scale: float32."""
    if FORMAT == "nf4":
        return tl.load(table_ptr + code.to(tl.int32))
    if FORMAT == "fp8":
        # e4m3's bits in a float16 are the number over 2 ** 8; both have the same subnormals then.
        wide = code.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), number)
    return code.to(tl.float32)


@triton.jit
def _weight(
    code, scales_ptr, zeros_ptr, table_ptr, groups, inside, FORMAT: tl.constexpr,
    HAS_ZEROS: tl.constexpr, ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """Codes as float32 weights; ``groups`` are the places of their scales."""
    value = _value(code, table_ptr, FORMAT)
    if HAS_ZEROS:
        value -= tl.load(zeros_ptr + groups, mask=inside, other=0).to(tl.float32)
    elif FORMAT == "int4":
        value -= 8.0
    if not ROW_SCALES:
        value *= tl.load(scales_ptr + groups, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    x_stride,
    residual_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
):
    """``x @ weight.T`` for a tile of rows and outputs; ``CODE_TILE`` stored codes at once."""
    rows = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    outputs = tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)
    row_there = rows < num_rows
    out_there = outputs < OUTPUTS
    PER_CODE: tl.constexpr = 2 if PAIRS else 1
    STORED: tl.constexpr = (INPUTS + PER_CODE - 1) // PER_CODE
    wide_outputs = outputs.to(tl.int64)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((ROW_TILE, OUT_TILE), tl.float32)
    for start in tl.range(0, STORED, CODE_TILE):
        stored = start + tl.arange(0, CODE_TILE)
        inside = out_there[:, None] & (stored < STORED)[None, :]
        code = tl.load(
            codes_ptr + wide_outputs[:, None] * STORED + stored[None, :], mask=inside, other=0
        )
        columns = stored * PER_CODE
        groups = outputs[:, None] * NUM_GROUPS + (columns // GROUP)[None, :]
        x_there = row_there[:, None] & (columns < INPUTS)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=x_there, other=0.0)
        even = code & 15 if PAIRS else code
        weight = _weight(
            even, scales_ptr, zeros_ptr, table_ptr, groups, inside, FORMAT, HAS_ZEROS, ROW_SCALES
        ).to(x.dtype)
        acc = tl.dot(x, tl.trans(weight), acc=acc, input_precision="ieee")
        if PAIRS:
            x_there = row_there[:, None] & (columns + 1 < INPUTS)[None, :]
            x = tl.load(x_rows + columns[None, :] + 1, mask=x_there, other=0.0)
            weight = _weight(
                code >> 4, scales_ptr, zeros_ptr, table_ptr, groups, inside, FORMAT, HAS_ZEROS,
                ROW_SCALES,
            ).to(x.dtype)  # fmt: skip
            acc = tl.dot(x, tl.trans(weight), acc=acc, input_precision="ieee")
    if ROW_SCALES:
        acc *= tl.load(scales_ptr + outputs, mask=out_there, other=0.0).to(tl.float32)[None, :]
    _store(
        acc, bias_ptr, residual_ptr, out_ptr, rows, outputs, row_there, out_there,
        residual_stride, OUTPUTS, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def vector_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OUT_TILE: tl.constexpr,
    CODE_TILE: tl.constexpr,
):
    """``x @ weight.T`` for one row and a few outputs: no matrix units, all threads read codes."""
    row = tl.program_id(1)
    outputs = tl.program_id(0) * OUT_TILE + tl.arange(0, OUT_TILE)
    out_there = outputs < OUTPUTS
    PER_CODE: tl.constexpr = 2 if PAIRS else 1
    STORED: tl.constexpr = (INPUTS + PER_CODE - 1) // PER_CODE
    wide_outputs = outputs.to(tl.int64)
    x_row = x_ptr + row.to(tl.int64) * x_stride
    sums = tl.zeros((OUT_TILE, CODE_TILE), tl.float32)
    for start in tl.range(0, STORED, CODE_TILE):
        stored = start + tl.arange(0, CODE_TILE)
        inside = out_there[:, None] & (stored < STORED)[None, :]
        code = tl.load(
            codes_ptr + wide_outputs[:, None] * STORED + stored[None, :], mask=inside, other=0
        )
        columns = stored * PER_CODE
        groups = outputs[:, None] * NUM_GROUPS + (columns // GROUP)[None, :]
        x = tl.load(x_row + columns, mask=columns < INPUTS, other=0.0)
        even = code & 15 if PAIRS else code
        weight = _weight(
            even, scales_ptr, zeros_ptr, table_ptr, groups, inside, FORMAT, HAS_ZEROS, ROW_SCALES
        ).to(x.dtype)
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        if PAIRS:
            x = tl.load(x_row + columns + 1, mask=columns + 1 < INPUTS, other=0.0)
            weight = _weight(
                code >> 4, scales_ptr, zeros_ptr, table_ptr, groups, inside, FORMAT, HAS_ZEROS,
                ROW_SCALES,
            ).to(x.dtype)  # fmt: skip
            sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    acc = tl.sum(sums, axis=1)
    if ROW_SCALES:
        acc *= tl.load(scales_ptr + outputs, mask=out_there, other=0.0).to(tl.float32)
    rows = row + tl.zeros((1,), tl.int32)
    _store(
        acc[None, :], bias_ptr, residual_ptr, out_ptr, rows, outputs, rows >= 0, out_there,
        residual_stride, OUTPUTS, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _store(
    acc, bias_ptr, residual_ptr, out_ptr, rows, outputs, row_there, out_there, residual_stride,
    OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Adds bias and residual in float32, and rounds once."""
    there = row_there[:, None] & out_there[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=out_there, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        places = residual_ptr + wide_rows * residual_stride + outputs[None, :]
        acc += tl.load(places, mask=there, other=0.0).to(tl.float32)
    places = out_ptr + wide_rows * OUTPUTS + outputs[None, :]
    tl.store(places, acc.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def round_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """A row as int8 codes and one float32 scale; see ``torch_quantized.round_activations``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=0), 1e-30), 127.0)
    # float32 has no room for a fraction beside 1.5 * 2 ** 23: the sum is rounded, half to even.
    rounded = (tl.div_rn(x, scale + tl.zeros_like(x)) + 12582912.0) - 12582912.0
    tl.store(codes_ptr + row * WIDTH + columns, rounded.to(tl.int8), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def int8_matmul_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    residual_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
):
    """int8 activations times int8 weights: exact sums, scaled by token and by output."""
    rows = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    outputs = tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)
    row_there = rows < num_rows
    out_there = outputs < OUTPUTS
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * INPUTS
    weights = codes_ptr + outputs.to(tl.int64)[:, None] * INPUTS
    sums = tl.zeros((ROW_TILE, OUT_TILE), tl.int32)
    for start in tl.range(0, INPUTS, IN_TILE):
        columns = start + tl.arange(0, IN_TILE)
        inside = (columns < INPUTS)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=row_there[:, None] & inside, other=0)
        code = tl.load(weights + columns[None, :], mask=out_there[:, None] & inside, other=0)
        sums = tl.dot(x, tl.trans(code), acc=sums, out_dtype=tl.int32)
    x_scales = tl.load(x_scales_ptr + rows, mask=row_there, other=0.0)
    scales = tl.load(scales_ptr + outputs, mask=out_there, other=0.0).to(tl.float32)
    acc = sums.to(tl.float32) * x_scales[:, None] * scales[None, :]
    _store(
        acc, bias_ptr, residual_ptr, out_ptr, rows, outputs, row_there, out_there,
        residual_stride, OUTPUTS, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
