"""Which blocks are signed on the prefill side and compared on the decode side, and under which tag. Pure.

A block's tag names the tokens of its prompt up to the block's end. It is part of what is compared
(`kv_digest`): another prompt's block, intact and signed by its own right, is still refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

TAG_BYTES = 8


@dataclass(frozen=True, slots=True)
class TaggedBlocks:
    """Blocks of one prompt, in order, and the tag of each (64 bits, signed)."""

    block_ids: list[int]
    tags: list[int]


@dataclass(slots=True)
class DigestOrders:
    """What the scheduler side tells the workers in one step."""

    to_sign: list[TaggedBlocks] = field(default_factory=list)
    """Computed when this step ends."""
    to_compare: dict[str, TaggedBlocks] = field(default_factory=dict)
    """By request, once their KV has arrived."""


def block_tags(token_ids: Sequence[int], block_size: int) -> list[int]:
    """One per block; the last block may be partly filled. About two microseconds each."""
    chain = blake2b(digest_size=TAG_BYTES)
    tags = []
    for start in range(0, len(token_ids), block_size):
        chain.update(array("i", token_ids[start : start + block_size]).tobytes())
        tags.append(int.from_bytes(chain.digest(), "little", signed=True))
    return tags


@dataclass(slots=True)
class _Prompt:
    tags: list[int]
    num_tokens: int
    block_ids: list[int] = field(default_factory=list)
    num_signed: int = 0


class DigestBook:
    """Scheduler side: follows prompts that will be handed off, and notes what arrives for which tokens."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._prompts: dict[str, _Prompt] = {}
        self._to_compare: dict[str, TaggedBlocks] = {}

    def begin_prompt(self, req_id: str, token_ids: Sequence[int]) -> None:
        """Its KV will be handed off. Told again when it is resumed: then it keeps what it knows."""
        if req_id not in self._prompts:
            self._prompts[req_id] = _Prompt(block_tags(token_ids, self._block_size), len(token_ids))

    def expect(self, req_id: str, block_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """These blocks, the last of `token_ids`'s, will be filled by somebody else."""
        if block_ids:
            tags = block_tags(token_ids, self._block_size)[-len(block_ids) :]
            self._to_compare[req_id] = TaggedBlocks(list(block_ids), tags)

    def end_prompt(self, req_id: str) -> None:
        self._prompts.pop(req_id, None)

    def on_step(self, steps: Iterable[tuple[str, list[int] | None, bool, int]]) -> DigestOrders:
        """`steps`: (request, new block ids, resumed after a preemption, tokens computed when the step is
        over). A preempted prompt gets other blocks, so all of them are signed again."""
        orders = DigestOrders(to_sign=list(self._sign(steps)), to_compare=self._to_compare)
        self._to_compare = {}
        return orders

    def _sign(self, steps: Iterable[tuple[str, list[int] | None, bool, int]]) -> Iterator[TaggedBlocks]:
        for req_id, new_block_ids, is_resumed, num_computed in steps:
            prompt = self._prompts.get(req_id)
            if prompt is None:
                continue
            if is_resumed:
                prompt.block_ids, prompt.num_signed = [], 0
            prompt.block_ids += new_block_ids or []
            is_whole = num_computed >= prompt.num_tokens
            num_ready = len(prompt.tags) if is_whole else num_computed // self._block_size
            if num_ready > prompt.num_signed:
                ready = slice(prompt.num_signed, num_ready)
                prompt.num_signed = num_ready
                yield TaggedBlocks(prompt.block_ids[ready], prompt.tags[ready])
