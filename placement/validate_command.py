"""`baton plan --validate FLEET.yaml`: how well the simulator foretells the fleet that runs now.

Exit codes: 0 the table was made (agreement is for the reader to judge), 1 the fleet could not be reached
or refused everything, 2 the question makes no sense.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from baton.contract.errors import ServingError
from baton.launch.fleet_file import FleetFileError, read_fleet_file
from baton.settings import SettingsError, load, option
from baton.step_time.profile import ProfileError, load_profile
from baton.wire.endpoints import DEFAULT_CLIENT_ADDRESS
from baton.workload import WorkloadError
from placement.running import NotPredictable, predicted_fleet
from placement.slo import Slo
from placement.validate import as_json, table, validate
from placement.workload import load_workload

EXIT_FAILED, EXIT_USAGE = 1, 2
KNEE_REQUESTS = 4_000
"""Simulated, to find the knee: more than are sent, so that it is the workload's and not the sample's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateSettings:
    validate: str | None = option(None, "the file that the running fleet was started with", metavar="FLEET")
    coordinator: str = option(
        DEFAULT_CLIENT_ADDRESS, "the coordinator's ZeroMQ door for clients", metavar="HOST:PORT"
    )
    profile: str | None = option(
        None,
        "step times, made by `baton profile`; simulated workers need none",
        metavar="FILE",
    )
    workload: str | None = option(
        None, "trace file, histogram or PROMPT/OUTPUT lengths such as lognormal:400,1/fixed:16"
    )
    burstiness: float | None = option(
        None, "CV of the gaps between arrivals, 1 is Poisson; absent: as recorded"
    )
    ttft: float | None = option(None, "longest time to first token, seconds")
    tpot: float | None = option(None, "longest time per output token after the first, seconds")
    attainment: float = option(0.9, "share of requests that must keep both; decides which rates are tried")
    rates: str | None = option(
        None, "requests per second to try, like 1,2,4; absent: six around the predicted knee"
    )
    num_requests: int = option(200, "sent at each rate; the first tenth is not counted")
    seed: int = option(0, "of all draws")
    json: bool = option(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        for name in ("validate", "workload"):
            if getattr(self, name) is None:
                raise SettingsError(f"--{name} is missing")
        if self.num_requests < 20:
            raise SettingsError(f"--num-requests is {self.num_requests}, expected at least 20")
        self.wished_rates()

    def wished_rates(self) -> list[float] | None:
        if self.rates is None:
            return None
        try:
            found = [float(part) for part in self.rates.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < rate < float("inf") for rate in found):
            raise SettingsError(f"--rates is {self.rates!r}, expected numbers above 0 like 1,2,4")
        return found


BAD_QUESTION = (
    SettingsError, FleetFileError, ProfileError, WorkloadError, NotPredictable, ValueError,
)  # fmt: skip


def main(argv: list[str]) -> int:
    settings = load(
        ValidateSettings, argv, prog="baton plan --validate",
        description="Sends a workload to the running fleet and prints predicted beside observed attainment.",
    )  # fmt: skip
    try:
        return _run(settings)
    except BAD_QUESTION as error:
        print(f"baton plan --validate: {error}", file=sys.stderr)
        return EXIT_USAGE
    except ServingError as error:
        print(f"baton plan --validate: {settings.coordinator}: {error}", file=sys.stderr)
        return EXIT_FAILED


def _run(settings: ValidateSettings) -> int:
    assert settings.validate is not None and settings.workload is not None
    slo = Slo(ttft_s=settings.ttft, tpot_s=settings.tpot, attainment=settings.attainment)
    file = read_fleet_file(settings.validate)
    profile = None if settings.profile is None else load_profile(settings.profile)
    workload = load_workload(
        settings.workload, burstiness=settings.burstiness, prefix_hits=0.0, seed=settings.seed
    )
    (knee_requests,) = workload.request_sets(KNEE_REQUESTS, num_sets=1, seed=settings.seed + 1)
    (drawn,) = workload.request_sets(settings.num_requests, num_sets=1, seed=settings.seed)
    requests = drawn.first(settings.num_requests)
    longest = max(knee_requests.max_prompt_tokens, requests.max_prompt_tokens)
    fleet = predicted_fleet(file, profile, longest_prompt=longest)
    found = validate(
        settings.coordinator, fleet, requests, knee_requests, slo,
        rates_per_s=settings.wished_rates(), say=_say,
    )  # fmt: skip
    print(json.dumps(as_json(found), indent=1) if settings.json else table(found, slo))
    return EXIT_FAILED if all(row.num_failed == settings.num_requests for row in found.rows) else 0


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)
