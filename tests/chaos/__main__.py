"""The command line behind scripts/chaos.sh.

Exit status: 0 every bar holds, 2 wrong usage, 4 a bar is missed. A quick run judges its bars too; it is there
to see that everything runs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from baton.history import RunWriter
from benchmarks.figures import Bar, Figure, Report
from benchmarks.fleets import demo_model
from benchmarks.layout import SCRATCH
from benchmarks.publish import save, show
from benchmarks.samples import spread
from tests.chaos import supervisor
from tests.chaos.figures import judge, slope_mb_per_min
from tests.chaos.fleets import (
    NUM_DECODE,
    NUM_PREFILL,
    REAL_LIMITS,
    SIMULATED_LIMITS,
    start_real,
    start_simulated,
)
from tests.chaos.jobs import real_jobs, simulated_jobs
from tests.chaos.scenario import Load, run
from tests.chaos.supervisor import in_turn, kills_of, workers_in_turn

EXIT_BAR_MISSED = 4
NUM_WORKERS = NUM_PREFILL + NUM_DECODE

WARM_UP_SHARE = 1 / 3
"""Of a soak: tables grow to their working size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What was asked for on the command line."""

    folder: Path
    is_quick: bool
    load_s: float | None
    """None: as long as the scenario takes by default."""
    worker: tuple[str, ...]
    """Flags of all workers."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos.sh", description=__doc__)
    parser.add_argument("name", choices=[*SCENARIOS])
    parser.add_argument(
        "--quick", action="store_true", help="does it run? half a minute; real: until its engines are up"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="how long the load lasts, at most (real)")
    parser.add_argument(
        "--transfer", choices=["pull", "stream"], help="how KV moves; absent: the workers' default"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per figure instead of a table")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/chaos-NAME.json and .md"
    )
    options = parser.parse_args(argv)
    name = options.name if options.transfer is None else f"{options.name}-{options.transfer}"
    folder = SCRATCH / f"chaos-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    report = SCENARIOS[options.name](
        Order(
            folder=folder,
            is_quick=options.quick,
            load_s=None if options.minutes is None else options.minutes * 60,
            worker=() if options.transfer is None else ("--transfer", options.transfer),
        )
    )
    report.benchmark = f"chaos-{name}"
    report.remarks.append("Clients' records and logs of the run can be checked again: baton history check.")
    if options.quick:
        report.remarks.insert(0, "Quick run: a functional check and no proof.")
    show(report, as_json=options.json)
    if not options.json:
        print(f"note: the run is in {folder}")
    if options.save:
        save(report, "scripts/chaos.sh " + " ".join(sys.argv[1:] if argv is None else argv))
    return EXIT_BAR_MISSED if report.missed else 0


def simulated(order: Order) -> Report:
    """2P2D, 2,000 users, each role killed in turn every 10 s."""
    num_users, step_s = (300, 0.05) if order.is_quick else (2_000, 0.4)
    load = Load(
        num_users=num_users,
        load_s=order.load_s or (24.0 if order.is_quick else 300.0),
        ramp_s=2.0 if order.is_quick else 10.0,
        disturbances=kills_of(in_turn(NUM_PREFILL, NUM_DECODE), every_s=5.0 if order.is_quick else 10.0),
    )
    with RunWriter(order.folder) as writer:
        supervised = start_simulated(order.folder, writer, step_s=step_s, worker=order.worker)
        found = run(supervised, writer, SIMULATED_LIMITS, load, simulated_jobs((16, 32)))
    if found.violations:
        print(found.told(order.folder), file=sys.stderr)
    return judge("simulated", found, num_workers=NUM_WORKERS)


def real(order: Order) -> Report:
    """2P2D of vLLM on CPU, 20 kills, each when the fleet is whole again. Quick: one kill. Few users: engines
    that start need the cores too."""
    victims = ["decode-1"] if order.is_quick else list(islice(in_turn(NUM_PREFILL, NUM_DECODE), 20))
    load = Load(
        num_users=4,
        think_s=0.5,
        load_s=order.load_s or 1_800.0,
        disturbances=kills_of(victims, every_s=3.0),
        waits_for_recovery=True,
    )
    with RunWriter(order.folder) as writer:
        supervised = start_real(order.folder, writer, demo_model(), worker=order.worker)
        try:
            next_job = real_jobs(supervised.fleet.http_port)
        except BaseException:
            supervised.fleet.stop()
            raise
        found = run(supervised, writer, REAL_LIMITS, load, next_job)
    if found.violations:
        print(found.told(order.folder), file=sys.stderr)
    return judge("real", found, num_workers=NUM_WORKERS, num_kills=len(victims))


def storm(order: Order) -> Report:
    """2P2D, disturbances overlap: two killed at once, or again before they are back; workers stand still."""
    load = Load(
        num_users=150,
        load_s=order.load_s or (30.0 if order.is_quick else 300.0),
        ramp_s=2.0,
        disturbances=supervisor.storm(list(dict.fromkeys(islice(in_turn(NUM_PREFILL, NUM_DECODE), 6)))),
    )
    with RunWriter(order.folder) as writer:
        supervised = start_simulated(order.folder, writer, step_s=0.05, worker=order.worker)
        jobs = simulated_jobs((4, 40), share_leaving=0.05, share_whole=0.3)
        found = run(supervised, writer, SIMULATED_LIMITS, load, jobs)
    if found.violations:
        print(found.told(order.folder), file=sys.stderr)
    return judge("storm", found, num_workers=NUM_WORKERS)


def soak(order: Order) -> Report:
    """An hour of mixed load with now and then a worker killed; the coordinator lives through it."""
    load_s = order.load_s or (30.0 if order.is_quick else 3_600.0)
    load = Load(
        num_users=40,
        load_s=load_s,
        ramp_s=2.0,
        disturbances=kills_of(
            workers_in_turn(NUM_PREFILL, NUM_DECODE), every_s=8.0 if order.is_quick else 120.0
        ),
    )
    with RunWriter(order.folder) as writer:
        supervised = start_simulated(order.folder, writer, step_s=0.05, worker=order.worker)
        found = run(
            supervised,
            writer,
            SIMULATED_LIMITS,
            load,
            simulated_jobs((1, 64), share_leaving=0.1, share_whole=0.3),
        )
    if found.violations:
        print(found.told(order.folder), file=sys.stderr)
    report = judge("soak", found, num_workers=NUM_WORKERS)
    warm = [(s, b) for s, b in found.rss_bytes if s >= WARM_UP_SHARE * load_s]
    report.figures += [
        Figure(row="coordinator's memory grows by", subject="baton", unit="MB/min",
               spread=spread([slope_mb_per_min(warm)]), bar=Bar("<=", 1.0),
               note="resident, least squares after a third of the time"),
        Figure(row="coordinator's memory", subject="baton", unit="MB",
               spread=spread([b / 1e6 for _, b in warm])),
    ]  # fmt: skip
    return report


SCENARIOS: dict[str, Callable[[Order], Report]] = {
    "simulated": simulated,
    "storm": storm,
    "real": real,
    "soak": soak,
}


if __name__ == "__main__":
    raise SystemExit(main())
