"""Room comes before rank: who can take this request at all.

Prefill: a worker that says how many prompt tokens it wants ahead gets no more than those, so that
a prompt nobody can start on waits where it can still go to anyone. Tokens it holds already cost it
nothing and do not count.

Decode: who can hold this request's KV.
A worker without KV blocks for a request preempts somebody sooner or later, which costs far more
than any imbalance; so capacity comes first, and only workers with room are ranked. Room counts
what is promised, not what the engine sees: KV in flight is not there yet. Output we expect is
counted in, but never beyond the worker's whole cache: a pessimistic estimate must not keep a
request waiting for ever that the worker, once empty, can serve.
"""

from __future__ import annotations

import numpy as np

from baton.policy.base import RequestFacts
from baton.policy.ledger import COLUMNS, Ledger, Pool, Vector, WorkerAccount

_LEGS, _RESERVED, _BLOCKS, _MAX_BATCH, _BLOCK_SIZE = (
    COLUMNS.index(name)
    for name in ("num_legs", "num_reserved_blocks", "num_blocks", "max_batch_size", "block_size_tokens")
)


def num_blocks_wanted(facts: RequestFacts, account: WorkerAccount) -> int:
    """Blocks for the prompt and the output we expect, as `slots_with_room` counts them."""
    tokens = facts.num_prompt_tokens + facts.num_expected_output_tokens
    wanted = account.num_blocks_for(tokens)
    return min(wanted, max(account.capacity.num_blocks, account.num_blocks_for(facts.num_prompt_tokens + 1)))


def slots_with_prefill_room(
    facts: RequestFacts, ledger: Ledger, pool: Pool, hit_tokens_by_slot: Vector | None = None
) -> Vector:
    """Those of a prefill pool on which `has_prefill_room` is true of this prompt's uncached tokens."""
    slots = pool.slots
    if not pool.has_windows:
        return slots
    num_queued = ledger.gather("num_queued_tokens", slots)
    num_ahead = num_queued + facts.num_prompt_tokens
    if hit_tokens_by_slot is not None:
        num_ahead -= hit_tokens_by_slot.take(slots)
    fits = num_ahead <= ledger.gather("prefill_window_tokens", slots)
    if fits.all():
        return slots
    startable: Vector = slots[fits | (num_queued == 0)]
    return startable


def has_room(facts: RequestFacts, account: WorkerAccount) -> bool:
    """A place in the batch, and blocks for prompt and expected output."""
    return (
        account.num_legs < account.capacity.max_batch_size
        and num_blocks_wanted(facts, account) <= account.num_unreserved_blocks
    )


def lack_of_prefill_room(account: WorkerAccount) -> str:
    """For people: why a prompt that did not fit must wait."""
    return f"{account.num_queued_tokens} tokens queued, window {account.prefill_window_tokens}"


def lack_of_room(facts: RequestFacts, account: WorkerAccount) -> str:
    if account.num_legs >= account.capacity.max_batch_size:
        return f"{account.num_legs} legs, at most {account.capacity.max_batch_size}"
    return f"{account.num_unreserved_blocks} blocks free, {num_blocks_wanted(facts, account)} wanted"


def slots_with_room(facts: RequestFacts, ledger: Ledger, slots: Vector) -> Vector:
    """Those of `slots` on which `has_room` is true of this request."""
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
