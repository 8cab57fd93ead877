"""What a worker tells again: a gap as it was, or everything its cache holds."""

import random

import pytest

from baton.contract import codec
from baton.contract.messages import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvents, WorkerLoad
from baton.contract.tokens import pack_token_ids
from baton.policy.kv_feed import KvFeeds
from baton.policy.kv_index import KvIndex
from baton.worker import kv_journal
from baton.worker.kv_journal import KvJournal

SIZE = 4


def stored(names, parent=None, namespace=""):
    packed = pack_token_ids([name % 2**32 for name in names for _ in range(SIZE)])
    return BlocksStored(block_hashes=list(names), parent_hash=parent, token_ids=packed, namespace=namespace)


def hits(index, names, namespace=""):
    """Blocks of the prompt made of these, on the one worker there is."""
    packed = pack_token_ids([name for name in [*names, 0] for _ in range(SIZE)])
    return index.match(index.prompt(packed, namespace)).num_blocks


def told(batches):
    index = KvIndex(SIZE, seed=1)
    feeds = KvFeeds(index)
    feeds.joined(0, "boot")
    for batch in batches:
        assert feeds.received(
            0, "boot", batch.sequence, batch.events, is_fresh_start=batch.is_fresh_start
        ) is None  # fmt: skip
    return index


def test_a_gap_is_answered_with_the_batches_themselves():
    journal = KvJournal()
    made = [journal.append([stored([n])]) for n in range(1, 6)]
    assert [batch.sequence for batch in made] == [0, 1, 2, 3, 4]
    assert journal.again(1, 3) == made[1:4]
    assert journal.again(4, 9) == made[4:]
    assert journal.again(5, 9) == []


@pytest.mark.parametrize("bound", [{"max_kept_batches": 2}, {"max_kept_tokens": 2 * SIZE}])
def test_what_is_not_kept_any_more_is_answered_with_everything(bound):
    """
    1. the chain 1-2-3, a branch 1-4, another root 9; 3 was removed again
    2. only two batches are kept: asked for batch 0, the journal starts afresh, with a number of its own
    3. and what comes later continues that numbering
    """
    journal = KvJournal(**bound)
    journal.append([stored([1, 2, 3])])
    journal.append([stored([4], parent=1)])
    journal.append([stored([9])])
    journal.append([BlocksRemoved(block_hashes=[3])])
    (start,) = journal.again(0, 0)
    assert (start.sequence, start.is_fresh_start) == (4, True)
    later = journal.append([stored([5], parent=4)])
    assert later.sequence == 5
    index = told([start, later])
    assert [hits(index, names) for names in ([1, 2, 3], [1, 4, 5], [9], [4])] == [2, 3, 1, 0]
    assert journal.num_blocks == index.num_blocks == 5


def test_a_fresh_start_counts_copies_and_keeps_namespaces_apart():
    """Two copies of block 1 in one namespace: after one removal it is still a hit."""
    journal = KvJournal()
    journal.append([stored([1], namespace="lora"), stored([1], namespace="lora"), stored([2], parent=1)])
    index = told([*journal.fresh_start(), journal.append([BlocksRemoved(block_hashes=[1])])])
    assert (hits(index, [1, 2]), hits(index, [1, 2], "lora")) == (0, 2)
    index = told([*journal.fresh_start(), journal.append([BlocksRemoved(block_hashes=[1])])])
    assert hits(index, [1, 2], "lora") == 0


def test_a_journal_that_never_told_anything_has_nothing_to_start_with():
    journal = KvJournal()
    assert journal.fresh_start() == []
    journal.append([stored([1]), AllBlocksCleared()])
    (start,) = journal.fresh_start()
    assert (start.is_fresh_start, start.events) == (True, [])


@pytest.mark.parametrize("seed", range(10))
def test_a_fresh_start_is_worth_all_batches_before_it(seed, monkeypatch):
    """Random chains stored and removed: an index told everything in small parts, at any time, knows
    what one that heard every batch knows; orphans (their parent is gone) aside, which are no hits."""
    monkeypatch.setattr(kv_journal, "BLOCKS_PER_BATCH", 3)
    rng = random.Random(seed)
    journal, live = KvJournal(), []
    alive: dict[int, int | None] = {}
    for step in range(1, 300):
        if alive and rng.random() < 0.4:
            leaves = [name for name in alive if name not in alive.values()]
            name = rng.choice(leaves)
            del alive[name]
            live.append(journal.append([BlocksRemoved(block_hashes=[name])]))
        else:
            parent = rng.choice([None, *alive])
            names = [step * 10 + i for i in range(rng.randint(1, 9))]
            alive |= dict(zip(names, [parent, *names], strict=False))
            live.append(journal.append([stored(names, parent)]))
    heard = told(live)
    start = journal.fresh_start()
    assert len(start) > 1 and [batch.is_fresh_start for batch in start] == [True] + [False] * (len(start) - 1)
    anew = told(start)
    assert anew.num_blocks == heard.num_blocks == len(alive)
    for name in alive:
        chain = [name]
        while (parent := alive[chain[0]]) is not None:
            chain.insert(0, parent)
        assert hits(anew, chain) == hits(heard, chain) == len(chain)


def test_events_survive_the_wire():
    events = [
        stored([2**64 - 1, 7], parent=3, namespace="salt"),
        BlocksRemoved(block_hashes=[7]),
        AllBlocksCleared(),
    ]
    message = KvEvents(sequence=3, events=events, load=WorkerLoad(), is_fresh_start=True)
    assert codec.worker_messages.decode(codec.encode(message)) == message
