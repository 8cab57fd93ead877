"""Prefixes on their way: what a worker will hold once it has computed what it was just given.

Until the first KV events of a prompt arrive, its worker looks as cold as all others, and a burst
of the same prompt would scatter over the fleet. So each routed prompt is expected at its worker
until its events must have arrived (`settle`, after the prefill's end), or the time is up.

A prompt is remembered not block by block but at checkpoints: every depth up to 15 blocks, then
eight depths per doubling, and its own end. A later prompt finds its longest checkpoint, so an
expected hit is at most an eighth short, exact for an equal prompt, and never too long. Remembering
3,750 blocks takes about 80 entries instead; a prompt nobody waits for costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from baton.policy.ledger import Vector
from baton.policy.prefix_hash import PromptHashes


@lru_cache(maxsize=4096)
def checkpoints(num_blocks: int) -> Vector:
    """1..15, then 16, 18, 20, ... 30, 32, 36, ...: depths with four significant bits."""
    depths = list(range(1, min(15, num_blocks) + 1))
    step = 2
    while len(depths) >= 15 and depths[-1] < num_blocks:
        depths += [depth for depth in range(8 * step, 16 * step, step) if depth <= num_blocks]
        if 16 * step > num_blocks:
            break
        step *= 2
    return np.array(depths, dtype=np.int64)


class Expectations:
    def __init__(self, ttl_s: float = 60.0) -> None:
        """`ttl_s`: how long a prompt is expected at most; longer than prefills take."""
        self._ttl_s = ttl_s
        self._slots_at: dict[int, dict[int, int]] = {}
        """Value → worker slots expected to hold it, with how many prompts say so."""
        self._prompts: dict[str, tuple[int, float, list[int]]] = {}
        """By handoff id, oldest first: slot, when it expires, values."""
        self.num_expired = 0

    def __len__(self) -> int:
        return len(self._prompts)

    def expect(self, handoff_id: str, slot: int, prompt: PromptHashes, now_s: float) -> None:
        """After the decision. Hashes the whole prompt, if that was not needed before."""
        self.expire(now_s)
        if not prompt.num_blocks or handoff_id in self._prompts:
            return
        depths = checkpoints(prompt.num_blocks)
        values = prompt.values(depths)
        if depths[-1] != prompt.num_blocks:
            values.append(prompt.value(prompt.num_blocks))
        self._prompts[handoff_id] = (slot, now_s + self._ttl_s, values)
        for value in values:
            slots = self._slots_at.setdefault(value, {})
            slots[slot] = slots.get(slot, 0) + 1

    def settle(self, handoff_id: str) -> None:
        """The engine's events tell the truth from here on; or the request is over."""
        prompt = self._prompts.pop(handoff_id, None)
        if prompt is None:
            return
        slot, _, values = prompt
        for value in values:
            slots = self._slots_at[value]
            if slots[slot] > 1:
                slots[slot] -= 1
            else:
                del slots[slot]
                if not slots:
                    del self._slots_at[value]

    def forget(self, slot: int) -> None:
        """The worker is gone, or has lost its cache."""
        for handoff_id in [h for h, (at, _, _) in self._prompts.items() if at == slot]:
            self.settle(handoff_id)

    def expire(self, now_s: float) -> None:
        while self._prompts:
            handoff_id = next(iter(self._prompts))
            if self._prompts[handoff_id][1] > now_s:
                return
            self.num_expired += 1
            self.settle(handoff_id)

    def match(self, prompt: PromptHashes) -> Iterator[tuple[int, int]]:
        """(slot, blocks), depths ascending, so the last one of a slot counts."""
        if not self._slots_at or not prompt.num_blocks:
            return
        get = self._slots_at.get
        last = 0
        for depth in checkpoints(prompt.num_blocks).tolist():
            slots = get(prompt.value(depth))
            if slots is None:
                break
            last = depth
            for slot in slots:
                yield slot, depth
        else:
            if last != prompt.num_blocks:
                for slot in get(prompt.value(prompt.num_blocks)) or ():
                    yield slot, prompt.num_blocks
