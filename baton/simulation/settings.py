"""What one simulated worker is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedWorkerSettings:
    num_blocks: int
    block_size_tokens: int
    blocks_per_hash: int = 1
    """KV blocks that one hash of a prompt names. Traces hash 512 tokens at a time: with 8 blocks of 64
    the worker looks up, moves and announces 512 tokens at once, and still counts and evicts by block."""
    max_batch_size: int = 256
    max_num_batched_tokens: int = 8_192
    """Per step: one for each decoding leg, the rest for prompts."""
    has_prefix_cache: bool = True
    has_kv_events: bool = True
    """Off where nobody reads them."""
    can_swap: bool = False
    """KV of preempted legs is kept in host memory (copied ahead of need, so leaving costs no time) and
    fetched again when they return; otherwise it is computed again."""
    reserved_share: float = 0.5
    """Of the blocks: as many may be promised to streams and still be empty (`baton.handoff.credits`)."""

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size_tokens",
            "blocks_per_hash",
            "max_batch_size",
            "max_num_batched_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.reserved_share <= 1:
            raise ValueError(f"reserved_share is {self.reserved_share:g}, expected more than 0, at most 1")

    @property
    def hash_tokens(self) -> int:
        return self.block_size_tokens * self.blocks_per_hash

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)
