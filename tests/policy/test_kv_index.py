"""The index says what the engines' own caches say (A3), block by block, through losses and restarts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from baton.contract.messages import BlocksStored, KvEvent
from baton.contract.tokens import pack_token_ids
from baton.policy.kv_feed import AskReplay, KvFeeds
from baton.policy.kv_index import BYTES_PER_BLOCK, KvIndex
from tests.policy.engine_model import EngineModel

SIZE = 4


def hits(index: KvIndex, tokens: Sequence[int], num_slots: int, namespace: str = "") -> list[int]:
    prompt = index.prompt(pack_token_ids(tokens), namespace)
    found: list[int] = index.blocks_by_slot(index.match(prompt), num_slots).tolist()
    return found


def store(
    index: KvIndex, slot: int, tokens: Sequence[int], *, start: int = 0, seed: int = 0, namespace: str = ""
) -> None:
    """The blocks of `tokens` from block `start` on, as one event."""
    names = EngineModel(0, SIZE, seed)
    hashes = [names.engine_hash(tuple(tokens[:end])) for end in range(SIZE, len(tokens) + 1, SIZE)]
    index.stored(
        slot,
        hashes[start:],
        hashes[start - 1] if start else None,
        pack_token_ids(tokens[start * SIZE : len(hashes) * SIZE]),
        namespace,
    )


def drop(index: KvIndex, slot: int, tokens: Sequence[int], blocks: Sequence[int], seed: int = 0) -> None:
    names = EngineModel(0, SIZE, seed)
    index.removed(slot, [names.engine_hash(tuple(tokens[: (n + 1) * SIZE])) for n in blocks])


def make_index(num_slots: int, **options: int) -> KvIndex:
    index = KvIndex(SIZE, seed=1, **options)
    for slot in range(num_slots):
        index.open(slot)
    return index


TEXT = list(range(100, 100 + 10 * SIZE))  # 10 blocks
LONG = [*TEXT, 7]


def test_each_worker_is_found_at_its_own_longest_prefix():
    index = make_index(4)
    store(index, 0, TEXT)
    store(index, 2, TEXT[: 3 * SIZE])
    store(index, 3, [*TEXT[: 3 * SIZE], *range(900, 900 + 3 * SIZE)])  # another ending
    assert hits(index, LONG, 4) == [10, 0, 3, 3]


def test_the_last_token_is_never_a_hit():
    """The engine always computes one: 40 tokens can hit 9 blocks, 41 can hit 10."""
    index = make_index(1)
    store(index, 0, TEXT)
    assert hits(index, TEXT, 1) == [9]
    assert hits(index, LONG, 1) == [10]
    assert hits(index, TEXT[:SIZE], 1) == [0]
    assert hits(index, [], 1) == [0]


def test_a_block_counts_only_behind_its_parents():
    """Same tokens at another place, or after another beginning, are another block."""
    index = make_index(1)
    store(index, 0, TEXT)
    assert hits(index, TEXT[SIZE:], 1) == [0]
    assert hits(index, [1, *TEXT[1:], 7], 1) == [0]
    zeros = [0] * (5 * SIZE)
    store(index, 0, zeros)
    assert hits(index, [0] * (9 * SIZE), 1) == [5]


def test_a_hole_hides_what_comes_after_until_it_is_filled():
    """Engines usually evict from the end; when one does not, hits end at the hole."""
    index = make_index(2)
    store(index, 0, TEXT)
    store(index, 1, TEXT)
    drop(index, 0, TEXT, [4])
    assert hits(index, LONG, 2) == [4, 10]
    drop(index, 0, TEXT, [8])
    store(index, 0, TEXT[: 5 * SIZE], start=4)
    assert hits(index, LONG, 2) == [8, 10]
    drop(index, 0, TEXT, [0, 1, 2, 3, 4, 5, 6, 7, 9])
    drop(index, 1, TEXT, range(10))
    assert (hits(index, LONG, 2), index.num_blocks) == ([0, 0], 0)


def test_equal_blocks_are_counted_not_merged():
    index = make_index(1)
    store(index, 0, TEXT)
    store(index, 0, TEXT, start=8)
    drop(index, 0, TEXT, [9, 8])
    assert hits(index, LONG, 1) == [10]
    drop(index, 0, TEXT, [9])
    assert hits(index, LONG, 1) == [9]


def test_namespaces_share_nothing():
    index = make_index(1)
    store(index, 0, TEXT, namespace="adapter")
    assert hits(index, LONG, 1) == [0]
    assert hits(index, LONG, 1, "adapter") == [10]
    assert hits(index, LONG, 1, "other") == [0]


def test_engines_may_name_blocks_differently():
    """Other hash seeds: other names for the same block, one node."""
    index = make_index(2)
    store(index, 0, TEXT, seed=1)
    store(index, 1, TEXT, seed=2)
    assert index.num_blocks == 10
    drop(index, 0, TEXT, range(10), seed=1)
    assert hits(index, LONG, 2) == [0, 10]
    drop(index, 1, TEXT, range(10), seed=2)
    assert index.num_blocks == 0


def test_engines_may_even_use_one_name_for_two_blocks():
    """Workers that just number their blocks: each worker's names are its own."""
    index = make_index(3)
    a, b = TEXT[: 2 * SIZE], [5] * (2 * SIZE)
    index.stored(0, [1, 2], None, pack_token_ids(a))
    index.stored(1, [1, 2], None, pack_token_ids(b))
    index.stored(2, [2, 1], None, pack_token_ids(a))
    assert (hits(index, [*a, 9], 3), hits(index, [*b, 9], 3)) == ([2, 0, 2], [0, 2, 0])
    index.removed(1, [2])
    index.removed(2, [1])
    assert (hits(index, [*a, 9], 3), hits(index, [*b, 9], 3)) == ([2, 0, 1], [0, 1, 0])
    index.removed(0, [1, 2])
    index.removed(1, [1])
    index.removed(2, [2])
    assert index.num_blocks == 0


