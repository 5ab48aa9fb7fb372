"""The shape of the model, and the files of its checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .chat import template_source
from .tokenizer import (
    END_TOKEN,
    PAD_TOKEN,
    padded_vocab_size,
    token_id,
)

MAX_POSITIONS = 4096
ROPE_THETA = 10000.0


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: a plain Qwen3ForCausalLM, with the keys that published Qwen3 configs have."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": token_id(tokenizer, PAD_TOKEN),
        "eos_token_id": token_id(tokenizer, END_TOKEN),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 160,
        "initializer_range": 0.02,
        "intermediate_size": 448,
        "max_position_embeddings": MAX_POSITIONS,
        "max_window_layers": 5,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": padded_vocab_size(tokenizer.get_vocab_size()),
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    pad = token_id(tokenizer, PAD_TOKEN)
    return {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [token_id(tokenizer, END_TOKEN), pad],
        "pad_token_id": pad,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "chat_template": template_source(),
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "model_max_length": MAX_POSITIONS,
        "pad_token": PAD_TOKEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def save_checkpoint(folder: Path, tokenizer: Tokenizer, weights: dict[str, torch.Tensor]) -> None:
    """Writes all files of the checkpoint; weights become bf16, and the tied head is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in weights.items()
        if name != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", model_config(tokenizer)),
        ("generation_config.json", _generation_config(tokenizer)),
        ("tokenizer_config.json", _tokenizer_config(tokenizer)),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
