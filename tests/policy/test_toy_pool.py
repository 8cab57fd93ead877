"""Small simulations of what single decisions cannot show. Paired seeds; orderings, not values."""

from __future__ import annotations

import pytest

from baton.policy.base import Candidates, Key, Memoryless
from baton.policy.registry import by_name
from tests.policy.toy import Outcome, run

MEDIUM = 22.0
"""Requests/s, where round robin begins to queue."""
SEEDS = (1, 2, 3)


class ProductWithoutOne(Memoryless):
    """The port's classic mistake: an idle worker scores 0 whatever it holds."""

    name = "without-one"

    def rank(self, candidates: Candidates) -> tuple[Key, ...]:
        return (candidates.p_tokens * candidates.num_legs,)


def mean(outcomes: list[Outcome], name: str) -> float:
    values: list[float] = [getattr(outcome, name) for outcome in outcomes]
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def product() -> list[Outcome]:
    return [run(by_name("lmetric"), rate=MEDIUM, seed=seed) for seed in SEEDS]


def test_without_the_one_hits_collapse(product):
    """A4: the note's toy lost half of its hits and 2.3x in mean TTFT."""
    ablated = [run(ProductWithoutOne(), rate=MEDIUM, seed=seed) for seed in SEEDS]
    assert mean(ablated, "hit_ratio") < 0.6 * mean(product, "hit_ratio")
    assert mean(ablated, "mean_ttft_s") > 1.6 * mean(product, "mean_ttft_s")


@pytest.mark.parametrize("blind", ["least-request", "round-robin", "random", "power-of-two", "vllm"])
def test_the_product_beats_policies_blind_to_caches(product, blind):
    others = [run(by_name(blind), rate=MEDIUM, seed=seed) for seed in SEEDS]
    assert mean(others, "mean_ttft_s") > 1.5 * mean(product, "mean_ttft_s")
    assert mean(others, "hit_ratio") < mean(product, "hit_ratio")


def test_on_a_prefill_pool_p_token_is_at_least_as_good(product):
    """A6 in small: within 5 % or better."""
    p_token = [run(by_name("p-token"), rate=MEDIUM, seed=seed) for seed in SEEDS]
    assert mean(p_token, "mean_ttft_s") < 1.05 * mean(product, "mean_ttft_s")


def test_load_stays_even(product):
    assert mean(product, "max_share") < 1.3 / 8
