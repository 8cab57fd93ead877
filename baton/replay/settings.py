"""What is replayed on: a fleet, its policies, its engines' pace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from baton.policy.base import Policy
from baton.policy.stay_or_go import Pace
from baton.simulation import SimulatedWorkerSettings
from baton.step_time import KvLink, StepTime

EXPECTED_OUTPUT_TOKENS = 256
"""As the coordinator's default: clients rarely say how long an answer will be."""


@dataclass(frozen=True, slots=True)
class FleetShape:
    num_prefill: int
    num_decode: int
    num_both: int = 0
    """Workers that serve both phases."""

    def __str__(self) -> str:
        split = f"{self.num_prefill}P{self.num_decode}D" if self.num_prefill or self.num_decode else ""
        return split + (f"{self.num_both}both" if self.num_both else "")

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode + self.num_both

    @property
    def is_colocated(self) -> bool:
        """There are only workers that serve both phases."""
        return not self.num_prefill and not self.num_decode


def parse_fleet(text: str) -> FleetShape:
    """`8P8D`, `16both` or `4P4D2both`. Raises ValueError saying so."""
    found = re.fullmatch(r"(?:(\d+)[pP](\d+)[dD])?(?:(\d+)both)?", text)
    # A number that is there is at least 1.
    if text and found and all(number is None or int(number) for number in found.groups()):
        return FleetShape(*(int(number or 0) for number in found.groups()))
    raise ValueError(f"a fleet is written like 8P8D, 16both or 4P4D2both, not {text!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    fleet: FleetShape
    worker: SimulatedWorkerSettings
    """Of every worker; `blocks_per_hash` and the switches for cache and events are set by the replay."""
    prefill_time: StepTime
    decode_time: StepTime
    prefill_policy: str | Policy = "lmetric"
    """A name, or an object without memory (it is shared by all replays of these settings). Also ranks the
    workers of a colocated fleet."""
    decode_policy: str = "smallest-batch"
    link: KvLink | None = None
    """None: KV moves in no time."""
    kv_bytes_per_token: int = 0
    expected_output_tokens: int = EXPECTED_OUTPUT_TOKENS
    prefill_window_tokens: int | None = None
    """Prompt tokens ahead of a prefill worker beyond which prompts wait at the coordinator."""
    has_stay_or_go: bool = True
    """As the coordinator: a prompt may be computed by the decode worker that holds most of it."""
    pace: Pace | None = None
    """What stay-or-go counts with; None: learnt on the way, as by a coordinator that just started."""
    first_token_by: Literal["prefill", "decode"] = "prefill"
    """Who says the first token. By decode it comes after the transfer and one decode step."""
    report_delay_s: float = 0.0
    """How late the coordinator hears of KV events and prefill progress."""
    has_guard: bool = True
    """The hotspot guard, as the coordinator has it wherever prefixes are known."""
    queue_timeout_s: float | None = None
    """Longest wait at the coordinator; None: for ever."""
    is_closed_loop: bool = False
    """A session's next turn comes its think time after the answer, not at its recorded time."""
    prefill_scheduler: str = "fcfs"
    """Order of prompts on a prefill worker, see `baton.scheduling`."""
    decode_scheduler: str = "fcfs"
    """Order of legs on a decode or colocated worker."""
    swap_link: KvLink | None = None
    """To host memory, for legs that lose their blocks; None: they compute everything again."""
    seed: int = 0
