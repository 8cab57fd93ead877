"""Who may promise blocks next. Reserved blocks hold nothing yet, so too many of them starve decoding.

Strictly first come, first served. A hand-off that asked first and did not fit must not be overtaken by a
smaller one: its prompt may already fill the prefill worker, whose prefill the overtaker waits for.
"""

from __future__ import annotations


class CreditLine:
    """Credits are blocks reserved and not yet activated."""

    def __init__(self, *, max_reserved_blocks: int) -> None:
        self._max_reserved_blocks = max_reserved_blocks
        self._granted: dict[str, int] = {}
        self._waiting: dict[str, None] = {}
        """In order of asking."""

    @property
    def num_reserved_blocks(self) -> int:
        return sum(self._granted.values())

    def ask(self, handoff_id: str, num_blocks: int) -> bool:
        """Call again until it says True, or `give_back`. One that is larger than the limit is granted
        when nothing else is reserved: it would otherwise wait for ever."""
        if handoff_id in self._granted:
            return True
        self._waiting[handoff_id] = None
        is_next = next(iter(self._waiting)) == handoff_id
        fits = self.num_reserved_blocks + num_blocks <= self._max_reserved_blocks
        if not is_next or not (fits or not self._granted):
            return False
        del self._waiting[handoff_id]
        self._granted[handoff_id] = num_blocks
        return True

    def give_back(self, handoff_id: str) -> None:
        """Activated, freed, or left the line."""
        self._granted.pop(handoff_id, None)
        self._waiting.pop(handoff_id, None)
