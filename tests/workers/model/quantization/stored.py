"""Tensors in memory that answer as a checkpoint does, and checkpoints in published layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inference_pio.workers.model.names import linear_of

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
NF4 = load_file(Path(__file__).with_name("golden.safetensors"))["bnb.weight.quant_map"]


@dataclass
class InMemory:
    """See ``Tensors``."""

    tensors: dict[str, Tensor]
    folder: Path = Path("memory")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def view(self, name: str) -> Tensor:
        return self.tensors[name]

    def stored_dtype(self, name: str) -> str:
        return NAMES[self.tensors[name].dtype]


Written = tuple[dict[str, Tensor], Tensor]
"""The tensors that stand for a weight, by suffix, and the weight that they mean."""


@dataclass(frozen=True)
class Published:
    """One layout: its ``quantization_config`` and a writer of random weights in it."""

    settings: dict[str, Any]
    write: Callable[[tuple[int, int], np.random.Generator], Written]


def words(codes: np.ndarray, bits: int) -> Tensor:
    """Neighbours along the last axis into int32, the first into the lowest bits."""
    per_word = 32 // bits
    grouped = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return torch.from_numpy((grouped << shifts).sum(-1, dtype=np.uint32).view(np.int32).copy())


def gptq(bits: int, *, symmetric: bool, ordered: bool, version: str = "gptq") -> Published:
    group = 16

    def write(shape: tuple[int, int], rng: np.random.Generator) -> Written:
        rows, columns = shape
        codes_IO = rng.integers(0, 2**bits, (columns, rows))
        middle = 2 ** (bits - 1)
        zeros_GO = rng.integers(middle - 3, middle + 4, (columns // group, rows))
        if symmetric:
            zeros_GO[:] = middle
        scales_GO = rng.uniform(0.2, 1.0, zeros_GO.shape).astype(np.float16) / 2**bits / 4
        groups_I = np.arange(columns) // group
        if ordered:
            rng.shuffle(groups_I)
        stored_zeros = zeros_GO - (version == "gptq")
        weight_IO = (codes_IO - zeros_GO[groups_I]) * scales_GO[groups_I].astype(np.float64)
        tensors = {
            "qweight": words(codes_IO.T, bits).T.contiguous(),
            "qzeros": words(stored_zeros, bits),
            "scales": torch.from_numpy(scales_GO),
            "g_idx": torch.from_numpy(groups_I.astype(np.int32)),
        }
        return tensors, torch.from_numpy(weight_IO.T.copy())

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": symmetric,
        "checkpoint_format": version,
    }
    return Published(settings, write)


def awq() -> Published:
    group = 8

    def write(shape: tuple[int, int], rng: np.random.Generator) -> Written:
        rows, columns = shape
        codes_IO = rng.integers(0, 16, (columns, rows))
        zeros_GO = rng.integers(5, 11, (columns // group, rows))
        scales_GO = rng.uniform(0.2, 1.0, zeros_GO.shape).astype(np.float16) / 64
        wide = scales_GO.astype(np.float64)
        weight_IO = (codes_IO - zeros_GO.repeat(group, 0)) * wide.repeat(group, 0)
        order = (np.arange(rows).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]]).reshape(-1)
        tensors = {
            "qweight": words(codes_IO[:, order], 4),
            "qzeros": words(zeros_GO[:, order], 4),
            "scales": torch.from_numpy(scales_GO),
        }
        return tensors, torch.from_numpy(weight_IO.T.copy())

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Published({**settings, "zero_point": True, "modules_to_not_convert": None}, write)


def fp8() -> Published:
    def write(shape: tuple[int, int], rng: np.random.Generator) -> Written:
        rows, columns = shape
        block_rows, block_columns = 24, 16  # neither divides every shape
        codes = torch.from_numpy(rng.uniform(-448, 448, shape)).to(torch.float8_e4m3fn)
        grid = rng.uniform(0.2, 1.0, (-(-rows // block_rows), -(-columns // block_columns)))
        scales = torch.from_numpy(grid / 2000).to(torch.bfloat16)
        spread = scales.double().repeat_interleave(block_rows, 0)[:rows]
        weight = codes.double() * spread.repeat_interleave(block_columns, 1)[:, :columns]
        return {"weight": codes, "weight_scale_inv": scales}, weight

    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 16]}
    return Published({**settings, "activation_scheme": "dynamic"}, write)


def nf4(*, nested: bool) -> Published:
    block = 64  # crosses the rows of some shapes

    def write(shape: tuple[int, int], rng: np.random.Generator) -> Written:
        count = shape[0] * shape[1]
        codes = rng.integers(0, 16, count)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"}
        state["shape"] = list(shape)
        blocks = -(-count // block)
        tensors: dict[str, Tensor] = {}
        if nested:
            table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            inner = rng.integers(0, 256, blocks)
            outer = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
            state |= {"nested_blocksize": 256, "nested_offset": 0.1, "nested_dtype": "float32"}
            scales = table[inner].astype(np.float64) * outer.repeat(256)[:blocks] + 0.1
            tensors["weight.absmax"] = torch.from_numpy(inner.astype(np.uint8))
            tensors["weight.nested_absmax"] = torch.from_numpy(outer)
            tensors["weight.nested_quant_map"] = torch.from_numpy(table)
        else:
            narrow = rng.uniform(0.05, 0.15, blocks).astype(np.float32)
            scales = narrow.astype(np.float64)
            tensors["weight.absmax"] = torch.from_numpy(narrow)
        weight = NF4.numpy()[codes] * scales.repeat(block)[:count]
        tensors["weight"] = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8))
        tensors["weight"] = tensors["weight"][:, None]
        tensors["weight.quant_map"] = NF4
        text = json.dumps(state).encode()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text)).to(torch.uint8)
        return tensors, torch.from_numpy(weight.reshape(shape))

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    return Published({**settings, "bnb_4bit_quant_type": "nf4"}, write)


PUBLISHED: dict[str, Published] = {
    "fp8": fp8(),
    "gptq 8 bits": gptq(8, symmetric=True, ordered=False),
    "gptq 8 bits, zero points, reordered": gptq(8, symmetric=False, ordered=True),
    "gptq 4 bits": gptq(4, symmetric=True, ordered=False),
    "gptq 4 bits, zero points, reordered": gptq(4, symmetric=False, ordered=True),
    "gptq_v2 4 bits, zero points": gptq(4, symmetric=False, ordered=False, version="gptq_v2"),
    "awq": awq(),
    "nf4": nf4(nested=False),
    "nf4, nested": nf4(nested=True),
}


def write_published(source: Path, quantized: Path, plain: Path, published: Published) -> None:
    """Two copies of a checkpoint with the same random linears: in a layout, and as floats.

    The last linear stays as it was in both: layouts leave modules out.
    """
    rng = np.random.default_rng(0)
    config = json.loads((source / "config.json").read_text())
    stored = load_file(source / "model.safetensors")
    floats = dict(stored)
    linears = [name for name in sorted(stored) if linear_of(name) is not None]
    for name in linears[:-1]:
        prefix = linear_of(name)
        tensors, weight = published.write(tuple(stored.pop(name).shape), rng)
        stored |= {f"{prefix}.{suffix}": tensor.clone() for suffix, tensor in tensors.items()}
        floats[name] = weight.float()
    settings = {"quantization_config": published.settings}
    for folder, tensors, extra in ((quantized, stored, settings), (plain, floats, {})):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | extra))
