"""Sessions on real engines, two prefill workers: the coordinator knows what each of them holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.client import BatonClient
from baton.contract.messages import RequestReport
from tests.system.conftest import REAL_WORKER, _OneFleet
from tests.system.fleet import Fleet

NUM_SESSIONS, NUM_TURNS, NUM_AT_ONCE = 20, 6, 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def fleet(model: Path, _one_fleet: _OneFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """2 prefill + 1 decode."""
    _one_fleet.stop()
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), model=model)
    try:
        fleet.start_coordinator()
        for role, name in (("prefill", "prefill-1"), ("prefill", "prefill-2"), ("decode", "decode-1")):
            fleet.start_worker(role, name, *REAL_WORKER)
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.stop()


def converse(client: BatonClient, seed: int) -> list[RequestReport]:
    """One session: each turn is all that was said, and 20 to 120 tokens more. Four share a beginning."""
    dice = random.Random(seed)
    said = [random.Random(seed // 4).randrange(10, 500) for _ in range(100)]
    reports = []
    for _ in range(NUM_TURNS):
        said += [dice.randrange(10, 500) for _ in range(dice.randint(20, 120))]
        turn = client.generate(said, max_tokens=dice.randint(2, 8), temperature=0.0, ignore_eos=True)
        said += turn.token_ids
        reports.append(turn.report)
    return reports


def serve_sessions(fleet: Fleet, first_seed: int) -> list[RequestReport]:
    with BatonClient(fleet.client_address) as client, ThreadPoolExecutor(NUM_AT_ONCE) as people:
        seeds = range(first_seed, first_seed + NUM_SESSIONS)
        return [r for reports in people.map(lambda seed: converse(client, seed), seeds) for r in reports]


def num_exact(reports: list[RequestReport]) -> int:
    placements = [report.placement for report in reports]
    assert all(p.predicted_hit_tokens is not None and p.hit_tokens is not None for p in placements)
    return sum(p.predicted_hit_tokens == p.hit_tokens for p in placements)


def check_predictions(reports: list[RequestReport]) -> None:
    """Of the later turns' hits 99 % are the predicted ones.

    First turns of sessions with one beginning may wait at a worker together, and it computes the shorter
    prompt first: then that one misses and the one expected to compute the beginning hits. Which of them
    hits is the engine's business, how much they hit together is not.
    """
    later = [report for number, report in enumerate(reports) if number % NUM_TURNS]
    assert num_exact(later) >= 0.99 * len(later)
    predicted = sum(report.placement.predicted_hit_tokens or 0 for report in reports)
    assert predicted == pytest.approx(sum(report.placement.hit_tokens or 0 for report in reports), rel=0.01)


def hit_share(reports: list[RequestReport]) -> float:
    return sum(r.placement.hit_tokens or 0 for r in reports) / sum(r.num_prompt_tokens for r in reports)


def test_hits_are_as_predicted(fleet: Fleet) -> None:
    """
    1. 20 sessions of 6 turns, 4 at once: the hits are the predicted ones
    2. nearly every later turn found its session's worker: most of all prompt tokens were hits
    3. the metrics say the same
    """
    reports = serve_sessions(fleet, first_seed=1000)
    assert len(reports) == 120
    check_predictions(reports)
    assert hit_share(reports) > 0.5
    assert {r.placement.prefill_worker for r in reports} >= {"prefill-1", "prefill-2"}
    metrics = fleet.ask("GET", "/metrics").body.decode()
    assert f'baton_hit_predictions_total{{result="exact"}} {num_exact(reports)}.0' in metrics
    fleet.wait_until_idle(40.0)


def test_a_new_coordinator_hears_what_the_workers_hold(fleet: Fleet) -> None:
    """
    1. a prompt is computed by one worker; the coordinator is killed and another one started
    2. it knows at once: the prompt goes to the same worker, the hit is predicted
    """
    prompt = [random.Random(5).randrange(10, 500) for _ in range(300)]
    with BatonClient(fleet.client_address) as client:
        first = client.generate(prompt, max_tokens=2, temperature=0.0).report
    fleet.wait_until_idle(40.0)
    fleet.kill("coordinator")
    fleet.start_coordinator()
    fleet.wait_until_ready()
    with BatonClient(fleet.client_address) as client:
        again = client.generate(prompt, max_tokens=2, temperature=0.0).report
    assert again.placement.prefill_worker == first.placement.prefill_worker
    assert (again.placement.predicted_hit_tokens, again.placement.hit_tokens) == (288, 288)  # 9 * 32 < 300


def test_round_robin_computes_more(fleet: Fleet) -> None:
    """The same kind of sessions by turns: what one worker holds the other computes again."""
    ours = hit_share(serve_sessions(fleet, first_seed=2000))
    fleet.wait_until_idle(40.0)
    fleet.kill("coordinator")
    fleet.start_coordinator("--prefill-policy", "round-robin")
    fleet.wait_until_ready()
    theirs = serve_sessions(fleet, first_seed=3000)
    check_predictions(theirs)  # who decides does not change what is known
    assert hit_share(theirs) < ours
