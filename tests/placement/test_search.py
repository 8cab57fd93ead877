"""The search, the statistics and the paper's two algorithms, on a model with plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from baton.step_time import LinearStepTime, StepTime, shape_by_name
from placement.cluster import Cluster, Packing, Split, parse_cluster
from placement.evaluation import Bench, Problem
from placement.explain import binding_constraint, nearest_feasible_slo
from placement.goodput import capacity_per_s, estimate, goodput_per_s, keeps_slo, rate_kept
from placement.paper_modes import balanced_counts, counts_for_rate, high_affinity, low_affinity
from placement.planner import ModelDoesNotFit, answer, pareto_set
from placement.plans import ColocatedPlan, SplitPlan, charged_gpus, num_copies, seat
from placement.requests import Requests, make_requests
from placement.search import colocated_search, joint_search
from placement.simulator import Links, SplitFleet
from placement.slo import Slo
from placement.sources import DistServeSource, RooflineSource
from placement.step_table import tabulate
from placement.workers import saturation_tokens, worker_kind


@dataclass(frozen=True)
class LinearSource:
    """Speed-up of TP to the power 0.8; weights for two GPUs' worth of memory at TP1 PP1."""

    capacity_tokens: int = 60_000
    prefill_scale: float = 1.0
    decode_scale: float = 1.0
    name: str = "linear"
    kv_bytes_per_token: float = 1e5
    error_band: float | None = None

    def step_time(self, split: Split) -> StepTime:
        speed = split.tensor**0.8
        return LinearStepTime(
            base_s=0.012 + 0.008 / speed,
            per_prefill_token_s=self.prefill_scale * 1e-4 / speed,
            per_prefill_pair_s=1e-8 / speed,
            per_decode_s=self.decode_scale * 1e-4 / speed,
            per_context_token_s=self.decode_scale * 5e-7 / speed,
            num_stages=split.pipeline,
        )

    def kv_tokens(self, split: Split) -> int:
        return self.capacity_tokens * split.num_gpus


def requests_of(seed: int, count: int = 20_000, *, per_trial: int = 3000, cv: float = 1.0) -> Requests:
    rng = np.random.default_rng(seed)
    shape = 1 / cv**2
    return make_requests(
        np.clip(rng.lognormal(6.0, 0.8, count), 4, 4000).astype(np.int64),
        np.clip(rng.lognormal(4.6, 0.8, count), 2, 1000).astype(np.int64),
        gaps=rng.gamma(shape, 1 / shape, count),
        seed=seed,
        per_trial=per_trial,
    )


def problem_of(
    gpus: str = "1x4:h100", *, ttft_s: float = 0.3, tpot_s: float = 0.04, num_sets: int = 3, **more
) -> Problem:
    source = more.pop("source", LinearSource())
    return Problem(
        cluster=parse_cluster(gpus),
        prefill_source=source,
        decode_source=source,
        request_sets=more.pop("request_sets", tuple(requests_of(seed) for seed in range(num_sets))),
        slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s),
        max_pipeline=2,
        **more,
    )


def prefill_pool(num_workers: int, tensor: int = 1) -> SplitFleet:
    """Decode takes no time, so that only prefill is seen."""
    kind = worker_kind(LinearSource(), Split(tensor, 1), max_prompt_tokens=4000)
    instant = tabulate(LinearStepTime(base_s=1e-9), num_stages=1, max_batch=1024, max_tokens=4000)
    assert kind is not None
    return SplitFleet(
        prefill=kind.table, num_prefill=num_workers, decode=instant, num_decode=1,
        links=Links.free(num_workers, 1), batch_tokens=kind.batch_tokens,
    )  # fmt: skip


def test_the_search_finds_what_trying_everything_finds():
    problem = problem_of("1x4:h100")
    bench = Bench(problem)
    everything = []
    for p in bench.prefill_splits:
        for d in bench.decode_splits:
            for n in range(1, 5):
                for m in range(1, 5):
                    plan = SplitPlan(p, n, d, m)
                    fleet = bench.fleet(plan) if plan.num_gpus <= 4 else None
                    if fleet is not None:
                        everything.append(bench.goodput(fleet) / bench.charged(plan))
    found = joint_search(bench).best
    assert found is not None
    assert found.goodput.samples[0] / found.charged_gpus >= 0.98 * max(everything)


