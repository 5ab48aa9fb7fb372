"""The tensors of a Qwen3 checkpoint, by their names in transformers."""

from __future__ import annotations

from .config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor with its shape, before any quantization."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        for name, shape in (projections | {"o": (hidden, queries)}).items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = shape
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = shape[:1]
        shapes[f"{layer}.self_attn.q_norm.weight"] = (dim,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def linear_of(name: str) -> str | None:
    """The linear whose weight a tensor is, as a prefix; ``None`` for other tensors."""
    is_linear = name == HEAD or name.endswith("_proj.weight")
    return name.removesuffix(".weight") if is_linear else None
