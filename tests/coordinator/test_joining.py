"""A worker serves once a hand-off with it has been seen to be right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    JoinTestPassed,
    KvSource,
    LegFailed,
    Message,
    PrefillFinished,
    SequenceDelta,
    StartDecode,
    StartPrefill,
    StepOutputs,
    TopLogprob,
    WorkerLoad,
    WorkerRefused,
)
from coordinator.joining import MAX_AT_ONCE, TIMEOUT_S
from coordinator.same_answer import difference

PREFILL, DECODE, BOTH = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH


def logprobs(token_id: int, shift: float = 0.0) -> list[TopLogprob]:
    """The token itself and nine others, each half as likely as the one before."""
    return [
        TopLogprob(token_id + rank, -(rank + 1) * math.log(2) + shift, rank + 1, None) for rank in range(10)
    ]


class Workers:
    """Fake workers, each of which answers the tests' legs with tokens that follow from its weights."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench
        self.weights: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.passed: set[str] = set()
        self.told: list[Message] = []

    def join(self, worker_id: str, role: WorkerRole, weights: int = 1, **changes: Any) -> None:
        self.weights[worker_id] = weights
        self.bench.add(worker_id, role, **changes)

    def answer(self) -> None:
        """Until nobody is told anything any more."""
        while self.bench.sent:
            self.answer_one()

    def answer_one(self) -> None:
        worker_id, message = self.bench.sent.pop(0)
        if isinstance(message, JoinTestPassed):
            self.passed.add(worker_id)
            return
        self.told.append(message)
        bench, core, worker = self.bench, self.bench.core, self.bench.worker(worker_id)
        if isinstance(message, WorkerRefused):
            self.refused[worker_id] = message.error.message
            bench.perform(core.worker_lost(worker_id, "it was refused", bench.now_s))
        elif isinstance(message, StartPrefill):
            source = KvSource(
                lease_s=30.0, num_tokens=37, num_bytes=1, transfer_params={"weights": self.weights[worker_id]}
            )
            finished = PrefillFinished(
                delta=self._delta(message.handoff_id, self.weights[worker_id], None),
                kv_source=source, queue_s=0.0, prefill_s=0.0, load=WorkerLoad(),
            )  # fmt: skip
            bench.perform(core.prefill_finished(worker, finished, bench.now_s))
        elif isinstance(message, StartDecode):
            weights = self.weights[worker_id]
            if message.kv_source is not None:  # its answer is made of both
                weights += 100 * (message.kv_source.transfer_params["weights"] - weights)
            for number in range(message.sampling.max_tokens):
                is_last = number + 1 == message.sampling.max_tokens
                delta = self._delta(message.handoff_id, weights, "length" if is_last else None)
                bench.perform(core.step(worker, StepOutputs(deltas=[delta], load=WorkerLoad()), bench.now_s))

    @staticmethod
    def _delta(handoff_id: str, weights: int, finish_reason: str | None) -> SequenceDelta:
        token_id = 1000 * weights
        return SequenceDelta(
            handoff_id, [token_id], "x", finish_reason, None, [logprobs(token_id)], num_cached_tokens=0
        )

    @property
    def num_tests(self) -> int:
        return sum(isinstance(message, StartPrefill) for message in self.told)

    def serving(self) -> set[str]:
        return {worker.worker_id for worker in self.bench.core.fleet if worker.takes_legs}


@pytest.fixture
def workers(make_bench: Any) -> Iterator[Workers]:
    bench = make_bench(tests_joins=True)
    yield Workers(bench)
    bench.assert_nothing_is_held()


def test_the_first_two_try_each_other_and_then_serve(workers: Workers) -> None:
    bench = workers.bench
    workers.join("p0", PREFILL)
    workers.join("d0", DECODE)
    assert workers.serving() == set()
    assert not bench.core.facts().is_ready
    workers.answer()
    assert workers.serving() == {"p0", "d0"}
    assert bench.core.facts().is_ready
    assert workers.num_tests == 1


def test_nothing_of_a_test_is_answered_from_a_prefix_cache(workers: Workers) -> None:
    """The received KV lies in it: only a prompt whose logprobs are wanted is computed whatever lies there."""
    workers.join("p0", PREFILL)
    workers.join("d0", DECODE)
    workers.answer()
    prefill, handed_over, alone = workers.told
    assert isinstance(prefill, StartPrefill)
    assert prefill.keep_kv
    assert isinstance(handed_over, StartDecode)
    assert handed_over.kv_source is not None
    assert handed_over.sampling.prompt_logprobs is None
    assert isinstance(alone, StartDecode)
    assert alone.kv_source is None
    assert alone.sampling.prompt_logprobs == 0
    assert alone.prompt_token_ids == prefill.prompt_token_ids


def test_a_worker_with_other_weights_is_refused_by_name_and_the_others_serve_on(workers: Workers) -> None:
    for name, role in (("p0", PREFILL), ("d0", DECODE)):
        workers.join(name, role)
    workers.answer()
    workers.join("p1", PREFILL, weights=2)
    workers.join("d1", DECODE, weights=3)
    workers.answer()
    assert set(workers.refused) == {"p1", "d1"}
    assert "worker p1 cannot join: a prompt computed by p1 and continued by d0" in workers.refused["p1"]
    assert "token 0 is" in workers.refused["d1"] or "prefill worker's token" in workers.refused["d1"]
    assert workers.serving() == {"p0", "d0"}


