"""Random schedules: whatever happens, each request ends once, its client has every token of an unbroken run
exactly once, and the ledger returns to zero. With workers that publish KV events over a wire that loses,
doubles and delays them, engines whose hits are not what was predicted, deadlines that pass, and workers that
leave."""

from __future__ import annotations

import random
from zlib import crc32

import pytest

from baton.contract.errors import ServingError
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AskKvReplay,
    KvEvents,
    NoMoreLegs,
    StartDecode,
    StartPrefill,
    WorkerLoad,
)
from baton.contract.sampling import ServiceWish
from baton.contract.tokens import pack_token_ids, unpack_token_ids
from baton.worker.kv_journal import KvJournal
from tests.policy.engine_model import EngineModel

NUM_SEEDS = 60

P, D = WorkerRole.PREFILL, WorkerRole.DECODE


def next_token(packed: bytes) -> int:
    """Of an engine that was given all of this: from everything before it, so that a lost or repeated token
    shows in all that follow."""
    return crc32(packed) % 1000


def unbroken(packed: bytes, num_tokens: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(num_tokens):
        tokens.append(next_token(packed + pack_token_ids(tokens)))
    return tokens


class Publisher:
    """A prefill worker's cache and journal; what it sends may be lost, come twice or late."""

    def __init__(self, rng):
        self.rng = rng
        self.engine = EngineModel(12, 16)
        self.journal = KvJournal(max_kept_batches=3)
        self.num_computed = 0
        self.wire: list = []

    def compute(self, packed):
        """The number of cached tokens the engine found."""
        token_ids = unpack_token_ids(packed)
        num_hit_tokens = 16 * self.engine.num_hit_blocks(token_ids)
        if self.engine.start("leg", token_ids):
            self.engine.finish("leg")
        self.num_computed += len(token_ids) - num_hit_tokens
        self.put([self.journal.append(list(self.engine.take_events()))])
        return num_hit_tokens

    def put(self, batches):
        load = WorkerLoad(num_prefill_tokens_done=self.num_computed)
        for batch in batches:
            message = KvEvents(
                sequence=batch.sequence, events=batch.events, load=load, is_fresh_start=batch.is_fresh_start
            )
            self.wire += [message] * self.rng.choice([0, 1, 1, 1, 1, 2])

    def take(self):
        return self.wire.pop(self.rng.choice([0, 0, 0, -1])) if self.wire else None


def _events(bench, rng, live, names, publishers, generated):
    """One random thing that can happen, repeated and late messages included. `generated` is what each
    engine has added to each leg."""
    choice = rng.random()
    if choice < 0.3:
        wish = rng.choice([None, None, None, ServiceWish(deadline_s=rng.choice([0.05, 30.0]))])
        try:
            bench.submit(next(names), num_prompt_tokens=rng.randint(1, 60), max_tokens=rng.randint(1, 40),
                         seed=rng.choice([None, None, 1]),
                         service=wish)  # fmt: skip
        except ServingError:
            pass
    elif choice < 0.7 and live:
        worker, message = rng.choice(live)
        if bench.worker(worker) is None:
            live.remove((worker, message))
        elif isinstance(message, StartPrefill):
            num_cached = publishers[worker].compute(message.prompt_token_ids) if worker in publishers else 4
            bench.finish_prefill(worker, message.handoff_id, next_token(message.prompt_token_ids),
                                 text=rng.choice(["x", ""]), finish=rng.choice([None, None, "stop"]),
                                 num_cached_tokens=rng.choice([num_cached, None, 0]))  # fmt: skip
        else:
            own = generated.setdefault(message.handoff_id, [])
            for _ in range(rng.choice([1, 1, 20])):
                if len(own) < message.sampling.max_tokens:
                    own.append(next_token(message.prompt_token_ids + pack_token_ids(own)))
                    is_last = len(own) == message.sampling.max_tokens or rng.random() < 0.05
                    finish = "length" if is_last else None
                    bench.step(worker, message.handoff_id, own[-1], finish=finish)
    elif choice < 0.78:
        worker = rng.choice(list(publishers))
        message = publishers[worker].take()
        if message is not None and bench.worker(worker) is not None:
            bench.perform(bench.core.kv_events(bench.worker(worker), message, bench.now_s))
        for asked, replay in bench.take(AskKvReplay):
            publishers[asked].put(publishers[asked].journal.again(replay.first, replay.last))
    elif choice < 0.85 and live:
        worker, message = rng.choice(live)
        if bench.worker(worker) is not None:
            bench.fail(worker, message.handoff_id, rng.choice(["engine_failed", "invalid_request"]))
    elif choice < 0.92 and bench.sinks:
        bench.perform(bench.core.abort(rng.choice(list(bench.sinks)), bench.now_s))
    elif choice < 0.93:
        worker = bench.worker(rng.choice(["p1", "d1"]))
        if worker is not None:
            bench.perform(bench.core.worker_leaving(worker))
    elif choice < 0.96:
        worker = rng.choice(["p0", "p1", "d0", "d1"])
        bench.perform(bench.core.worker_lost(worker, "chaos", bench.now_s))
        if worker in publishers:
            publishers[worker] = Publisher(rng)
        bench.add(worker, P if worker[0] == "p" else D, num_blocks=12, has_kv_events=worker in publishers,
                  stream_params=rng.choice([None, {}]), boot_id=f"boot{rng.random()}")  # fmt: skip
    else:
        bench.now_s += rng.choice([0.1, 25.0])
        bench.perform(bench.core.tick(bench.now_s))


@pytest.fixture(scope="module")
def num_resumes():
    """Of all runs; that none would be resumed would be a test of nothing."""
    counts: list[int] = []
    yield counts
    assert sum(counts) > len(counts) or len(counts) < NUM_SEEDS


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_request_ends_once_and_nothing_stays_reserved(make_bench, num_resumes, seed):
    rng = random.Random(seed)
    bench = make_bench(max_queued=20)
    publishers = {"p0": Publisher(rng)} | ({"p1": Publisher(rng)} if seed % 2 else {})
    for name in ("p0", "p1"):
        bench.add(name, P, num_blocks=12, has_kv_events=name in publishers, stream_params={})
    for name in ("d0", "d1"):  # some pairs stream
        bench.add(name, D, num_blocks=12, stream_params={} if name == "d0" else None)
    names = (f"r{i}" for i in range(10_000))
    live: list = []
    generated: dict[str, list[int]] = {}
    dismissed = set()
    num_hits = 0
    for _ in range(400):
        _events(bench, rng, live, names, publishers, generated)
        starts = bench.take(StartPrefill)
        for _, start in starts:
            request = bench.core._attempts.legs.get(start.handoff_id)
            num_hits += request is not None and bool(request.predicted_hit_tokens)
        live += starts + bench.take(StartDecode)
        for worker in bench.core.fleet:
            account = worker.account
            assert account.num_queued_tokens >= 0 and account.num_reserved_blocks >= 0
            if worker.role is D:
                assert account.num_reserved_blocks <= 12  # never promised twice
        for worker_id, _ in bench.take(NoMoreLegs):  # nothing is planned with who was told so, ever
            assert bench.worker(worker_id).is_leaving
            dismissed.add(bench.worker(worker_id))
        for worker in dismissed:
            assert worker.account.num_legs == 0
    assert num_hits > 0
    bench.perform(bench.core.abort_all("end of the test", bench.now_s))
    for request_id, sink in bench.sinks.items():
        (report,) = sink.reports
        assert report.num_output_tokens == len(sink.token_ids)
        assert sink.token_ids == unbroken(bench.prompts[request_id], len(sink.token_ids))
        assert report.phases.queue_s >= 0 and report.phases.decode_s >= 0
    bench.assert_nothing_is_held()
    num_resumes.append(sum(sink.reports[0].num_resumes for sink in bench.sinks.values()))
    bench.now_s += 2.0
    bench.perform(bench.core.tick(bench.now_s))
    expectations = bench.core._dispatch._router._expectations
    assert expectations is None or len(expectations) == 0


@pytest.mark.parametrize("seed", range(10))
def test_after_any_loss_the_index_is_exact_again(make_bench, seed):
    """Once everything asked for has been answered, a hit is what the worker's cache says."""
    rng = random.Random(seed)
    bench = make_bench()
    bench.add("p0", P, num_blocks=12, has_kv_events=True)
    bench.add("d0", D)
    publisher = Publisher(rng)
    texts = [[rng.randrange(9) for _ in range(64)] for _ in range(6)]
    for round_ in range(60):
        text = rng.choice(texts)[: rng.randint(1, 64)]
        bench.submit(f"r{round_}", token_ids=text, max_tokens=1)
        ((_, start),) = bench.take(StartPrefill)
        num_cached = publisher.compute(start.prompt_token_ids)
        bench.finish_prefill("p0", start.handoff_id, finish="length", num_cached_tokens=num_cached)
        while (message := publisher.take()) is not None:
            bench.perform(bench.core.kv_events(bench.worker("p0"), message, bench.now_s))
        bench.now_s += 2.0
    for _ in range(20):  # answers get lost too; a batch without changes shows what is missing
        publisher.put([publisher.journal.append([])])
        while (message := publisher.take()) is not None:
            bench.perform(bench.core.kv_events(bench.worker("p0"), message, bench.now_s))
            for _, ask in bench.take(AskKvReplay):
                publisher.put(publisher.journal.again(ask.first, ask.last))
    for number, text in enumerate(texts):
        bench.submit(f"check{number}", token_ids=text, max_tokens=1)
        ((_, start),) = bench.take(StartPrefill)
        predicted = bench.core._attempts.legs[start.handoff_id].predicted_hit_tokens
        assert predicted == 16 * publisher.engine.num_hit_blocks(text)
        bench.perform(bench.core.abort(f"check{number}", bench.now_s))
    assert bench.core.prefixes.counts()["gaps"] > 0
