"""What a prefill worker can be told, beside what any worker can."""

from __future__ import annotations

from dataclasses import dataclass

from baton.settings import SettingsError, option
from baton.worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWorkerSettings(WorkerSettings):
    kv_lease_s: int = option(
        30, "how long a finished prompt's KV is held for the decode worker, seconds; reads take milliseconds"
    )

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a new class, which the implicit one does not know (3.11).
        WorkerSettings.__post_init__(self)
        if self.kv_lease_s < 1:
            raise SettingsError(f"kv_lease_s is {self.kv_lease_s}, expected at least 1")
