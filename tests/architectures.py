"""Tiny random decoders of other architectures than Llama."""

from __future__ import annotations

import torch
import transformers

from optkit.model import Model
from optkit.weights import save_folder

SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"]
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 24}
EXPERTS = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS = {
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "mistral-wide": lambda: transformers.MistralConfig(**SHAPE, sliding_window=17),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, sliding_window=6, layer_types=MIXED),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    # Keys and values of different sizes.
    "deepseek": lambda: transformers.DeepseekV3Config(
        **{name: size for name, size in SHAPE.items() if name != "head_dim"} | {"num_key_value_heads": 4},
        **LATENT,
        **EXPERTS,
    ),
}


def other(config, folder):
    """A random model of another architecture, saved."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = Model(module, None, frozenset())
    save_folder(model, folder)
    return model


def attention_shape(heads, dim):
    """Entries of a configuration: so many key heads, query heads for each of them, and numbers of a head."""
    queries = heads[0] * heads[1]
    return {
        "num_key_value_heads": heads[0],
        "num_attention_heads": queries,
        "head_dim": dim,
        "hidden_size": 8 * queries,
    }