def test_of_two_that_nobody_knows_the_later_one_is_refused(workers: Workers) -> None:
    workers.join("p0", PREFILL, weights=2)
    workers.join("d0", DECODE)
    workers.answer()
    assert set(workers.refused) == {"d0"}
    assert workers.serving() == set()
    why = workers.bench.core.facts().why_not_ready
    assert why is not None, "the 503 says it"
    assert "worker d0 cannot join" in why
    workers.join("d1", DECODE, weights=2)
    workers.answer()
    assert workers.serving() == {"p0", "d1"}


def test_many_join_at_once_and_nobody_is_overrun(workers: Workers) -> None:
    """A worker that serves takes part in a few tests at a time; all newcomers get their turn."""
    bench = workers.bench
    for number in range(12):
        workers.join(f"p{number}", PREFILL)
    assert not bench.sent, "nobody to be tried with"
    workers.join("d0", DECODE)
    most = 0
    while bench.sent:
        most = max(most, len(bench.core._join_tests._all()))
        workers.answer_one()
    assert most == MAX_AT_ONCE
    assert len(workers.serving()) == 13
    assert workers.num_tests == 12


@pytest.mark.parametrize("how", ["failed transfer", "time-out"])
def test_what_fails_aloud_is_no_reason_to_stay_out(workers: Workers, how: str) -> None:
    bench = workers.bench
    workers.join("p0", PREFILL)
    workers.join("d0", DECODE)
    if how == "time-out":
        bench.now_s += TIMEOUT_S + 0.1
        bench.perform(bench.core.tick(bench.now_s))
    else:
        ((_, start),) = bench.take(StartPrefill)
        error = ErrorReport(code="kv_transfer_failed", message="it broke")
        message = LegFailed(handoff_id=start.handoff_id, error=error)
        bench.perform(bench.core.leg_failed(bench.worker("p0"), message, bench.now_s))
    assert workers.serving() == {"p0", "d0"}
    workers.answer()


def test_a_counterpart_that_is_lost_is_replaced(workers: Workers) -> None:
    bench = workers.bench
    workers.join("p0", PREFILL)
    workers.join("d0", DECODE)
    bench.perform(bench.core.worker_lost("p0", "killed", bench.now_s))
    bench.sent.clear()
    assert workers.serving() == set()
    workers.join("p1", PREFILL)
    workers.answer()
    assert workers.serving() == {"p1", "d0"}


def test_a_process_that_passed_is_not_tested_again(workers: Workers) -> None:
    """It says so when it registers again, here or elsewhere; a new process under its name is tested."""
    bench = workers.bench
    workers.join("p0", PREFILL)
    workers.join("d0", DECODE)
    workers.answer()
    assert workers.passed == {"p0", "d0"}
    workers.join("p0", PREFILL, has_passed_join_test=True)
    assert not bench.sent
    assert workers.serving() == {"p0", "d0"}
    workers.join("p0", PREFILL, boot_id="another")
    assert workers.serving() == {"d0"}
    workers.answer()
    assert workers.serving() == {"p0", "d0"}
    assert workers.num_tests == 2


def test_workers_for_both_phases_are_tested_only_beside_others(workers: Workers) -> None:
    workers.join("b0", BOTH)
    workers.join("b1", BOTH)
    assert workers.serving() == {"b0", "b1"}
    workers.join("p0", PREFILL, weights=2)
    workers.answer()
    assert set(workers.refused) == {"p0"}
    workers.join("d0", DECODE)
    workers.answer()
    assert workers.serving() == {"b0", "b1", "d0"}


def test_requests_wait_for_nobody_on_trial(workers: Workers) -> None:
    bench = workers.bench
    for name, role in (("p0", PREFILL), ("d0", DECODE)):
        workers.join(name, role)
    workers.answer()
    workers.join("p1", PREFILL)
    workers.join("d1", DECODE)
    bench.sent.clear()
    sink, handoff_id = bench.prefilled("r")
    ((worker_id, _),) = bench.take(StartDecode)
    assert worker_id == "d0"
    bench.step("d0", handoff_id, 5, finish="stop")
    assert sink.reports


# ── the comparison ───────────────────────────────────────────────────────────────────────────


def test_rounding_is_no_difference() -> None:
    assert difference([logprobs(7), logprobs(8)], [logprobs(7, 0.1), logprobs(8, -0.1)]) is None


def test_the_same_tokens_from_other_numbers_are_different() -> None:
    """As of a model that says one token for ever."""
    found = difference([logprobs(7), logprobs(7)], [logprobs(7), logprobs(7, -1.0)])
    assert found is not None
    assert re.fullmatch(r"the log probability of \d+ as token 1 is -\d.\d\d instead of -\d.\d\d", found)


def test_after_a_near_tie_the_two_go_their_own_ways() -> None:
    tie = logprobs(7)
    other = [tie[1], tie[0], *tie[2:]]
    assert difference([tie, logprobs(50)], [other, logprobs(90)]) is None


def test_another_token_is_a_difference() -> None:
    assert difference([logprobs(7)], [logprobs(400)]) == "token 0 is 7 instead of 400"


def test_a_token_less_is_a_difference() -> None:
    assert (
        difference([logprobs(7)], [logprobs(7)] * 2) == "it has 1 tokens with log probabilities instead of 2"
    )
