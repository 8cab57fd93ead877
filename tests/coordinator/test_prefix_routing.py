"""KV events in, prompts to their holders: the core with workers that tell what they hold."""

import pytest

from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import (
    AllBlocksCleared,
    AskKvReplay,
    BlocksStored,
    Heartbeat,
    StartPrefill,
    WorkerLoad,
)
from baton.contract.tokens import pack_token_ids

P, D = WorkerRole.PREFILL, WorkerRole.DECODE
BLOCK = 16

PROMPT = list(range(1000, 1161))  # 161 tokens: 10 full blocks and one more token


def stored(token_ids, num_blocks, first=0):
    """The blocks from `first` on, named by what they end."""
    names = [hash((n, *token_ids[: n * BLOCK])) % 2**64 for n in range(num_blocks + 1)]
    return BlocksStored(
        block_hashes=names[first + 1 :],
        parent_hash=names[first] if first else None,
        token_ids=pack_token_ids(token_ids[first * BLOCK : num_blocks * BLOCK]),
    )


@pytest.fixture
def fleet(make_bench):
    """4P1D, all of them telling what they hold."""
    bench = make_bench()
    for name in ("p0", "p1", "p2", "p3"):
        bench.add(name, P, has_kv_events=True)
    bench.add("d0", D, has_kv_events=True)
    return bench


def prefill(bench, request_id, token_ids=PROMPT, **sampling):
    """Submits; (worker, handoff id) of the prefill it became."""
    bench.submit(request_id, token_ids=token_ids, **sampling)
    ((worker_id, start),) = bench.take(StartPrefill)
    return worker_id, start.handoff_id


def test_a_prompt_goes_to_the_worker_that_holds_it(fleet):
    """
    1. p2 says it holds 8 of the 10 blocks: 128 of 161 tokens
    2. the request goes there and costs its queue 33 tokens; the placement says what was expected
    3. the engine found as much: both numbers are reported
    """
    fleet.kv_events("p2", 0, stored(PROMPT, 8))
    worker_id, handoff_id = prefill(fleet, "r1", max_tokens=2)
    assert worker_id == "p2"
    assert fleet.worker("p2").account.num_queued_tokens == 33  # 161 - 128
    fleet.finish_prefill("p2", handoff_id, num_cached_tokens=128)
    sink = fleet.sinks["r1"]
    assert (sink.placements[0].predicted_hit_tokens, sink.placements[0].hit_tokens) == (128, 128)
    fleet.step("d0", handoff_id, 5, finish="length")
    assert (sink.reports[0].num_cached_tokens, sink.reports[0].placement.hit_tokens) == (128, 128)
    fleet.assert_nothing_is_held()


def test_a_full_hit_leaves_the_last_token_to_compute(fleet):
    """160 tokens in 10 blocks, all held: the engine computes the last block, so 9 count."""
    prompt = PROMPT[:160]
    fleet.kv_events("p1", 0, stored(prompt, 10))
    assert prefill(fleet, "r1", prompt)[0] == "p1"
    assert fleet.worker("p1").account.num_queued_tokens == 16  # 160 - 9 * 16


def test_a_wrong_prediction_is_corrected_by_the_engine(fleet):
    """
    1. two prompts for p0: expected hits 128 and 0, so 33 + 50 tokens are queued
    2. the first found only 64: its other 64 were computed too, and nothing of them stays queued
    """
    fleet.kv_events("p0", 0, stored(PROMPT, 8))
    for name in ("p1", "p2", "p3"):
        fleet.perform(fleet.core.worker_lost(name, "not wanted here", 0.0))
    _, first = prefill(fleet, "r1")
    prefill(fleet, "r2", list(range(50)))
    assert fleet.worker("p0").account.num_queued_tokens == 83
    fleet.finish_prefill("p0", first, num_cached_tokens=64)
    assert fleet.worker("p0").account.num_queued_tokens == 50
    assert fleet.sinks["r1"].placements[0].hit_tokens == 64


def test_without_events_nothing_is_predicted_or_hashed(bench):
    _, handoff_id = bench.prefilled("r1")
    request = bench.core._attempts.legs[handoff_id]
    assert (request.hits, request.placement.predicted_hit_tokens) == (None, None)
    assert bench.core.prefixes.counts() == {}