def test_a_slot_is_reused_without_memories():
    """Cleared, closed, opened again; the old bits are wiped with later events and then given out."""
    index = make_index(2)
    for round_number in range(50):
        store(index, 0, TEXT)
        store(index, 1, [round_number, *TEXT[1:]])
        assert hits(index, LONG, 2)[0] == 10
        index.clear(0)
        assert hits(index, LONG, 2)[0] == 0
        index.close(1)
        index.open(1)
        assert hits(index, [round_number, *TEXT[1:], 7], 2)[1] == 0
    while not index.sweep(100):
        pass
    assert index.num_blocks == 0
    assert len(index._slot_of_bit) < 20  # not one per incarnation


def test_sizes_that_disagree_are_refused():
    index = make_index(1)
    with pytest.raises(ValueError, match="2 blocks of 4 tokens were stored with 7 tokens"):
        index.stored(0, [1, 2], None, pack_token_ids(range(7)))
    assert index.num_blocks == 0


def test_the_byte_cap_forgets_old_chains_from_their_ends():
    """
    1. two chains of 10 fill the cap of 20; the first is matched again
    2. a third chain of 6 comes: the second one shrinks, the first stays whole
    """
    index = make_index(1, max_bytes=20 * BYTES_PER_BLOCK)
    other, third = [1, *TEXT[1:]], [2, *TEXT[1:]]
    store(index, 0, TEXT)
    store(index, 0, other)
    assert hits(index, LONG, 1) == [10]
    store(index, 0, third[: 6 * SIZE])
    assert (index.num_blocks, index.counters.num_evicted) == (20, 6)
    assert [hits(index, [*t, 7], 1) for t in (TEXT, other, third)] == [[10], [4], [6]]
    drop(index, 0, other, range(10))  # six of them unknown by now
    assert (index.counters.num_unknown_removals, index.num_blocks) == (6, 16)


def test_children_of_forgotten_blocks_are_not_indexed():
    index = make_index(1)
    store(index, 0, TEXT, start=5)
    assert (index.counters.num_unknown_parents, index.num_blocks) == (5, 0)


# ── against engines ──────────────────────────────────────────────────────────────────────────


