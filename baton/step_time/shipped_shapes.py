"""Sizes of well-known models, as their published config.json states them."""

from __future__ import annotations

from typing import Final


def _opt(layers: int, hidden: int, heads: int) -> dict[str, int | bool]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": 4 * hidden,
        "num_ffn_matrices": 2,
        "vocab_size": 50_272,
        "has_tied_embeddings": True,
        "max_context_tokens": 2_048,
    }


def _gated(
    layers: int, hidden: int, heads: int, ffn: int, vocab: int, context: int, *, tied: bool = False
) -> dict[str, int | bool]:
    """Eight KV heads of 128, as all of the models below have."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "ffn_size": ffn,
        "num_ffn_matrices": 3,
        "vocab_size": vocab,
        "has_tied_embeddings": tied,
        "max_context_tokens": context,
    }


SHIPPED: Final[dict[str, dict[str, int | bool]]] = {
    "OPT-13B": _opt(40, 5_120, 40),
    "OPT-66B": _opt(64, 9_216, 72),
    "OPT-175B": _opt(96, 12_288, 96),
    "Llama-3-8B": _gated(32, 4_096, 32, 14_336, 128_256, 8_192),
    "Llama-3-70B": _gated(80, 8_192, 64, 28_672, 128_256, 8_192),
    "Llama-3.1-8B": _gated(32, 4_096, 32, 14_336, 128_256, 131_072),
    "Llama-3.1-70B": _gated(80, 8_192, 64, 28_672, 128_256, 131_072),
    "Mistral-7B": _gated(32, 4_096, 32, 14_336, 32_768, 32_768),
    "Qwen3-0.6B": _gated(28, 1_024, 16, 3_072, 151_936, 40_960, tied=True),
    "Qwen3-8B": _gated(36, 4_096, 32, 12_288, 151_936, 40_960),
    "Qwen3-32B": _gated(64, 5_120, 64, 25_600, 151_936, 40_960),
}
