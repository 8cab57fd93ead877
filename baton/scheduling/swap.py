"""Which KV leaves memory for the host, and which comes back, a few steps ahead of need.

Preemption at every token keeps more requests half-done than fit into memory. FastServe's answer: copy
the KV of those who will not run for long (largest estimated wait first) to host memory *before* its
blocks are needed, and bring it back *before* its owner's turn, both beside the computation. So:

* **back up** residents from the far end of the order, ahead of need: a host copy costs no memory here;
* **evict** only who has a complete host copy (just the blocks are given up, nothing moves), the largest
  wait first, and only as much as the coming steps and the reserve want. Nothing is ever computed twice;
* **bring back** the smallest wait first, into what is free beyond the reserve.

The reserve is for arrivals: a request that has just come goes to the front, and its KV must fit at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Holding(NamedTuple):
    """One request's KV. Blocks on the device are given up all at once or kept all."""

    num_blocks: int
    """Needed to run: on the device, or on the host when it is swapped out."""
    num_backed_blocks: int = 0
    """Of these, with a copy on the host. The last, unfinished block of a running request has none."""
    is_movable: bool = True
    """Not while a transfer or a step in flight touches it."""

    @property
    def is_backed(self) -> bool:
        return self.num_backed_blocks >= self.num_blocks


@dataclass(frozen=True, slots=True)
class SwapChoice:
    back_up: tuple[str, ...] = ()
    """Copy to the host what is not there yet; they stay resident."""
    evict: tuple[str, ...] = ()
    """Give up the device's blocks now, in this order."""
    bring_back: tuple[str, ...] = ()
    """Fetch from the host now, in this order."""
    num_blocks_short: int = 0
    """Wanted and not to be had without giving up KV that has no copy: the engine stalls or recomputes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapRule:
    """Pure: holdings and order in, moves out."""

    reserve_blocks: int
    """Kept free for arrivals."""
    lookahead_blocks: int = 0
    """So many blocks beyond the reserve are kept ready to be given up: what the next few steps may take."""
    max_moves: int = 8
    """Requests that start to move in one step, each way: the link is shared with the KV hand-off."""

    def choose(
        self,
        order: Sequence[str],
        waits: Mapping[str, float],
        away: Collection[str],
        holding: Callable[[str], Holding],
        *,
        num_places: int,
        num_free_blocks: int,
        num_growth_blocks: int,
        num_arriving_blocks: int = 0,
    ) -> SwapChoice:
        """`order`: whoever has KV, best first; `away`: those of them whose KV is on the host. `holding` is
        asked about few: who may leave, until enough may, and who is away.
        `num_growth_blocks`: what the next step's runners need beyond what they have;
        `num_arriving_blocks`: what requests that are about to get KV for the first time need."""
        runs_next, later = order[:num_places], order[num_places:]
        leaving_order = sorted(
            (job_id for job_id in later if job_id not in away), key=waits.__getitem__, reverse=True
        )
        returning = [
            (job_id, held) for job_id in runs_next if job_id in away and (held := holding(job_id)).is_movable
        ]
        wanted = num_growth_blocks + num_arriving_blocks + sum(held.num_blocks for _, held in returning)
        short = max(0, wanted + self.reserve_blocks - num_free_blocks) if wanted else 0

        evict: list[str] = []
        back_up: list[str] = []
        freed = ready = 0
        num_ready_wanted = self.lookahead_blocks if self._is_tight(num_free_blocks) else 0
        for job_id in leaving_order:
            may_back_up = len(back_up) < self.max_moves and (short > 0 or ready < num_ready_wanted)
            if short <= 0 and not may_back_up:
                break
            held = holding(job_id)
            if not held.is_movable:
                continue
            if not held.is_backed:
                if may_back_up:
                    back_up.append(job_id)
                    ready += held.num_blocks
            elif short > 0:
                evict.append(job_id)
                short -= held.num_blocks
                freed += held.num_blocks
            else:
                ready += held.num_blocks
        room = num_free_blocks + freed - num_growth_blocks - num_arriving_blocks
        bring_back: list[str] = []
        for job_id, held in returning[: self.max_moves]:
            if held.num_blocks > room:
                break
            room -= held.num_blocks
            bring_back.append(job_id)
        # Ahead of their turn: whoever comes next, while more than the reserve stays free.
        for job_id in later if away else ():
            if len(bring_back) >= self.max_moves or len(bring_back) < len(returning):
                break
            if job_id not in away or not (held := holding(job_id)).is_movable:
                continue
            if held.num_blocks > room - self.reserve_blocks:
                break
            room -= held.num_blocks
            bring_back.append(job_id)
        missing = max(0, num_growth_blocks + num_arriving_blocks - num_free_blocks - freed)
        return SwapChoice(tuple(back_up), tuple(evict), tuple(bring_back), missing)

    def may_move(self, num_free_blocks: int, num_wanted_blocks: int) -> bool:
        """False: with nobody swapped out there is nothing to do, whoever holds what."""
        return self._is_tight(num_free_blocks) or num_wanted_blocks + self.reserve_blocks > num_free_blocks

    def _is_tight(self, num_free_blocks: int) -> bool:
        return num_free_blocks < self.reserve_blocks + self.lookahead_blocks
