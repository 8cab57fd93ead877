"""What the fleet is asked to do: request traces read from files, re-timed, or made from a seed.

Lengths, times and prefix identities only, never text. Standard library and numpy; nothing here knows
about engines or policies.
"""

from baton.workload.files import read_trace, write_trace
from baton.workload.hotspot import HotspotWorkload
from baton.workload.lengths import Lengths, parse_lengths
from baton.workload.prompts import prompt_token_ids
from baton.workload.retiming import at_rate, retimed, sped_up, spread, with_session_starts
from baton.workload.sessions import SessionWorkload
from baton.workload.single_turn import SingleTurnWorkload
from baton.workload.trace import Trace, TraceRequest, WorkloadError

__all__ = [
    "HotspotWorkload",
    "Lengths",
    "SessionWorkload",
    "SingleTurnWorkload",
    "Trace",
    "TraceRequest",
    "WorkloadError",
    "at_rate",
    "parse_lengths",
    "prompt_token_ids",
    "read_trace",
    "retimed",
    "sped_up",
    "spread",
    "with_session_starts",
    "write_trace",
]