def test_of_a_worker_that_tells_nothing_nothing_is_predicted(make_bench):
    """
    1. p0 tells, p1 does not; p0 is busy, so the prompt goes to p1, twice
    2. neither is a prediction: p1 may keep no prefixes at all
    """
    bench = make_bench()
    bench.add("p0", P, has_kv_events=True)
    bench.add("p1", P)
    bench.add("d0", D)
    bench.worker("p0").account.commit("busy", num_queued_tokens=5000, num_blocks=1)
    for name in ("r1", "r2"):
        worker_id, handoff_id = prefill(bench, name)
        assert worker_id == "p1"
        assert bench.core._attempts.legs[handoff_id].predicted_hit_tokens is None
    assert bench.worker("p1").account.num_queued_tokens == 2 * 161


def test_prompt_logprobs_make_the_engine_compute_all_of_it(fleet):
    fleet.kv_events("p2", 0, stored(PROMPT, 10))
    worker_id, handoff_id = prefill(fleet, "r1", prompt_logprobs=1)
    assert fleet.worker(worker_id).account.num_queued_tokens == 161
    assert fleet.core._attempts.legs[handoff_id].predicted_hit_tokens is None


def test_a_gap_is_asked_for_and_replayed(fleet):
    """
    1. batch 1 of p3 is lost: what is missing is asked for, once
    2. the replay brings it, and batch 2 that waited behind it counts too
    """
    fleet.kv_events("p3", 0, stored(PROMPT, 2))
    fleet.kv_events("p3", 2, stored(PROMPT, 6, first=4))
    fleet.kv_events("p3", 3)
    assert fleet.take(AskKvReplay) == [("p3", AskKvReplay(first=1, last=1))]
    fleet.kv_events("p3", 1, stored(PROMPT, 4, first=2))
    worker_id, handoff_id = prefill(fleet, "r1")
    assert (worker_id, fleet.core._attempts.legs[handoff_id].predicted_hit_tokens) == ("p3", 96)  # 6 * 16
    assert fleet.core.prefixes.counts()["batches replayed"] == 1


def test_a_fresh_start_replaces_what_was_known(fleet):
    fleet.kv_events("p3", 0, stored(PROMPT, 8))
    fleet.kv_events("p3", 7, stored(PROMPT, 2), is_fresh_start=True)
    assert fleet.take(AskKvReplay) == []
    _, handoff_id = prefill(fleet, "r1")
    assert fleet.core._attempts.legs[handoff_id].predicted_hit_tokens == 32


@pytest.mark.parametrize("boot_id", ["boot-p2", "another"])
def test_a_worker_that_registers_again_is_known_to_hold_nothing(fleet, boot_id):
    """The same process tells all it holds at once; a new one has nothing."""
    fleet.kv_events("p2", 0, stored(PROMPT, 8))
    fleet.add("p2", P, has_kv_events=True, boot_id=boot_id)
    _, handoff_id = prefill(fleet, "r1")
    assert fleet.core._attempts.legs[handoff_id].predicted_hit_tokens == 0


def test_the_index_lives_as_long_as_somebody_tells(make_bench):
    """A fleet that leaves and comes back with another block size is indexed by that one."""
    bench = make_bench()
    for size in (16, 32):
        bench.add("p0", P, has_kv_events=True, block_size_tokens=size)
        bench.add("d0", D, has_kv_events=True, block_size_tokens=size)
        num_blocks = 160 // size
        tokens = pack_token_ids(PROMPT[:160])
        event = BlocksStored(block_hashes=list(range(num_blocks)), parent_hash=None, token_ids=tokens)
        bench.kv_events("p0", 0, event)
        assert bench.core.prefixes.num_blocks == num_blocks
        _, handoff_id = prefill(bench, f"r{size}", max_tokens=1)
        assert bench.core._attempts.legs[handoff_id].predicted_hit_tokens == 160
        bench.finish_prefill("p0", handoff_id, finish="length")
        for name in ("p0", "d0"):
            bench.perform(bench.core.worker_lost(name, "over", 0.0))
        assert bench.core.prefixes.num_blocks == 0


def test_a_burst_of_one_prompt_follows_the_first_as_soon_as_it_is_computed(fleet):
    """
    1. the first of eight equal prompts is computed, step by step: 161 tokens of progress are told
    2. none of its events are here yet; all others follow it, at 1 uncached token each
    3. its end is told before its events: they are expected a while longer
    """
    first, handoff_id = prefill(fleet, "r0", max_tokens=1)
    fleet.perform(fleet.core.heartbeat(fleet.worker(first), heartbeat(0), 0.0))
    fleet.perform(fleet.core.heartbeat(fleet.worker(first), heartbeat(161), 0.0))
    assert fleet.worker(first).account.num_queued_tokens == 0
    for number in range(1, 6):
        assert prefill(fleet, f"r{number}", max_tokens=1)[0] == first
    assert fleet.worker(first).account.num_queued_tokens == 5
    fleet.finish_prefill(first, handoff_id, num_cached_tokens=0)
    fleet.now_s = 0.5
    for number in range(6, 8):
        assert prefill(fleet, f"r{number}", max_tokens=1)[0] == first