class Fleet:
    """Engines with their own caches, feeds to one index, and a wire that may misbehave."""

    def __init__(self, seed: int, num_workers: int, num_blocks: int) -> None:
        self.rng = random.Random(seed)
        self.index = KvIndex(SIZE, seed=seed)
        self.feeds = KvFeeds(self.index)
        self.num_blocks = num_blocks
        self.engines = [self.new_engine() for _ in range(num_workers)]
        self.boots = [f"boot{i}" for i in range(num_workers)]
        self.sent: list[list[tuple[KvEvent, ...]]] = [[] for _ in range(num_workers)]
        for slot, boot in enumerate(self.boots):
            self.feeds.joined(slot, boot)
        self.texts: list[list[int]] = []

    def new_engine(self) -> EngineModel:
        return EngineModel(self.num_blocks, SIZE, self.rng.choice([1, 2]))

    def prompt(self) -> list[int]:
        """New, an old one again, or an old one continued: from some point, or at its end."""
        rng = self.rng
        fresh = [rng.randrange(3) for _ in range(rng.randint(1, 12 * SIZE))]
        if self.texts and rng.random() < 0.8:
            base = rng.choice(self.texts)
            fresh = base[: rng.choice([len(base), rng.randint(0, len(base))])] + fresh[: rng.randint(1, 20)]
        self.texts = [*self.texts[-30:], fresh]
        return fresh

    def step(self, slot: int) -> None:
        """One engine does something; its events become a numbered batch."""
        rng, engine = self.rng, self.engines[slot]
        if engine.running and rng.random() < 0.5:
            engine.finish(rng.choice(engine.running), is_tail_first=rng.random() < 0.8)
        elif not engine.running and rng.random() < 0.02:
            engine.reset()
        else:
            engine.start(f"r{rng.getrandbits(60)}", self.prompt())
        self.sent[slot].append(engine.take_events())

    def restart(self, slot: int) -> None:
        self.engines[slot], self.sent[slot] = self.new_engine(), []
        self.boots[slot] += "'"
        self.feeds.joined(slot, self.boots[slot])

    def deliver(self, slot: int, sequence: int) -> AskReplay | None:
        return self.feeds.received(slot, self.boots[slot], sequence, self.sent[slot][sequence])

    def assert_equal(self) -> None:
        tokens = self.prompt()
        assert hits(self.index, tokens, len(self.engines)) == [e.num_hit_blocks(tokens) for e in self.engines]


@pytest.mark.parametrize("seed", range(20))
def test_predicted_hits_are_the_engines_hits(seed):
    """Synchronous events: after every step every worker's hit on a random prompt is exact."""
    fleet = Fleet(seed, num_workers=4, num_blocks=40)
    num_hits = 0
    for _ in range(600):
        slot = fleet.rng.randrange(4)
        if fleet.rng.random() < 0.01:
            fleet.restart(slot)
        else:
            fleet.step(slot)
            fleet.deliver(slot, len(fleet.sent[slot]) - 1)
        fleet.assert_equal()
        num_hits += fleet.index.match(fleet.index.prompt(pack_token_ids(fleet.prompt()))).num_blocks > 0
    assert num_hits > 100
    assert fleet.index.counters.num_unknown_removals == 0
    assert fleet.index.counters.num_unknown_parents == 0


@pytest.mark.parametrize("seed", range(10))
def test_lost_doubled_and_swapped_batches_are_repaired_by_replay(seed):
    """
    1. the wire loses, doubles and swaps batches; each gap asks for exactly what is missing
    2. the replays are sent, themselves mixed with live batches: every hit is exact again
    """
    fleet = Fleet(seed, num_workers=3, num_blocks=40)
    rng = fleet.rng
    for _ in range(30):
        asked: list[AskReplay] = []
        for slot in range(3):
            first = len(fleet.sent[slot])
            for _ in range(10):
                fleet.step(slot)
            order = [n for n in range(first, first + 10) if rng.random() > 0.2]
            order += rng.sample(order, min(3, len(order)))
            for i in range(len(order) - 1):
                if rng.random() < 0.3:
                    order[i], order[i + 1] = order[i + 1], order[i]
            order.append(first + 9)  # the last one arrives, else nobody knows of a gap yet
            asked += [a for n in order if (a := fleet.deliver(slot, n)) is not None]
        for ask in asked:
            for n in range(ask.first, ask.last + 1):
                fleet.deliver(ask.slot, n)
        for _ in range(5):
            fleet.assert_equal()
    counters = fleet.feeds.counters
    assert counters.num_gaps and counters.num_replayed and counters.num_duplicates
    assert counters.num_overflows == 0


def stored(*token_ids: int) -> tuple[KvEvent, ...]:
    """Prompts of one block each, of one token."""
    names = EngineModel(0, SIZE)
    return tuple(
        BlocksStored(
            block_hashes=[names.engine_hash((token_id,) * SIZE)],
            parent_hash=None,
            token_ids=pack_token_ids([token_id] * SIZE),
        )
        for token_id in token_ids
    )


