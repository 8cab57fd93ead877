"""What a prefill worker can be told, beside what any worker can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.settings import SettingsError, option
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWorkerSettings(WorkerSettings):
    kv_lease_s: int = option(
        30, "how long a finished prompt's KV is held for the decode worker, seconds; reads take milliseconds"
    )
    prefill_window_tokens: int | None = option(
        None,
        "prompt tokens this worker takes ahead of what it has computed; a longer prompt comes alone, the "
        "rest waits at the coordinator; absent: 512 on cpu, 32768 on cuda",
    )

    scheduler: Literal["fcfs", "shortest-prefill"] | None = option(
        None,
        "which prompt is computed next: fcfs, first come first served, or shortest-prefill, the one with "
        "least left to compute, with ageing (docs/scheduling.md); absent: shortest-prefill with vllm",
    )

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a new class, which the implicit one does not know (3.11).
        WorkerSettings.__post_init__(self)
        if self.kv_lease_s < 1:
            raise SettingsError(f"kv_lease_s is {self.kv_lease_s}, expected at least 1")
        if self.prefill_window_tokens is not None and self.prefill_window_tokens < 1:
            raise SettingsError(f"prefill_window_tokens is {self.prefill_window_tokens}, expected at least 1")
        if self.scheduler == "shortest-prefill" and self.engine == "simulated":
            raise SettingsError(f"the simulated engine is first come first served, not {self.scheduler}")
