"""llama.cpp through llama-cpp-python's plain bindings, built for this machine's processor."""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

FILE_TYPES = {
    "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTEXT = 8192
SEQUENCES = 32
"""The most that a case decodes at a time."""


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """Writes a GGUF file of the checkpoint in bf16, and quantises it where that is asked for."""
    whole = Path(folder) / "bfloat16.gguf"
    if not whole.exists():
        partial = whole.with_suffix(".partial")
        write_gguf(Path(checkpoint), partial)
        partial.rename(whole)
    if precision == "bfloat16":
        return
    target = Path(folder) / f"{precision}.gguf"
    partial = target.with_suffix(".partial")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FILE_TYPES[precision]
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(partial).encode(), options) != 0:
        raise RuntimeError(f"llama.cpp could not quantise to {precision}")
    partial.rename(target)
    if not runs(target):
        plain_buffers(target).touch()


def plain_buffers(model: Path) -> Path:
    """The file that says: this model runs only without llama.cpp's repacked and AMX buffers."""
    return model.with_suffix(".plain-buffers")


def runs(model: Path) -> bool:
    """Whether llama.cpp computes a token as it is. Its AMX code ends the process on some machines,
    so another process tries."""
    return subprocess.run([sys.executable, __file__, str(model)], check=False).returncode == 0


def write_gguf(checkpoint: Path, target: Path) -> None:
    """The weights without a vocabulary: only ids are generated here."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    tied = config.get("tie_word_embeddings", False)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if not (tied and name == "lm_head.weight"):
                    add_tensor(writer, gguf_name(name), tensors.get_tensor(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(part)]}.weight"


def add_tensor(writer: Any, name: str, tensor: Any) -> None:
    """Norms in float32, as llama.cpp wants them; matrices in bf16."""
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    import torch

    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


class Peer:
    """A context that holds all sequences of a case."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        self.version = str(llama_cpp.__version__)
        llama_cpp.llama_backend_init()
        # A callback that is collected while llama.cpp holds it would crash.
        self._quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        path = Path(folder) / f"{precision}.gguf"
        loading = llama_cpp.llama_model_default_params()
        if plain_buffers(path).exists():
            loading.use_extra_bufts = False
            self.version += " without its repacked and AMX buffers, which crash here"
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = CONTEXT
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = SEQUENCES
        options.kv_unified = True
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context for {path.name}")
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._random = random.Random(0)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        self._forget()
        tokens = [self._prefill(sequence, prompt) for sequence in range(batch)]
        begin = time.perf_counter()
        for step in range(steps):
            rows = [(tokens[i], prompt + step, i, True) for i in range(batch)]
            self._run(rows)
            tokens = [self._best(row) for row in range(batch)]
        return time.perf_counter() - begin

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        self._forget()
        begin = time.perf_counter()
        self._prefill(0, length)
        return time.perf_counter() - begin

    def _prefill(self, sequence: int, length: int) -> int:
        rows = [
            (self._random.randrange(self._vocabulary // 2), position, sequence, False)
            for position in range(length)
        ]
        rows[-1] = (*rows[-1][:3], True)
        for start in range(0, length, 512):
            self._run(rows[start : start + 512])
        return self._best(-1)

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Tokens with position, sequence and whether their logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        result = llama_cpp.llama_decode(self._context, batch)
        if result != 0:
            raise RuntimeError(f"llama_decode returned {result}")

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)


if __name__ == "__main__":
    tried = Path(sys.argv[1])
    Peer("", tried.stem, str(tried.parent), threads=1).first_token_seconds(64)
