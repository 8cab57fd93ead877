"""How patient the two halves of a hand-off are. The same on NIXL and between simulated engines: the twin
would otherwise fail and recover at other times than what it stands for."""

from __future__ import annotations

SILENCE_S = 10.0
"""A destination that hears nothing of a source for so long gives the hand-off up. Several times
REASSURE_EVERY_S: one lost word is no silence."""

REASSURE_EVERY_S = 2.0
"""A source that has nothing to write yet says that it is there."""

RESEND_S = 1.0
"""A message that was not answered is sent again."""

TIMER_S = 0.2
"""Both halves look at their deadlines so often."""

MAX_OUTSTANDING_BYTES = 1 << 30
"""Of a source's writes in flight to one destination. What exceeds it waits behind the cursor."""
