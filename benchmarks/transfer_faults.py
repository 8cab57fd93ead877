"""Transfers that go wrong between a pair of real engines that sign their KV, and what the requests get.

Faults are planted in the engines by a hand-off's name (`tests/engine/faulty_connector.py`): a block from a
wrong place, a flipped bit, or every sixteenth transfer refused, failed, stuck or told late.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from unittest import mock

from benchmarks.figures import Bar, Figure, Report
from benchmarks.samples import spread
from tests.engine.handoffs import Way, all_handed_off, answers_alone
from tests.engine.pair import EnginePair
from tests.engine.streams import faulty_transfer_arguments

WAYS: tuple[Way, ...] = ("pull", "stream")
PROMPT_TOKENS = (20, 300)
LEASE_S = 20
PULL_TIMEOUT_S = 1.0
FAULTY_AT_ONCE = 12
VOCABULARY = 2000

RATE_LAYERS, RATE_HEADS, RATE_BLOCKS = 8, 8, 128
RATE_BLOCK_BYTES = 256 << 10
"""64 KiB of KV per token in 8 layers, float32: the model of `bench handoff`."""
NUM_RATES = 5


def start_pair(model: Path, policy: str) -> EnginePair:
    pair = EnginePair(model)
    with mock.patch("baton.engine.vllm.engine.transfer_arguments", faulty_transfer_arguments):
        pair.run(
            pair.start(
                transfer="stream",
                is_kv_digest_enabled=True,
                max_model_len=1024,
                max_num_batched_tokens=256,
                max_batch_size=64,
                kv_lease_s=LEASE_S,
                kv_pull_timeout_s=PULL_TIMEOUT_S,
                kv_cache_bytes=256 << 20,
                decode={"kv_load_failure_policy": policy},
            ),
            timeout_s=300.0,
        )
    return pair


def judge_digest(report: Report, pair: EnginePair, num_unique: int, num_planted: int) -> None:
    """`pair` fails what it cannot use, so that nothing that was caught hides behind a right answer."""
    prompts = _prompts(num_unique, "unique")
    right = pair.run(answers_alone(pair, prompts), timeout_s=300.0)
    for way in WAYS:
        before = pair.decode.load()
        results = pair.run(all_handed_off(pair, way, prompts, "none", at_once=num_unique), timeout_s=600.0)
        pair.run(pair.wait_until_free(LEASE_S + 5.0), timeout_s=60.0)
        num_alarms = pair.decode.load().num_kv_digest_mismatches - before.num_kv_digest_mismatches
        num_equal = sum(result.token_ids == tokens for result, tokens in zip(results, right, strict=True))
        _count(report, "digest_unique_equal", way, num_equal, Bar(">=", float(num_unique)))
        _count(report, "digest_false_alarms", way, num_alarms, Bar("<=", 0.0))
        pair.run(pair.forget_prefixes())
        for fault in ("wrong", "flip"):
            some = _prompts(num_planted, f"{way} {fault}")
            before = pair.decode.load()
            results = pair.run(all_handed_off(pair, way, some, fault, at_once=8), timeout_s=600.0)
            pair.run(pair.wait_until_free(LEASE_S + 5.0), timeout_s=60.0)
            num_refused = sum(result.error is not None and not result.token_ids for result in results)
            num_differing = pair.decode.load().num_kv_digest_mismatches - before.num_kv_digest_mismatches
            _count(
                report, f"digest_caught_{fault}", way, min(num_refused, num_differing),
                Bar(">=", float(num_planted)),
                {"wrong": "of a block from a wrong place", "flip": "of one bit"}[fault],
            )  # fmt: skip


def judge_faults(report: Report, pair: EnginePair, policy: str, num_requests: int) -> None:
    prompts = _prompts(num_requests, "faults")
    right = pair.run(answers_alone(pair, prompts), timeout_s=300.0)
    for way in WAYS:
        results = pair.run(
            all_handed_off(pair, way, prompts, "unlucky16", at_once=FAULTY_AT_ONCE), timeout_s=600.0
        )
        subject = f"{way}, {policy}"
        num_equal = sum(result.token_ids == tokens for result, tokens in zip(results, right, strict=True))
        num_errors = sum(
            result.error is not None and result.error.code == "kv_transfer_failed" for result in results
        )
        num_right = num_equal + (num_errors if policy == "fail" else 0)
        _count(report, "faults_asked", subject, num_requests)
        _count(report, "faults_errors", subject, num_errors)
        _count(report, "faults_right", subject, num_right, Bar(">=", float(num_requests)))
        _count(report, "faults_blocks_held", subject, _blocks_held(pair), Bar("<=", 0.0))
        pair.run(pair.forget_prefixes())
        results = pair.run(all_handed_off(pair, way, prompts[:8], "none", at_once=8), timeout_s=120.0)
        num_after = sum(result.token_ids == tokens for result, tokens in zip(results, right, strict=False))
        _count(report, "faults_right_after", subject, num_after, Bar(">=", 8.0))
        pair.run(pair.forget_prefixes())


def judge_rate(report: Report) -> None:
    """What signing costs, apart from engines. Comparing costs the same."""
    import torch

    from baton.transfer.digest_orders import TaggedBlocks
    from baton.transfer.kv_digest import WORD_BYTES, KvDigest

    num_words = RATE_BLOCK_BYTES // RATE_HEADS // WORD_BYTES
    layers = [
        torch.randint(-(2**62), 2**62, (RATE_BLOCKS, RATE_HEADS, num_words)) for _ in range(RATE_LAYERS)
    ]
    digest = KvDigest(layers, torch.zeros((RATE_BLOCKS, RATE_HEADS), dtype=torch.int64))
    order = list(range(RATE_BLOCKS))
    random.Random(1).shuffle(order)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = []
    for _ in range(NUM_RATES):
        started_s = time.perf_counter()
        digest.sign(TaggedBlocks(order, order))
        num_bytes = RATE_BLOCKS * RATE_LAYERS * RATE_BLOCK_BYTES
        rates.append(num_bytes / (time.perf_counter() - started_s) / 1e6)
    torch.set_num_threads(num_threads)
    report.figures.append(Figure(row="digest_rate", subject="one thread", unit="MB/s", spread=spread(rates)))


def _blocks_held(pair: EnginePair) -> int:
    """Once every lease that a failed transfer left is over."""
    try:
        pair.run(pair.wait_until_free(LEASE_S + 5.0), timeout_s=60.0)
    except AssertionError:
        pass
    return sum(total - free for total, free in zip(pair.num_blocks(), pair.num_free_blocks(), strict=True))


def _prompts(num_prompts: int, seed: object, num_tokens: tuple[int, int] = PROMPT_TOKENS) -> list[list[int]]:
    rng = random.Random(f"faults {seed}")
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(*num_tokens))] for _ in range(num_prompts)]


def _count(
    report: Report, row: str, subject: str, number: int, bar: Bar | None = None, note: str = ""
) -> None:
    report.figures.append(
        Figure(row=row, subject=subject, unit="requests", spread=spread([float(number)]), bar=bar, note=note)
    )
