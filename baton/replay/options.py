"""What `baton replay` can be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from baton.policy import registry
from baton.replay.result import Slo
from baton.replay.settings import EXPECTED_OUTPUT_TOKENS, parse_fleet
from baton.scheduling.registry import NAMES as SCHEDULERS

T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="baton replay",
        description="Replay request traces through a simulated fleet in virtual time, decided by the "
        "coordinator's own routing code.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("trace", nargs="+", metavar="TRACE", help="trace files, see docs/workloads.md")
    add(
        "--fleet",
        type=_value(parse_fleet),
        default=parse_fleet("4P4D"),
        help="8P8D, 16both or 4P4D2both; default 4P4D",
    )
    add(
        "--policy", type=_policies, default=[registry.DEFAULT_PREFILL], metavar="A,B",
        help=f"prefill policies (of a `both` fleet: its policy): {', '.join(registry.NAMES)}; parameters "
        "after a colon, as in linear:0.7",
    )  # fmt: skip
    add("--decode-policy", default=registry.DEFAULT_DECODE, metavar="NAME", help="default %(default)s")
    pace = made.add_mutually_exclusive_group()
    pace.add_argument(
        "--load", type=_value(_loads), metavar="X,Y",
        help="shares of the fleet's capacity on the trace, which is measured first: requests finished per "
        "second between the 10th and the 90th percent, with all of them waiting from the start, under the "
        "first policy",
    )  # fmt: skip
    pace.add_argument("--speedup", type=float, metavar="X", help="arrivals so much faster than recorded")
    pace.add_argument("--rate", type=float, metavar="R", help="Poisson arrivals, requests per second")
    add("--seeds", type=int, default=1, metavar="N", help="repeats with other draws; default 1")
    add("--spread", type=float, default=0.0, metavar="S", help="each arrival later by a random part of S s")
    add("--first", type=int, metavar="N", help="only the first N requests")
    add("--closed", action="store_true", help="sessions in closed loop: think, then ask again")
    add(
        "--slo", type=_value(_slo), default=Slo(ttft_s=2.0, tpot_s=0.05), metavar="TTFT,TPOT",
        help="objectives in seconds for goodput; default 2,0.05",
    )  # fmt: skip
    add(
        "--model",
        default="Llama-3.1-8B",
        help="shape of the model, see docs/step-time.md; default %(default)s",
    )
    add("--gpu", default="h100", help="default %(default)s")
    add("--tp", type=int, default=1, metavar="N", help="tensor parallel size of every worker; default 1")
    add("--num-blocks", type=int, metavar="N", help="KV blocks per worker; default: what fits the GPU")
    add("--block-size", type=int, metavar="N", help="tokens per KV block; default: 64, or less if hashes are")
    add("--max-batch-size", type=int, default=256, metavar="N", help="default %(default)s")
    add("--max-num-batched-tokens", type=int, default=8192, metavar="N", help="per step; default %(default)s")
    add("--scheduler", default="fcfs", metavar="NAME",
        help=f"step order on decode and colocated workers: {', '.join(SCHEDULERS)}")  # fmt: skip
    add("--prefill-scheduler", default="fcfs", metavar="NAME", help="step order on prefill workers")
    add("--swap", action="store_true", help="KV of preempted requests waits in host memory over PCIe")
    add("--no-stay", action="store_true",
        help="no prompt is computed by the decode worker that holds most of it")  # fmt: skip
    add("--prefill-window", type=int, metavar="N", help="prompt tokens a prefill worker takes ahead")
    add("--expected-output", type=int, default=EXPECTED_OUTPUT_TOKENS, metavar="N",
        help="output tokens reserved for at dispatch; default %(default)s")  # fmt: skip
    add("--queue-timeout", type=float, metavar="S", help="longest wait at the coordinator; default: no limit")
    add("--report-delay", type=float, default=0.0, metavar="S", help="how late KV events and progress arrive")
    add("--no-guard", action="store_true", help="without the hotspot guard")
    add("--json", action="store_true", help="one JSON object per trace, load and policy")
    add("--plot", metavar="FILE", help="TTFT, TPOT and goodput as a picture")
    return made


def _slo(text: str) -> Slo:
    ttft, _, tpot = text.partition(",")
    slo = Slo(ttft_s=float(ttft), tpot_s=float(tpot))
    if not (slo.ttft_s > 0 and slo.tpot_s > 0):
        raise ValueError(f"objectives are seconds above 0, not {text!r}")
    return slo


def _loads(text: str) -> list[float]:
    loads = [float(part) for part in text.split(",")]
    if not all(load > 0 for load in loads):
        raise ValueError(f"loads are shares above 0, not {text!r}")
    return loads


def _policies(text: str) -> list[str]:
    """Commas separate policies, and also the parameters of one: a part that begins with a digit goes
    with the one before."""
    names: list[str] = []
    for part in text.split(","):
        if names and part[:1].isdigit():
            names[-1] += f",{part}"
        elif part:
            names.append(part)
    return names


def _value(parse: Callable[[str], T]) -> Callable[[str], T]:
    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
