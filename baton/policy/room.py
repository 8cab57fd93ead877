"""Decode placement starts with room: who can hold this request's KV at all.

A worker without KV blocks for a request preempts somebody sooner or later, which costs far more
than any imbalance; so capacity comes first, and only workers with room are ranked. Room counts
what is promised, not what the engine sees: KV in flight is not there yet. Output we expect is
counted in, but never beyond the worker's whole cache: a pessimistic estimate must not keep a
request waiting for ever that the worker, once empty, can serve.
"""

from __future__ import annotations

import numpy as np

from baton.policy.base import RequestFacts
from baton.policy.ledger import COLUMNS, Ledger, Vector, WorkerAccount

_LEGS, _RESERVED, _BLOCKS, _MAX_BATCH, _BLOCK_SIZE = (
    COLUMNS.index(name)
    for name in ("num_legs", "num_reserved_blocks", "num_blocks", "max_batch_size", "block_size_tokens")
)


def num_blocks_wanted(facts: RequestFacts, account: WorkerAccount) -> int:
    """Blocks for the prompt and the output we expect, as `slots_with_room` counts them."""
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = account.num_blocks_for(tokens)
    return min(wanted, max(account.capacity.num_blocks, account.num_blocks_for(facts.num_prompt_tokens + 1)))


def slots_with_room(facts: RequestFacts, ledger: Ledger, slots: Vector) -> Vector:
    """Those of `slots` with a place in the batch and blocks for prompt and expected output."""
    if not len(slots):
        return slots
    rows = ledger.rows(slots)
    num_blocks, block_size = rows[_BLOCKS], rows[_BLOCK_SIZE]
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = -(-tokens // block_size)
    if (wanted > num_blocks).any():
        least = -(-(facts.num_prompt_tokens + 1) // block_size)
        wanted = np.minimum(wanted, np.maximum(num_blocks, least))
    has_room = wanted <= num_blocks - rows[_RESERVED]
    has_room &= rows[_LEGS] < rows[_MAX_BATCH]
    return slots if has_room.all() else slots[has_room]