def test_with_a_rate_the_fewest_gpus_win():
    problem = problem_of("1x8:h100", rate_per_s=12.0)
    ranking = joint_search(Bench(problem))
    best = ranking.best
    assert best is not None
    assert best.goodput.mean >= 12.0
    smaller = problem_of(f"1x{best.plan.num_gpus - 1}:h100", rate_per_s=12.0)
    assert joint_search(Bench(smaller)).best is None


def test_given_capacities_give_two_prefill_and_one_decode_worker():
    """DistServe's figure 1: 5.6 and 10 requests/s per GPU."""
    for budget in (3, 4):
        counts = balanced_counts(5.6, 10.0, budget=budget)
        assert counts is not None
        assert (counts.num_prefill, counts.num_decode) == (2, 1)
        assert counts.per_gpu == pytest.approx(3.33, abs=0.004)  # min(11.2, 10) / 3
    for_ten = counts_for_rate(10.0, 5.6, 10.0)
    assert (for_ten.num_prefill, for_ten.num_decode) == (2, 1)


def test_a_pool_serves_more_per_worker_than_one_worker_alone():
    requests = requests_of(1)
    slo = Slo(ttft_s=0.3, tpot_s=None)
    per_worker = [goodput_per_s(prefill_pool(n), requests, slo) / n for n in (1, 2, 4, 8)]
    assert per_worker == sorted(per_worker)
    assert per_worker[2] > 1.3 * per_worker[0]  # note: 3.33 alone, 6.67 each of four


def test_bursts_cost_goodput_and_pooling_softens_them():
    slo = Slo(ttft_s=0.3, tpot_s=None)
    alone = [goodput_per_s(prefill_pool(1, 2), requests_of(2, cv=cv), slo) for cv in (0.5, 1.0, 2.0)]
    pooled = [goodput_per_s(prefill_pool(4, 2), requests_of(2, cv=cv), slo) / 4 for cv in (0.5, 1.0, 2.0)]
    assert alone == sorted(alone, reverse=True)
    assert pooled == sorted(pooled, reverse=True)
    assert alone[0] > 1.3 * alone[2]
    assert alone[2] / alone[0] < pooled[2] / pooled[0]


def test_a_stricter_percentile_lowers_goodput():
    requests = requests_of(3)
    rates = [
        goodput_per_s(prefill_pool(1, 2), requests, Slo(ttft_s=0.3, tpot_s=None, attainment=share))
        for share in (0.5, 0.9, 0.95)
    ]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[2] > 0


def test_no_rate_above_capacity_passes_however_loose_the_slo():
    fleet = prefill_pool(1)
    requests = requests_of(4)
    loose = Slo(ttft_s=1000.0, tpot_s=None)
    capacity = capacity_per_s(fleet, requests)
    assert 0.8 * capacity < goodput_per_s(fleet, requests, loose) <= capacity


def test_stopping_early_changes_no_answer():
    fleet, requests = prefill_pool(2), requests_of(5)
    slo = Slo(ttft_s=0.25, tpot_s=None)
    goodput = goodput_per_s(fleet, requests, slo)
    bench_rates = np.linspace(0.5, 1.5, 9) * goodput
    assert [keeps_slo(fleet, requests, slo, r) for r in bench_rates] == [r <= goodput for r in bench_rates]


@pytest.mark.parametrize("hint", [None, 3.0, 3.3, 9.0], ids=["no hint", "near", "nearer", "wrong"])
def test_the_rate_search_is_not_fooled_by_a_hint(hint):
    found = rate_kept(lambda rate: rate <= 3.21, 10.0, hint=hint)
    assert found == pytest.approx(3.21, rel=0.006) and found <= 3.21


def test_a_rate_that_passes_beyond_one_that_fails_is_not_believed():
    """Attainment that falls and rises again: 1.0 to 4.0 of 10 fail."""
    assert rate_kept(lambda rate: rate < 1.0 or rate > 4.0, 10.0) < 1.0


def test_an_interval_narrows_with_samples():
    two, many = estimate([1.0, 1.1]), estimate([1.0, 1.1, 1.0, 1.1, 1.0, 1.1])
    assert many.half_width < two.half_width
    assert math.isinf(estimate([1.0]).half_width)


