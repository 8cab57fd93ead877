"""Tokens for a trace's prompts, so that a real engine finds exactly the prefixes the trace has.

Each block hash becomes the same `block_size_tokens` pseudo-random token ids wherever it appears; what a
prompt has beyond its hashes is its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from baton.workload.trace import Trace

# Odd constants of splitmix64 (Steele, Lea and Flood, 2014): neighbouring inputs share no bits.
_STEP, _MIX_1, _MIX_2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_OWN = np.uint64(1) << np.uint64(63)


def prompt_token_ids(
    trace: Trace, index: int, *, vocabulary_size: int, first_token_id: int = 0, salt: int = 0
) -> NDArray[np.uint32]:
    """Token ids of request `index`, all in [first_token_id, vocabulary_size). Traces with another `salt`
    share nothing."""
    num_tokens = int(trace.num_prompt_tokens[index])
    block = trace.block_size_tokens or 1
    hashes = (
        trace.block_hashes[index].astype(np.uint64) if len(trace.block_hashes) else np.zeros(0, np.uint64)
    )
    seeds = np.repeat(hashes, block)[:num_tokens]
    offsets = np.tile(np.arange(block, dtype=np.uint64), len(hashes))[:num_tokens]
    num_own = num_tokens - len(seeds)
    # The tail no hash stands for: keyed by the request, in a half of the numbers that hashes do not use.
    seeds = np.concatenate([seeds, np.full(num_own, _OWN | np.uint64(index), np.uint64)])
    offsets = np.concatenate([offsets, np.arange(num_own, dtype=np.uint64)])
    mixed = _mixed(_mixed(seeds ^ _mixed(np.array([salt], np.uint64))) + offsets)
    span = np.uint64(vocabulary_size - first_token_id)
    return (mixed % span + np.uint64(first_token_id)).astype(np.uint32)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
