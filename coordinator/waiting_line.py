"""Requests without a worker: first come, first served, and how long that takes. No I/O.

Who ends while waiting leaves at once: a line that still counted requests whose clients have gone
would refuse those who are there.
"""

from __future__ import annotations

from collections import OrderedDict

from coordinator.drain_rate import DrainRate
from coordinator.request import Request

MAX_RETRY_AFTER_S = 30.0
"""Longest time a client is sent away for; clients give up on longer ones or forget to come back."""
UNMEASURED_RETRY_AFTER_S = 5.0
"""Before anything left the line: soon enough to look again, too seldom to make the overload worse."""


class WaitingLine:
    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self._rate = DrainRate()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def head(self) -> Request:
        return next(iter(self._requests.values()))

    def join(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def put_first(self, request: Request) -> None:
        """One that had been served already and has lost its worker."""
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def leave(self, request: Request) -> None:
        """Ended while it waited; does nothing for one that does not wait."""
        self._requests.pop(request.request_id, None)

    def depart(self, request: Request, now_s: float) -> None:
        """To its workers."""
        del self._requests[request.request_id]
        self._rate.departed(now_s)

    def settle(self, now_s: float) -> None:
        """Call when everything that can leave has left."""
        self._rate.waits(bool(self._requests), now_s)

    def wait_s(self, now_s: float) -> float | None:
        """Expected, of a request that joins now; None: not known."""
        return self._rate.seconds_for(len(self._requests), now_s) if self._requests else 0.0

    def retry_after_s(self, now_s: float) -> float:
        """When those who wait now will have left: 1 to MAX_RETRY_AFTER_S."""
        wait_s = self.wait_s(now_s)
        if wait_s is None:
            return UNMEASURED_RETRY_AFTER_S
        return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))