def heartbeat(num_prefill_tokens_done):
    return Heartbeat(load=WorkerLoad(num_prefill_tokens_done=num_prefill_tokens_done), num_legs=0)


def test_what_was_expected_and_never_stored_is_forgotten(make_bench):
    """An engine that tells of no blocks for a prompt it computed: the next look knows better."""
    bench = make_bench()
    bench.add("p0", P, has_kv_events=True)
    bench.add("d0", D)
    _, handoff_id = prefill(bench, "r1")
    bench.finish_prefill("p0", handoff_id, num_cached_tokens=0)
    bench.now_s = 2.0
    _, handoff_id = prefill(bench, "r2")
    assert bench.core._attempts.legs[handoff_id].predicted_hit_tokens == 0


def test_an_aborted_prompt_is_expected_no_more(fleet):
    prefill(fleet, "r1")
    fleet.perform(fleet.core.abort("r1", 0.0))
    _, handoff_id = prefill(fleet, "r2")
    assert fleet.core._attempts.legs[handoff_id].predicted_hit_tokens == 0


def test_a_cleared_cache_holds_nothing_and_what_was_expected_is_gone(fleet):
    worker_id, first = prefill(fleet, "r1")
    fleet.finish_prefill(worker_id, first)
    fleet.kv_events(worker_id, 0, stored(PROMPT, 10), AllBlocksCleared())
    _, handoff_id = prefill(fleet, "r2")
    assert fleet.core._attempts.legs[handoff_id].predicted_hit_tokens == 0


def test_progress_in_a_prompt_makes_room_in_the_window(make_bench):
    """
    1. window 100, a prompt of 161 goes alone; the next one, of 40, waits
    2. a step computed 96 tokens of it: 65 + 40 > 100. Another 16: 49 + 40 fit
    """
    bench = make_bench()
    bench.add("p0", P, has_kv_events=True, prefill_window_tokens=100)
    bench.add("d0", D)
    bench.submit("r1", token_ids=PROMPT)
    bench.submit("r2", token_ids=list(range(40)))
    bench.kv_events("p0", 0)  # the first report only sets the mark
    bench.take(StartPrefill)
    bench.kv_events("p0", 1, stored(PROMPT, 6), num_prefill_tokens_done=96)
    assert bench.take(StartPrefill) == []
    bench.kv_events("p0", 2, stored(PROMPT, 7, first=6), num_prefill_tokens_done=112)
    ((_, start),) = bench.take(StartPrefill)
    assert start.request_id == "r2"


def test_the_window_counts_what_a_worker_has_to_compute(make_bench):
    """A prompt of 161 tokens does not fit beside another one; the 33 that are not held do."""
    bench = make_bench()
    bench.add("p0", P, has_kv_events=True, prefill_window_tokens=100)
    bench.add("d0", D)
    bench.kv_events("p0", 0, stored(PROMPT, 8))
    bench.submit("r1", token_ids=list(range(60)))
    bench.submit("r2", token_ids=PROMPT)
    bench.submit("r3", token_ids=list(range(500, 520)))
    starts = [start.request_id for _, start in bench.take(StartPrefill)]
    assert starts == ["r1", "r2"]  # 60 + 33 = 93; 20 more do not fit
    assert bench.worker("p0").account.num_queued_tokens == 93


def test_a_retry_predicts_anew_from_the_hashes_of_the_first_try(fleet):
    """
    1. p2 holds the prompt; it is lost with the request
    2. the retry matches again: nobody holds anything now; the prompt was hashed once
    """
    fleet.kv_events("p2", 0, stored(PROMPT, 8))
    _, first = prefill(fleet, "r1")
    request = fleet.core._attempts.legs[first]
    hashes = request.hits.prompt
    fleet.perform(fleet.core.worker_lost("p2", "gone", 0.0))
    ((_, again),) = fleet.take(StartPrefill)
    request = fleet.core._attempts.legs[again.handoff_id]
    assert request.predicted_hit_tokens == 0
    assert request.hits.prompt is hashes


def test_every_output_token_grows_the_decode_account(fleet):
    worker_id, handoff_id = prefill(fleet, "r1")
    fleet.finish_prefill(worker_id, handoff_id)
    account = fleet.worker("d0").account
    assert account.num_kv_tokens == 161
    fleet.step("d0", handoff_id, 5, 6, 7)
    assert account.num_kv_tokens == 164
    fleet.step("d0", handoff_id, 8, finish="length")
    fleet.assert_nothing_is_held()
