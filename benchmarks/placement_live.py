"""The planner's simulator beside live fleets: 1P1D and 2P1D, of simulated engines and of real vLLM on CPU.

    python -m benchmarks.placement_live [--quick] [--engines simulated|vllm|both] [--profile FILE] [--json F]

Simulated engines take exactly the step times they are told, so their rows test the simulator's queues,
batches and hand-offs. Real engines are profiled first (`baton profile`), and their rows test everything.
They compute on a sixth of a core each (`benchmarks.slow_worker`), so that two cores hold them all. Each
fleet gets six rates around the knee that the simulator predicts; the same requests at the same times on both
sides.
Attainment must agree within 5 points away from the knee. Exit status as of scripts/bench.sh.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from baton.contract.errors import ServingError
from baton.launch.fleet_file import ROLES, FleetFile, NodeFleet
from baton.settings import as_flags
from baton.step_time import StepWork, prefill_pairs
from baton.step_time.profile import Profile, load_profile
from benchmarks import machine
from benchmarks.figures import Bar, Figure
from benchmarks.fleets import demo_model
from benchmarks.layout import DEMO_MODEL, SCRATCH
from benchmarks.live_fleet import LiveFleet
from benchmarks.samples import spread
from benchmarks.servers import NotReady
from coordinator.settings import CoordinatorSettings
from placement.running import predicted_fleet
from placement.slo import Slo
from placement.validate import AWAY_POINTS, Validation, as_json, table, validate
from placement.workload import load_workload

EXIT_NOT_READY, EXIT_BAR_MISSED = 3, 4
SHAPES = ((1, 1), (2, 1))
KNEE_REQUESTS = 4_000
PROFILE_BUDGET_S = 240.0
"""Its own default: three rounds of slowed engines, where 60 s do not suffice for one."""
REQUESTS_PER_RATE, REAL_REQUESTS_PER_RATE = 200, 120
COORDINATOR = {"prefill_policy": "p-token", "decode_policy": "smallest-batch"}
"""The policies that are simulated."""

TRANSFER = "pull"
"""What is simulated: a transfer begins when its prefill is over."""

SIMULATED = {
    "engine": "simulated",
    "simulated_step_time": "linear:base_s=0.005,per_prefill_token_s=1e-4,per_decode_s=5e-4",
    "simulated_transfer_s": 0.004,
    "transfer": TRANSFER,
    "max_num_batched_tokens": 1_024,
    "max_model_len": 4_096,
}
SIMULATED_WORKLOAD, SIMULATED_SLO = "uniform:100,1000/fixed:16", Slo(ttft_s=0.25, tpot_s=0.03)

REAL_WORKLOAD = "uniform:200,1000/fixed:8"
"""Outputs are short, so that the prefill workers are what saturates and leave the decode worker a core."""
REAL_SLACK = 4.0
"""The SLO of the real fleets, in multiples of what the profile says of a median request alone."""


def real_settings() -> dict[str, object]:
    return {
        "engine": "vllm", "model": str(DEMO_MODEL), "max_model_len": 2_048, "kv_cache_gib": 0.5,
        "transfer": TRANSFER,
    }  # fmt: skip


def fleet_file(num_prefill: int, num_decode: int, settings: dict[str, object]) -> FleetFile:
    node = {"prefill": NodeFleet(num_workers=num_prefill), "decode": NodeFleet(num_workers=num_decode)}
    return FleetFile(
        nodes=[node], settings={"coordinator": COORDINATOR, "prefill": settings, "decode": settings}
    )


@contextmanager
def running(file: FleetFile, name: str, *, is_slow: bool) -> Iterator[str]:
    """host:port of the ZeroMQ door of a fleet as the file says. Engines start one after the other: together
    they would share the cores and take longer."""
    folder = SCRATCH / "live"
    folder.mkdir(parents=True, exist_ok=True)
    with LiveFleet(name) as live:
        live.start_coordinator(*as_flags(CoordinatorSettings(**file.settings["coordinator"])))
        for role in ROLES:
            config = folder / f"{name}-{role}.yaml"
            config.write_text(yaml.safe_dump(file.settings.get(role, {})), encoding="utf-8")
            for number in range(file.num_workers(role)):
                live.start_worker(role, f"{role}-{number}", "--config", config, is_slow=is_slow)
                live.wait_until_registered()
        live.wait_until_ready()
        yield live.address


def measured_profile(path: Path) -> Profile:
    """Of the very engines that the fleets run; raises NotReady with its last words."""
    demo_model()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in real_settings().items()]
    argv = [
        sys.executable, "-m", "benchmarks.slow_worker", "profile", *flags,
        "--budget-s", str(PROFILE_BUDGET_S), "--out", str(path),
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise NotReady(f"baton profile ended with {done.returncode}: {done.stderr[-1500:]}")
    print(done.stdout, flush=True)
    return load_profile(path)


def slo_of(profile: Profile) -> Slo:
    model = profile.step_time()
    prompt_s = model.step_s(StepWork(600, prefill_pairs(600))) + profile.leg_overhead_s
    decode_s = model.step_s(StepWork(0, 0, 4, 4 * 600))
    return Slo(ttft_s=round(REAL_SLACK * prompt_s, 3), tpot_s=round(REAL_SLACK * decode_s, 3))


def run(
    name: str,
    file: FleetFile,
    profile: Profile | None,
    workload_text: str,
    slo: Slo,
    num_requests: int,
    rates: list[float] | None,
) -> Validation:
    workload = load_workload(workload_text, prefix_hits=0.0)
    (knee_requests,) = workload.request_sets(KNEE_REQUESTS, num_sets=1, seed=1)
    (drawn,) = workload.request_sets(num_requests, num_sets=1, seed=0)
    requests = drawn.first(num_requests)
    longest = max(knee_requests.max_prompt_tokens, requests.max_prompt_tokens)
    predicted = predicted_fleet(file, profile, longest_prompt=longest)
    with running(file, name, is_slow=profile is not None) as address:
        found = validate(
            address, predicted, requests, knee_requests, slo, rates_per_s=rates,
            say=lambda text: print(f"== {name}: {text}", file=sys.stderr, flush=True),
        )  # fmt: skip
    print(f"\n{name}: {workload_text}, {num_requests} requests a rate")
    print(table(found, slo), flush=True)
    return found


def figures_of(name: str, found: Validation) -> list[Figure]:
    away = [abs(row.difference) for row in found.rows if not row.is_at_knee]
    at_knee = [abs(row.difference) for row in found.rows if row.is_at_knee]
    figures = []
    if away:
        figures.append(
            Figure(
                row="placement_live",
                subject=f"{name}, largest difference away from the knee",
                unit="share",
                spread=spread([max(away)]),
                bar=Bar("<=", AWAY_POINTS),
                note=f"{len(away)} rates",
            )
        )
    if at_knee:
        figures.append(
            Figure(
                row="placement_live",
                subject=f"{name}, differences at the knee",
                unit="share",
                spread=spread(at_knee),
            )
        )
    return figures


def validations(
    *,
    is_quick: bool = False,
    has_simulated: bool = True,
    has_real: bool = True,
    profile_path: Path | None = None,
    num_requests: int | None = None,
) -> dict[str, Validation]:
    """By name of the fleet. `num_requests`: at each rate; None: fewer to real engines, which are slow. Raises
    NotReady, ServingError or ValueError."""
    found: dict[str, Validation] = {}
    num_simulated = 40 if is_quick else num_requests or REQUESTS_PER_RATE
    shapes = SHAPES[:1] if is_quick else SHAPES
    for p, d in shapes if has_simulated else ():
        name = f"simulated-{p}P{d}D"
        found[name] = run(
            name, fleet_file(p, d, SIMULATED), None, SIMULATED_WORKLOAD, SIMULATED_SLO, num_simulated,
            [4.0, 30.0] if is_quick else None,
        )  # fmt: skip
    if has_real and not is_quick:
        path = profile_path or SCRATCH / "live" / "profile.json"
        profile = load_profile(path) if profile_path else measured_profile(path)
        for p, d in SHAPES:
            name = f"vllm-cpu-{p}P{d}D"
            file = fleet_file(p, d, real_settings())
            num_real = num_requests or REAL_REQUESTS_PER_RATE
            found[name] = run(name, file, profile, REAL_WORKLOAD, slo_of(profile), num_real, None)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement_live")
    parser.add_argument("--quick", action="store_true", help="simulated 1P1D, two rates: does it run?")
    parser.add_argument("--engines", choices=["simulated", "vllm", "both"], default="both")
    parser.add_argument("--profile", type=Path, help="of the demo model, instead of measuring one")
    parser.add_argument(
        "--num-requests", type=int,
        help=f"at each rate; {REQUESTS_PER_RATE} to simulated engines, {REAL_REQUESTS_PER_RATE} to real ones",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file")
    options = parser.parse_args(argv)
    try:
        found = validations(
            is_quick=options.quick, has_simulated=options.engines != "vllm",
            has_real=options.engines != "simulated", profile_path=options.profile,
            num_requests=options.num_requests,
        )  # fmt: skip
    except (NotReady, ServingError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_NOT_READY
    figures = [figure for name, one in found.items() for figure in figures_of(name, one)]
    for figure in figures:
        print(json.dumps(figure.as_json()))
    if options.json is not None:
        document = {
            "machine": machine.describe(),
            "fleets": {name: as_json(one) for name, one in found.items()},
            "figures": [figure.as_json() for figure in figures],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return EXIT_BAR_MISSED if any(figure.holds is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
