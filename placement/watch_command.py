"""`baton plan --watch WORKLOAD.jsonl --running FLEET.yaml …`: says when the plan is stale. Advice only.

Exit codes with --once: 0 fresh, 4 stale, 2 the question makes no sense or too little was recorded.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from baton.launch.fleet_file import FleetFile, FleetFileError, read_fleet_file
from baton.settings import SettingsError, load, option
from baton.workload import WorkloadError
from placement.__main__ import BAD_QUESTION, EXIT_USAGE, question
from placement.settings import PlanSettings
from placement.watch import Advice, Recorded, advise, read_recorded, running_plan, sentence

EXIT_STALE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings(PlanSettings):
    watch: str | None = option(None, "what `baton coordinator --workload-log FILE` writes", metavar="FILE")
    running: str | None = option(None, "the file that the fleet was started with", metavar="FLEET.yaml")
    window_s: float = option(3600.0, "the latest so many seconds count")
    every_s: float = option(300.0, "between two looks")
    once: bool = option(False, "one look; the exit code tells: 0 fresh, 4 stale")

    def __post_init__(self) -> None:
        if self.running is None:
            raise SettingsError("--running is missing: the file that the fleet was started with")
        if self.workload is not None or self.rate is not None:
            raise SettingsError("--workload and --rate are what is recorded, leave them out")
        for name in ("window_s", "every_s"):
            if not getattr(self, name) > 0:
                raise SettingsError(
                    f"--{name.replace('_', '-')} is {getattr(self, name):g}, expected more than 0"
                )
        object.__setattr__(self, "workload", self.watch)
        PlanSettings.__post_init__(self)


def main(argv: list[str]) -> int:
    settings = load(
        WatchSettings, argv, prog="baton plan --watch",
        description="Compares the running plan with what the coordinator recorded, and advises.",
    )  # fmt: skip
    assert settings.running is not None
    try:
        file = read_fleet_file(settings.running)
        while True:
            code = _look(settings, file)
            if settings.once:
                return code
            time.sleep(settings.every_s)
    except (*BAD_QUESTION, FleetFileError) as error:
        print(f"baton plan --watch: {error}", file=sys.stderr)
        return EXIT_USAGE


def _look(settings: WatchSettings, file: FleetFile) -> int:
    assert settings.watch is not None
    try:
        recorded = read_recorded(Path(settings.watch), window_s=settings.window_s)
    except WorkloadError:
        if settings.once:
            raise
        print(f"{_now()} waiting for requests in {settings.watch}", flush=True)
        return 0
    problem, _, _ = question(settings, recorded.workload)
    plan = running_plan(file)
    advice = advise(replace(problem, rate_per_s=None), plan, recorded.rate_per_s)
    if settings.json:
        print(json.dumps(_as_json(advice, recorded)), flush=True)
    else:
        print(f"{_now()} {sentence(advice, plan, recorded)}", flush=True)
    return EXIT_STALE if advice.is_stale else 0


def _as_json(advice: Advice, recorded: Recorded) -> dict[str, object]:
    found = advice.suggestion
    return {
        "stale": advice.is_stale,
        "reason": advice.reason,
        "rate_per_s": recorded.rate_per_s,
        "num_requests": recorded.num_requests,
        "predicted_attainment": advice.attainment,
        "highest_per_s": advice.highest_per_s,
        "suggestion": None if found is None else str(found.plan),
        "suggested_gpus": None if found is None else found.plan.num_gpus,
    }


def _now() -> str:
    return time.strftime("%H:%M:%S")