def test_stranded_gpus_are_charged():
    node = parse_cluster("1x8:h100")
    seven = SplitPlan(Split(4, 1), 1, Split(3, 1), 1)
    assert charged_gpus(seven, node) == 8.0
    assert (
        charged_gpus(SplitPlan(Split(1, 1), 2, Split(1, 1), 1), node) == 4.0
    )  # two copies of three in eight
    assert charged_gpus(seven, parse_cluster("4x8:h100")) == 8.0


def test_a_tensor_group_never_leaves_its_node():
    packing = Packing([4, 4])
    assert packing.place(Split(3, 1)) == [0]
    assert packing.place(Split(3, 1)) == [1]
    assert packing.place(Split(2, 1)) is None
    assert Packing([4, 4]).place(Split(4, 2)) == [0, 1]
    assert num_copies(SplitPlan(Split(2, 1), 1, Split(2, 1), 1), parse_cluster("2x4:h100")) == 2


def test_pairs_that_share_a_node_move_kv_inside_it():
    bench = Bench(problem_of("2x2:h100"))
    fleet = bench.fleet(SplitPlan(Split(1, 1), 2, Split(1, 1), 2))
    assert isinstance(fleet, SplitFleet)
    assert fleet.links.kind.tolist() in ([[0, 1], [1, 0]], [[1, 0], [0, 1]], [[1, 1], [1, 1]])
    inside, between = fleet.links.token_s
    assert inside < between
    seats = seat(SplitPlan(Split(1, 1), 2, Split(1, 1), 2), bench.problem.cluster)
    assert seats is not None and len(seats.prefill) == len(seats.decode) == 2


def test_a_slow_network_is_named_as_the_limit():
    cluster = parse_cluster("2x1:h100", network_gbit_per_s=1.0)
    base = problem_of()
    problem = Problem(
        cluster=cluster, prefill_source=base.prefill_source, decode_source=base.decode_source,
        request_sets=base.request_sets, slo=base.slo,
    )  # fmt: skip
    bench = Bench(problem)
    fleet = bench.fleet(SplitPlan(Split(1, 1), 1, Split(1, 1), 1))
    assert fleet is not None
    assert binding_constraint(bench, fleet, bench.goodput(fleet)).name == "link"


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "source", "name"),
    [
        pytest.param(1.5, 0.2, LinearSource(prefill_scale=3), "queue", id="prefill queue"),
        pytest.param(5.0, 0.03, LinearSource(decode_scale=5), "decode-step", id="decode step"),
        pytest.param(5.0, 0.2, LinearSource(capacity_tokens=6000), "kv-memory", id="KV memory"),
    ],
)
def test_the_binding_constraint_is_named(ttft_s, tpot_s, source, name):
    bench = Bench(problem_of("1x2:h100", ttft_s=ttft_s, tpot_s=tpot_s, source=source))
    fleet = bench.fleet(SplitPlan(Split(1, 1), 1, Split(1, 1), 1))
    assert fleet is not None
    found = binding_constraint(bench, fleet, bench.goodput(fleet))
    assert found.name == name, found.sentence
    assert found.share > 0.5


def test_prompts_that_are_too_long_by_themselves_are_told_from_queueing():
    # 90 % must keep 0.115 s: a prompt of 900 tokens takes about as long alone.
    bench = Bench(problem_of("1x2:h100", ttft_s=0.115, tpot_s=0.2))
    fleet = bench.fleet(SplitPlan(Split(1, 1), 1, Split(1, 1), 1))
    assert fleet is not None
    assert binding_constraint(bench, fleet, max(0.01, bench.goodput(fleet))).name == "prefill-too-long"


def test_an_slo_that_nobody_keeps_gets_the_nearest_one():
    problem = problem_of("1x2:h100", ttft_s=0.001, tpot_s=0.04)
    found = answer(problem)
    assert found.best is None and found.verdict.startswith("no placement keeps the SLO")
    assert found.nearest is not None and found.nearest.factor > 10
    assert found.nearest.needed_ttft_s is not None
    kept = problem_of("1x2:h100", ttft_s=found.nearest.needed_ttft_s * 1.02, tpot_s=0.04)
    assert answer(kept).best is not None
    impossible = nearest_feasible_slo(Bench(problem_of("1x2:h100", source=LinearSource(capacity_tokens=3))))
    assert impossible is None


