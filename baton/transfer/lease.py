"""When held KV may be read, as arithmetic on one host's monotonic clock. No I/O.

The source frees a prompt's blocks when its lease ends and may overwrite them a moment later. A read
that ends after that returns bytes of another prompt, and nothing in the transfer says so: the only
defence is to know the time. So a reader keeps a margin before the end of the lease, starts nothing
inside it, and throws away what finished inside it.

Time left travels in messages, and messages may lie in queues while a process stands still. Each hop
takes that time off: the coordinator what passed since dispatch and the prefill engine does not account
for, the decode worker the age of its order, told on its own clock (`StartDecode.sent_s`). The margin
pays for the rest: the time between the end of a transfer and the step that notices.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_LEASE_S = 30.0
DEFAULT_MARGIN_S = 2.0
DEFAULT_PULL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ReadWindow:
    """How long the KV of one hand-off can be trusted."""

    lease_end_s: float
    margin_s: float
    pull_timeout_s: float

    @classmethod
    def opened(cls, *, now_s: float, lease_s: float, margin_s: float, pull_timeout_s: float) -> ReadWindow:
        """`lease_s` is the time left at `now_s`."""
        return cls(lease_end_s=now_s + lease_s, margin_s=margin_s, pull_timeout_s=pull_timeout_s)

    @property
    def last_end_s(self) -> float:
        """A read that was seen to end at or after this time is not to be trusted."""
        return self.lease_end_s - self.margin_s

    def may_start(self, now_s: float) -> bool:
        return now_s < self.last_end_s

    def deadline_s(self, started_s: float) -> float:
        """When to give up a read that started at `started_s`: the lease's end or a stalled peer."""
        return min(self.last_end_s, started_s + self.pull_timeout_s)

    def is_trusted(self, *, ended_s: float) -> bool:
        return ended_s < self.last_end_s


def time_left_s(*, lease_end_s: float, now_s: float) -> float:
    """What a source puts on the wire; never negative."""
    return max(0.0, lease_end_s - now_s)


def num_tokens_to_pull(*, num_held: int, num_wanted: int, num_cached: int) -> int:
    """Tokens to fetch when the source holds the first `num_held` of the reader's `num_wanted`
    prompt tokens and the reader has the first `num_cached` itself.

    `num_wanted` is one more than `num_held` when the source's first output token has been appended
    to the prompt: its KV was never computed there, so the reader computes it. Claiming it as held
    would ask for a block the source does not have whenever `num_held` fills its last block.
    """
    return max(0, min(num_held, num_wanted) - num_cached)
