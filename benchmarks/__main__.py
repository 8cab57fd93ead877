"""The command line behind scripts/bench.sh.

Exit status: 0 every bar holds, 2 wrong usage, 3 something under test did not start or answer,
4 a bar is missed. A quick run judges its bars too, but one short repeat proves nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import door, e2e, peers, placement, preemption, routing, twin_fidelity
from benchmarks.layout import PEERS, TRACES
from benchmarks.load import LoadFailed, compile_tools
from benchmarks.publish import save, show
from benchmarks.servers import NotReady
from benchmarks.trace_load import RequestsFailed

PEERS_OF = {
    "correctness": (),
    "door": peers.ALL,
    "e2e": (peers.VLLM_ROUTER,),
    "routing": (peers.DYNAMO,),
    "replay": (peers.DYNAMO,),
    "twin": (),
    "handoff": (),
    "placement": (),
    "preemption": (),
}

EXIT_NOT_READY = 3
EXIT_BAR_MISSED = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench.sh", description="Baton beside its peers.")
    parser.add_argument(
        "name",
        choices=[
            "correctness", "door", "e2e", "handoff", "placement", "preemption", "replay", "routing", "twin",
        ],
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one short repeat: a check that everything runs")
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="repeats per row (door, handoff, routing, twin) or rounds (e2e)",
    )
    parser.add_argument("--rows", metavar="A,B", help="only rows whose names start so; modes (handoff)")
    parser.add_argument("--peers-only", action="store_true", help="leave Baton out")
    parser.add_argument("--traces", type=Path, metavar="DIR", default=TRACES, help="public traces (replay)")
    parser.add_argument("--json", action="store_true", help="one JSON object per figure instead of a table")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/NAME.json and .md")
    options = parser.parse_args(argv)
    rows = options.rows.split(",") if options.rows else None
    with only_run_on_this_machine():
        return _run(options, rows, argv)


@contextmanager
def only_run_on_this_machine() -> Iterator[None]:
    """Two benchmarks at once would measure each other, and share their scratch folder."""
    PEERS.mkdir(exist_ok=True)
    with (PEERS / "bench.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("bench: waiting for another benchmark to end", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(options: argparse.Namespace, rows: list[str] | None, argv: list[str] | None) -> int:
    for peer in PEERS_OF[options.name]:
        peer.install()
    try:
        if options.name == "handoff":
            # Only now: it brings vLLM, half a gigabyte that would be measured with everybody else.
            from benchmarks import handoff

            amount = handoff.QUICK if options.quick else handoff.FULL
            report = handoff.run(amount, repeats=options.repeats, modes=rows)
        elif options.name == "correctness":
            from benchmarks import correctness

            questions = correctness.QUICK if options.quick else correctness.FULL
            report = correctness.run(questions, rows=rows)
        elif options.name == "routing":
            parts = routing.QUICK if options.quick else routing.FULL
            report = routing.run(parts, repeats=options.repeats, rows=rows)
        elif options.name == "replay":
            report = routing.run_replay(is_quick=options.quick, traces=options.traces, rows=rows)
        elif options.name == "placement":
            trials = placement.QUICK if options.quick else placement.FULL
            report = placement.run(trials, is_quick=options.quick, rows=rows)
        elif options.name == "preemption":
            amount_preempted = preemption.QUICK if options.quick else preemption.FULL
            report = preemption.run(amount_preempted, rows=rows)
        elif options.name == "twin":
            twin = twin_fidelity.QUICK if options.quick else twin_fidelity.FULL
            report = twin_fidelity.run(twin, repeats=options.repeats, rows=rows)
        elif options.name == "door":
            compile_tools()
            effort = door.QUICK if options.quick else door.FULL
            report = door.run(effort, repeats=options.repeats, has_baton=not options.peers_only, rows=rows)
        else:
            compile_tools()
            plan = e2e.QUICK if options.quick else e2e.FULL
            report = e2e.run(plan, rounds=options.repeats, has_baton=not options.peers_only, rows=rows)
    except (NotReady, LoadFailed, RequestsFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_NOT_READY
    if options.quick:
        report.remarks.insert(0, "Quick run: one short repeat, a functional check and not a measurement.")
    if report.noisy_rows:
        rows_text = ", ".join(report.noisy_rows)
        report.remarks.append(f"Not quiet, somebody else used this machine before: {rows_text}.")
    show(report, as_json=options.json)
    if options.save:
        save(report, "scripts/bench.sh " + " ".join(sys.argv[1:] if argv is None else argv))
    return EXIT_BAR_MISSED if report.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