def test_a_rate_beyond_the_hardware_names_what_it_can_do():
    found = answer(problem_of("1x2:h100", rate_per_s=10_000.0))
    assert found.best is None
    assert found.most_per_s is not None and 1 < found.most_per_s < 10_000


def test_not_to_disaggregate_is_an_answer():
    """Two GPUs, a loose TPOT: the colocated pair uses both for everything."""
    found = answer(problem_of("1x2:h100", ttft_s=2.0, tpot_s=0.2))
    assert found.verdict.startswith("do not disaggregate")
    assert isinstance(found.best and found.best.plan, ColocatedPlan)


def test_to_disaggregate_is_an_answer():
    """A tight TPOT that any prompt in between breaks."""
    found = answer(problem_of("1x8:h100", ttft_s=0.4, tpot_s=0.0225))
    assert found.verdict.startswith("disaggregate"), found.verdict
    assert isinstance(found.best and found.best.plan, SplitPlan)
    assert found.gain is not None and found.gain[1] > 1


def test_more_for_more_gpus_only():
    found = answer(problem_of("1x4:h100"))
    pareto = pareto_set([*found.split.candidates, *found.colocated.candidates])
    gpus = [c.plan.num_gpus for c in pareto]
    rates = [c.goodput.mean for c in pareto]
    assert gpus == sorted(set(gpus)) and rates == sorted(rates)


def test_the_papers_two_algorithms_run_and_stay_below_the_joint_search():
    bench = Bench(problem_of("1x4:h100"))
    joint = joint_search(bench).best
    high, low = high_affinity(bench).best, low_affinity(bench).best
    assert joint is not None and high is not None and low is not None
    for other in (high, low):
        assert other.per_gpu.mean <= joint.per_gpu.mean * 1.02
    assert isinstance(low.plan, SplitPlan)
    assert low.plan.prefill.num_gpus + low.plan.decode.num_gpus <= 4


def test_low_affinity_replicates_for_a_rate():
    found = low_affinity(Bench(problem_of("2x4:h100", rate_per_s=15.0))).best
    assert found is not None and isinstance(found.plan, SplitPlan)
    assert found.goodput.mean >= 15.0 * 0.95
    assert found.plan.num_prefill == found.plan.num_decode


def test_different_gpus_per_phase(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "prefill: {gpu: h100, gpus_per_node: 2}\ndecode: {gpu: a100, gpus_per_node: 2, nodes: 2}\n"
    )
    cluster: Cluster = parse_cluster(str(file))
    shape = shape_by_name("Llama-3.1-8B")
    problem = Problem(
        cluster=cluster,
        prefill_source=RooflineSource(cluster.prefill.gpu, shape),
        decode_source=RooflineSource(cluster.decode.gpu, shape),
        request_sets=tuple(requests_of(seed) for seed in range(2)),
        slo=Slo(ttft_s=0.4, tpot_s=0.04),
    )
    best = joint_search(Bench(problem)).best
    assert best is not None and isinstance(best.plan, SplitPlan)
    assert best.plan.num_prefill * best.plan.prefill.num_gpus <= 2
    assert best.plan.num_decode * best.plan.decode.num_gpus <= 4


def test_a_model_that_fits_nowhere_says_so_with_numbers():
    cluster = parse_cluster("1x1:h100")
    source = RooflineSource(cluster.prefill.gpu, shape_by_name("Llama-3.1-70B"))
    problem = Problem(
        cluster=cluster, prefill_source=source, decode_source=source, request_sets=(requests_of(0),),
        slo=Slo(ttft_s=1.0, tpot_s=0.1),
    )  # fmt: skip
    with pytest.raises(ModelDoesNotFit, match="79 GiB|80 GiB"):
        answer(problem)


def test_published_constants_are_a_source():
    source = DistServeSource("OPT-66B")
    assert source.step_time(Split(1, 1)) is None
    assert source.kv_tokens(Split(4, 1)) == 78_496
    kind = worker_kind(source, Split(4, 1), max_prompt_tokens=2048)
    assert kind is not None
    # b + a/L_m within 10 % of the token's share of the longest batch.
    assert 512 <= saturation_tokens(kind.table) <= 2048


def test_colocated_baseline_tries_whole_prompts_and_chunks():
    ranking = colocated_search(Bench(problem_of("1x2:h100")))
    assert ranking.num_plans > 6
    assert ranking.best is not None and ranking.best.per_gpu.mean > 0
