"""The simulated engine's blocks: free, used by legs, or held for a reader under a lease.

Hold ids carry a random part, so that a restarted source on the same port never answers for its
predecessor.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from baton.clock import Clock


@dataclass(frozen=True, slots=True)
class Hold:
    handoff_id: str
    kv: int
    num_blocks: int
    end_s: float


class HoldTable:
    """Finished prompts that wait to be read. All leases are equally long, so the oldest ends first."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._holds: dict[str, Hold] = {}
        self._id_by_handoff: dict[str, str] = {}
        self._boot = secrets.token_hex(4)
        self._num_made = 0

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, handoff_id: str, kv: int, num_blocks: int, now_s: float) -> str:
        self._num_made += 1
        hold_id = f"{self._boot}-{self._num_made}"
        self._holds[hold_id] = Hold(handoff_id, kv, num_blocks, now_s + self.lease_s)
        self._id_by_handoff[handoff_id] = hold_id
        return hold_id

    def take(self, hold_id: str) -> Hold | None:
        """Call `expire` first: a hold whose lease has ended must not be read."""
        hold = self._holds.pop(hold_id, None)
        if hold is not None:
            self._id_by_handoff.pop(hold.handoff_id, None)
        return hold

    def take_of(self, handoff_id: str) -> Hold | None:
        hold_id = self._id_by_handoff.get(handoff_id)
        return None if hold_id is None else self.take(hold_id)

    def expire(self, now_s: float) -> int:
        """Lets go of what has ended; how many blocks that frees."""
        num_blocks = 0
        while (end_s := self.next_end_s()) is not None and end_s <= now_s:
            hold = self.take(next(iter(self._holds)))
            assert hold is not None
            num_blocks += hold.num_blocks
        return num_blocks

    def next_end_s(self) -> float | None:
        return next((hold.end_s for hold in self._holds.values()), None)


class KvCache:
    """Counts blocks; `on_freed` is called whenever there are more of them."""

    def __init__(self, num_blocks: int, lease_s: float, clock: Clock, on_freed: Callable[[], None]) -> None:
        self.num_free_blocks = num_blocks
        self._clock = clock
        self._on_freed = on_freed
        self._holds = HoldTable(lease_s)
        self._lease_timer: asyncio.TimerHandle | None = None

    def take(self, num_blocks: int) -> bool:
        """False: so many are not free, and none was taken."""
        if num_blocks > self.num_free_blocks:
            return False
        self.num_free_blocks -= num_blocks
        return True

    def free(self, num_blocks: int) -> None:
        self.num_free_blocks += num_blocks
        self._on_freed()

    def hold(self, handoff_id: str, kv: int, num_blocks: int) -> str:
        """Taken blocks stay taken until they are read, let go, or the lease ends. Returns the hold id."""
        hold_id = self._holds.add(handoff_id, kv, num_blocks, self._clock.now_s())
        self._arm_lease_timer()
        return hold_id

    def read(self, hold_id: str) -> int | None:
        """The KV, once; None when its lease has ended or it was read before."""
        self.expire()
        return self._freed(self._holds.take(hold_id))

    def let_go(self, handoff_id: str) -> None:
        self._freed(self._holds.take_of(handoff_id))

    def expire(self) -> None:
        num_blocks = self._holds.expire(self._clock.now_s())
        if num_blocks:
            self.free(num_blocks)

    def stop(self) -> None:
        if self._lease_timer is not None:
            self._lease_timer.cancel()
            self._lease_timer = None

    def _freed(self, hold: Hold | None) -> int | None:
        if hold is None:
            return None
        self.free(hold.num_blocks)
        return hold.kv

    def _arm_lease_timer(self) -> None:
        """One timer for the oldest hold wakes legs that wait for its blocks."""
        end_s = self._holds.next_end_s()
        if self._lease_timer is None and end_s is not None:
            wait_s = max(0.0, end_s - self._clock.now_s())
            self._lease_timer = asyncio.get_running_loop().call_later(wait_s, self._on_lease_timer)

    def _on_lease_timer(self) -> None:
        self._lease_timer = None
        self.expire()
        self._arm_lease_timer()
