"""`baton plan`: one question on the command line, one answer.

Exit codes: 0 a placement was found, 2 the question makes no sense (a sentence says why), 3 nothing keeps
the SLO, or the rate, on this hardware (the nearest that could be kept is printed).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from baton.launch.fleet_file import write_fleet_file
from baton.settings import SettingsError, load
from baton.step_time import ModelShape, UnsupportedShape, load_shape
from baton.step_time.profile import ProfileError
from baton.workload import WorkloadError
from placement import validate_command
from placement.cluster import Cluster, ClusterError, parse_cluster
from placement.evaluation import Bench, Problem
from placement.fleet import NotLaunchable, fleet_file
from placement.planner import Answer, ModelDoesNotFit, answer
from placement.plans import SplitPlan
from placement.report import as_json, candidate_json, text
from placement.settings import PlanSettings
from placement.slo import Slo
from placement.sources import RooflineSource, distserve_source, profile_source
from placement.workers import Source
from placement.workload import Workload, load_workload

EXIT_USAGE, EXIT_INFEASIBLE = 2, 3

BAD_QUESTION = (
    ClusterError,
    ModelDoesNotFit,
    NotLaunchable,
    ProfileError,
    SettingsError,
    UnsupportedShape,
    WorkloadError,
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if any(argument.partition("=")[0] == "--validate" for argument in argv):
        return validate_command.main(argv)
    if any(argument.partition("=")[0] == "--watch" for argument in argv):
        from placement import watch_command  # it asks with `question` below

        return watch_command.main(argv)
    settings = load(
        PlanSettings, argv, prog="baton plan",
        description="Which parallelism and how many workers for each phase, or colocated workers.",
    )  # fmt: skip
    try:
        return run(settings)
    except BAD_QUESTION as error:
        print(f"baton plan: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"baton plan: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE


def run(settings: PlanSettings) -> int:
    problem, workload, notes = question(settings)
    found = answer(problem, settings.mode)
    sentence = workload.sentence()
    if settings.json:
        print(json.dumps(as_json(found, workload=sentence, notes=notes), ensure_ascii=False, indent=1))
    else:
        print(text(found, workload=sentence, notes=notes))
    if settings.plot is not None:
        from placement.plots import plot

        plot(found, settings.plot)
    if found.best is None:
        return EXIT_INFEASIBLE
    if settings.fleet_file is not None:
        _write_fleet_file(found, settings, problem.cluster)
    return 0


def question(settings: PlanSettings, recorded: Workload | None = None) -> tuple[Problem, Workload, list[str]]:
    """What was asked, and what should be said about it. `recorded` replaces the settings' workload. Raises
    one of BAD_QUESTION."""
    try:
        slo = Slo(ttft_s=settings.ttft, tpot_s=settings.tpot, attainment=settings.attainment)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    cluster = parse_cluster(
        settings.gpus, network_gbit_per_s=settings.network, peer_gbyte_per_s=settings.nvlink
    )
    if settings.budget is not None:
        cluster = cluster.limited_to(settings.budget)
    assert settings.model is not None and settings.workload is not None
    shape = load_shape(settings.model)
    workload = recorded or load_workload(
        settings.workload,
        burstiness=settings.burstiness,
        prefix_hits=settings.prefix_hits,
        seed=settings.seed,
    )
    notes = list(workload.notes)
    sets = workload.request_sets(settings.num_requests, seed=settings.seed)
    prefill, decode = _sources(settings, cluster, shape)
    longest = int(max((r.num_prompt_tokens + r.num_output_tokens).max() for r in sets))
    if shape.max_context_tokens is not None and longest > shape.max_context_tokens:
        share = sum(
            int((r.num_prompt_tokens + r.num_output_tokens > shape.max_context_tokens).sum()) for r in sets
        ) / sum(map(len, sets))
        notes.append(
            f"{share:.1%} of requests are longer than the {shape.max_context_tokens:,} tokens that "
            f"{shape.name} takes (up to {longest:,})"
        )
    if longest > CHECKED_TOKENS:
        notes.append(
            f"step times were checked up to {CHECKED_TOKENS:,} tokens, requests of up to {longest:,} are "
            "extrapolated"
        )
    problem = Problem(
        cluster=cluster, prefill_source=prefill, decode_source=decode, request_sets=sets, slo=slo,
        rate_per_s=settings.rate, tensor_sizes=settings.tensor_sizes(), max_pipeline=settings.max_pipeline,
        may_span_nodes=settings.span_nodes,
    )  # fmt: skip
    return problem, workload, notes


CHECKED_TOKENS = 16_000
"""The longest prompt in the region that the shipped constants were compared over."""


def _sources(settings: PlanSettings, cluster: Cluster, shape: ModelShape) -> tuple[Source, Source]:
    if settings.step_times == "distserve":
        try:
            source: Source = distserve_source(shape.name, cluster.prefill.gpu)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        return source, source
    if settings.step_times != "roofline":
        source = profile_source(settings.step_times)
        return source, source
    prefill = RooflineSource(cluster.prefill.gpu, shape)
    return prefill, prefill if cluster.is_shared else RooflineSource(cluster.decode.gpu, shape)


def _write_fleet_file(found: Answer, settings: PlanSettings, cluster: Cluster) -> None:
    assert found.best is not None and settings.fleet_file is not None and settings.model is not None
    plan = found.best.plan
    split = plan.prefill if isinstance(plan, SplitPlan) else plan.split
    kind = Bench(found.problem).prefill_kind(split)
    predicted: dict[str, Any] = candidate_json(found.best) | {
        "ttft_s": found.problem.slo.ttft_s, "tpot_s": found.problem.slo.tpot_s,
        "attainment": found.problem.slo.attainment, "verdict": found.verdict,
    }  # fmt: skip
    fleet = fleet_file(
        plan, cluster, model=settings.model, engine=settings.engine,
        batch_tokens=None if kind is None else kind.batch_tokens, predicted=predicted,
    )  # fmt: skip
    Path(settings.fleet_file).parent.mkdir(parents=True, exist_ok=True)
    write_fleet_file(
        fleet, settings.fleet_file,
        heading=f"Made by `baton plan` for {found.problem.prefill_source.name}.\n"
        f"Start it: scripts/start_fleet.sh {Path(settings.fleet_file).name}",
    )  # fmt: skip
    if not settings.json:
        print(f"\nfleet file {settings.fleet_file}: scripts/start_fleet.sh {settings.fleet_file}")


if __name__ == "__main__":
    raise SystemExit(main())
