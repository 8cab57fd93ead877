"""An answer as text for people and as plain values for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from placement.evaluation import Candidate
from placement.goodput import Estimate
from placement.planner import Answer
from placement.plans import ColocatedPlan
from placement.search import Ranking

NUM_SHOWN = 8


def text(found: Answer, *, workload: str, notes: Sequence[str] = ()) -> str:
    problem = found.problem
    rate = "" if problem.rate_per_s is None else f", {problem.rate_per_s:g} requests/s"
    lines = [
        f"model      {problem.prefill_source.name}" + _band(found),
        f"hardware   {problem.cluster}, {problem.cluster.num_gpus} GPUs",
        f"workload   {workload}",
        f"SLO        {problem.slo}{rate}",
        *(f"note       {note}" for note in notes),
        "",
    ]
    if found.split.candidates:
        lines += [f"split ({found.mode}), best first", *_table(found.split), ""]
    if found.colocated.candidates:
        lines += ["colocated, best first", *_table(found.colocated), ""]
    lines.append(f"verdict    {found.verdict}")
    if found.best is not None:
        lines.append(f"choose     {found.best.plan}")
    if (gain := found.gain) is not None:
        lines.append(f"split over colocated, per GPU: {gain[0]:.2f}x (95 %: {gain[1]:.2f} to {gain[2]:.2f})")
    if found.binding is not None:
        lines.append(f"limited by {found.binding.sentence} ({found.binding.share:.0%} of the misses)")
    if found.nearest is not None:
        lines.append(nearest_sentence(found))
    if found.most_per_s is not None:
        lines.append(
            f"the SLO itself can be kept: {problem.cluster} gives up to {found.most_per_s:.3g} requests/s"
        )
    if found.what_ifs:
        lines += ["", "load        requests/s  attainment  TTFT kept  TPOT kept  prefill busy  decode busy"]
        lines += [
            f"{w.change:<11} {w.rate_per_s:>10.3g}  {w.attainment:>10.1%}  {w.ttft:>9.1%}  {w.tpot:>9.1%}"
            f"  {w.prefill_busy:>12.0%}  {w.decode_busy:>11.0%}"
            for w in found.what_ifs
        ]
    if len(found.pareto) > 1:
        lines += ["", "more requests/s only for more GPUs:"]
        lines += [f"  {c.plan.num_gpus:>4} GPUs  {c.goodput.mean:>8.3g}/s  {c.plan}" for c in found.pareto]
    lines += [
        "",
        f"{found.split.num_plans + found.colocated.num_plans} plans, "
        f"{found.split.num_tried + found.colocated.num_tried} simulated jointly at "
        f"{problem.requests.per_trial:,} requests or more a trial; "
        f"{found.search_s:.1f} s, {found.search_cpu_s:.1f} CPU s",
    ]
    return "\n".join(lines)


def nearest_sentence(found: Answer) -> str:
    nearest = found.nearest
    assert nearest is not None
    parts = [f"nearest SLO that an idle fleet keeps ({nearest.plan}): {nearest.scaled}"]
    if nearest.factor <= 1:
        return (
            f"an idle {nearest.plan} keeps it, but not at any load worth naming; "
            "more GPUs or a looser SLO are needed"
        )
    slo = found.problem.slo
    if nearest.needed_ttft_s is not None and slo.ttft_s is not None:
        parts.append(f"or TTFT {nearest.needed_ttft_s:.3g} s with the TPOT as asked")
    if nearest.needed_tpot_s is not None and slo.tpot_s is not None:
        parts.append(f"or TPOT {nearest.needed_tpot_s:.3g} s with the TTFT as asked")
    return "; ".join(parts)


def _band(found: Answer) -> str:
    band = found.problem.prefill_source.error_band
    return "" if band is None else f" (step times within {band:.0%} for nine of ten)"


def _table(ranking: Ranking) -> list[str]:
    lines = ["     per GPU        95 %   requests/s   GPUs  charged  placement"]
    for candidate, is_equal in list(zip(ranking.candidates, ranking.is_equal, strict=True))[:NUM_SHOWN]:
        per_gpu = candidate.per_gpu
        lines.append(
            f"  {'=' if is_equal else ' '} {per_gpu.mean:>8.3f}  ±{per_gpu.half_width:>8.3f} "
            f"{candidate.goodput.mean:>12.2f} {candidate.plan.num_gpus:>6} {candidate.charged_gpus:>8.1f}"
            f"  {candidate.plan}"
        )
    if sum(ranking.is_equal) > 1:
        lines.append("  = inside the interval of the best: as good, as far as we can tell")
    return lines


def as_json(found: Answer, *, workload: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    problem = found.problem
    return {
        "mode": found.mode,
        "model": problem.prefill_source.name,
        "step_time_error_band": problem.prefill_source.error_band,
        "cluster": str(problem.cluster),
        "num_gpus": problem.cluster.num_gpus,
        "workload": workload,
        "notes": list(notes),
        "slo": {
            "ttft_s": problem.slo.ttft_s, "tpot_s": problem.slo.tpot_s,
            "attainment": problem.slo.attainment,
        },
        "rate_per_s": problem.rate_per_s,
        "verdict": found.verdict,
        "best": None if found.best is None else candidate_json(found.best, is_equal=True),
        "split": _ranking_json(found.split),
        "colocated": _ranking_json(found.colocated),
        "gain_per_gpu": None if found.gain is None else [_number(value) for value in found.gain],
        "binding": None
        if found.binding is None
        else {
            "name": found.binding.name, "sentence": found.binding.sentence,
            "share_of_misses": _number(found.binding.share),
        },
        "nearest_slo": None
        if found.nearest is None
        else {
            "ttft_s": found.nearest.scaled.ttft_s, "tpot_s": found.nearest.scaled.tpot_s,
            "factor": _number(found.nearest.factor), "ttft_alone_s": found.nearest.needed_ttft_s,
            "tpot_alone_s": found.nearest.needed_tpot_s, "placement": str(found.nearest.plan),
        },
        "most_requests_per_s": found.most_per_s,
        "what_ifs": [
            {
                "change": w.change, "rate_per_s": _number(w.rate_per_s), "attainment": _number(w.attainment),
                "ttft_kept": _number(w.ttft), "tpot_kept": _number(w.tpot),
                "prefill_busy": _number(w.prefill_busy), "decode_busy": _number(w.decode_busy),
            }
            for w in found.what_ifs
        ],
        "pareto": [candidate_json(candidate) for candidate in found.pareto],
        "num_requests": problem.requests.per_trial,
        "search_s": _number(found.search_s),
        "search_cpu_s": _number(found.search_cpu_s),
    }  # fmt: skip


def _ranking_json(ranking: Ranking) -> list[dict[str, Any]]:
    return [
        candidate_json(candidate, is_equal=is_equal)
        for candidate, is_equal in zip(ranking.candidates, ranking.is_equal, strict=True)
    ]


def candidate_json(candidate: Candidate, *, is_equal: bool | None = None) -> dict[str, Any]:
    plan = candidate.plan
    line: dict[str, Any] = {"placement": str(plan)}
    if isinstance(plan, ColocatedPlan):
        line |= {
            "num_both": plan.num_workers, "tp": plan.split.tensor, "pp": plan.split.pipeline,
            "chunk_tokens": plan.chunk_tokens,
        }  # fmt: skip
    else:
        line |= {
            "num_prefill": plan.num_prefill, "prefill_tp": plan.prefill.tensor,
            "prefill_pp": plan.prefill.pipeline, "num_decode": plan.num_decode,
            "decode_tp": plan.decode.tensor, "decode_pp": plan.decode.pipeline,
        }  # fmt: skip
    line |= {
        "num_gpus": plan.num_gpus, "charged_gpus": _number(candidate.charged_gpus),
        "goodput_per_s": _number(candidate.goodput.mean), "interval_per_s": _interval(candidate.goodput),
        "goodput_per_gpu": _number(candidate.per_gpu.mean), "interval_per_gpu": _interval(candidate.per_gpu),
    }  # fmt: skip
    return line | ({} if is_equal is None else {"is_equal_to_best": is_equal})


def _interval(estimate: Estimate) -> list[float]:
    return [_number(estimate.low), _number(estimate.high)]


def _number(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else 0.0