def test_a_worker_that_cannot_replay_starts_afresh():
    """
    1. batch 1 is lost; 2 and 3 wait behind the gap, what batch 0 said still counts
    2. the worker has it no more and tells all it holds as batches 4 and 5: exactly that counts
    3. a late replay of batch 1 changes nothing
    """
    index = KvIndex(SIZE, seed=1)
    feeds = KvFeeds(index)
    feeds.joined(0, "boot")
    assert feeds.received(0, "boot", 0, stored(1)) is None
    assert feeds.received(0, "boot", 2, stored(2)) == AskReplay(0, 1, 1)
    assert feeds.received(0, "boot", 3, stored(3)) is None  # asked already
    assert [hits(index, [t] * 5, 1) for t in (1, 2, 3)] == [[1], [0], [0]]
    assert feeds.received(0, "boot", 5, stored(5)) == AskReplay(0, 4, 4)  # it overtook the fresh start
    assert feeds.received(0, "boot", 4, stored(2, 3), is_fresh_start=True) is None
    assert [hits(index, [t] * 5, 1) for t in (1, 2, 3, 5)] == [[0], [1], [1], [1]]
    assert feeds.received(0, "boot", 1, stored(1)) is None
    assert (feeds.counters.num_fresh_starts, feeds.counters.num_duplicates) == (1, 1)


def test_an_absurd_number_costs_no_more_than_a_small_one():
    """A gap is a pair of numbers, not a list: 2**60 batches could never be counted."""
    feeds = KvFeeds(KvIndex(SIZE, seed=1))
    feeds.joined(0, "boot")
    assert feeds.received(0, "boot", 2**60, ()) == AskReplay(0, 0, 2**60 - 1)
    assert feeds.received(0, "boot", 0, ()) is None
    assert feeds.counters.num_replayed == 1


def test_a_pile_behind_a_gap_is_bounded_and_asked_for_anew():
    feeds = KvFeeds(KvIndex(SIZE, seed=1), max_held_batches=3)
    feeds.joined(0, "boot")
    assert feeds.received(0, "boot", 1, ()) == AskReplay(0, 0, 0)
    assert [feeds.received(0, "boot", n, ()) for n in (2, 3, 4)] == [None, None, AskReplay(0, 0, 4)]
    assert feeds.received(0, "boot", 5, ()) is None
    for n in range(5):
        feeds.received(0, "boot", n, ())
    assert (feeds.counters.num_overflows, feeds.counters.num_batches) == (1, 6)


def test_a_new_process_starts_from_nothing_and_the_old_one_is_not_heard():
    index = KvIndex(SIZE, seed=1)
    feeds = KvFeeds(index)
    feeds.joined(0, "old")
    batch = (BlocksStored(block_hashes=[1], parent_hash=None, token_ids=pack_token_ids([1] * SIZE)),)
    feeds.received(0, "old", 0, batch)
    feeds.joined(0, "old")  # only the connection was lost
    assert hits(index, [1] * 5, 1) == [1]
    feeds.joined(0, "new")
    assert hits(index, [1] * 5, 1) == [0]
    feeds.received(0, "old", 1, batch)
    assert (hits(index, [1] * 5, 1), feeds.counters.num_late) == ([0], 1)
    feeds.received(0, "new", 0, batch)
    feeds.left(0)
    feeds.received(0, "new", 1, batch)
    assert (hits(index, [1] * 5, 1), feeds.counters.num_late) == ([0], 2)


def test_many_workers_and_long_prompts_agree_with_a_walk():
    """600 workers hold prefixes of random length of one prompt of 700 blocks: bisection, unpacking
    of large sets and several hashing steps, against the lengths themselves."""
    rng = random.Random(2)
    index = KvIndex(SIZE, seed=3)
    tokens = [rng.randrange(2**17) for _ in range(700 * SIZE + 1)]
    packed = pack_token_ids(tokens)
    lengths = [rng.choice([0, 1, 63, 64, 65, 511, 512, 513, 700, rng.randint(0, 700)]) for _ in range(600)]
    for slot, length in enumerate(lengths):
        index.open(slot)
        index.stored(slot, list(range(1, length + 1)), None, packed[: length * SIZE * 4])
    assert hits(index, tokens, 600) == lengths
    assert index.match(index.prompt(packed)).num_blocks == 700
