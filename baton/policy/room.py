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
from baton.policy.ledger import Ledger, Vector, WorkerAccount


def num_blocks_wanted(facts: RequestFacts, account: WorkerAccount) -> int:
    """Blocks for the prompt and the output we expect, as `slots_with_room` counts them."""
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = account.num_blocks_for(tokens)
    return min(wanted, max(account.capacity.num_blocks, account.num_blocks_for(facts.num_prompt_tokens + 1)))


def slots_with_room(facts: RequestFacts, ledger: Ledger, slots: Vector) -> Vector:
    """Those of `slots` with a place in the batch and blocks for prompt and expected output."""
    block_size = ledger.gather("block_size_tokens", slots)
    num_blocks = ledger.gather("num_blocks", slots)
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = (tokens + block_size - 1) // block_size
    least = (facts.num_prompt_tokens + block_size) // block_size  # prompt + 1 token, rounded up
    wanted = np.minimum(wanted, np.maximum(num_blocks, least))
    has_room = wanted <= num_blocks - ledger.gather("num_reserved_blocks", slots)
    has_room &= ledger.gather("num_legs", slots) < ledger.gather("max_batch_size", slots)
    return slots if has_room.all() else slots[has_room]
