"""vLLM's KV event batches back in order, and its words in ours. Needs the vllm package, no engine."""

import random

import msgspec
import pytest

from baton.contract.messages import AllBlocksCleared, BlocksRemoved, BlocksStored
from baton.contract.tokens import pack_token_ids
from baton.engine.vllm.kv_events import EventOrder, events_of

pytestmark = pytest.mark.filterwarnings("default")


def batch(number):
    return [BlocksRemoved(block_hashes=[number])]


class Heard:
    def __init__(self):
        self.events: list = []
        self.asked: list[int] = []
        self.order = EventOrder(self.events.extend, self.asked.append)

    @property
    def numbers(self):
        return [event.block_hashes[0] for event in self.events if isinstance(event, BlocksRemoved)]


def test_a_lost_batch_is_asked_for_and_what_came_meanwhile_waits():
    heard = Heard()
    for number in (0, 3, 4):
        heard.order.received(number, batch(number))
    assert (heard.numbers, heard.asked) == ([0], [1])
    for number in (1, 2, 3):
        heard.order.replayed(number, batch(number))
    heard.order.replay_ended()
    assert (heard.numbers, heard.order.num_lost, heard.order.is_asking) == ([0, 1, 2, 3, 4], 0, False)


def test_what_vllm_keeps_no_more_clears_everything():
    """Batch 1 is gone for good: its answer begins with 2."""
    heard = Heard()
    for number in (0, 3):
        heard.order.received(number, batch(number))
    for number in (2, 3):
        heard.order.replayed(number, batch(number))
    heard.order.replay_ended()
    assert heard.events == [*batch(0), AllBlocksCleared(), *batch(2), *batch(3)]
    assert (heard.order.num_lost, heard.order.is_asking) == (1, False)


def test_a_batch_lost_behind_the_answer_is_asked_for_again():
    heard = Heard()
    heard.order.received(1, batch(1))
    heard.order.received(3, batch(3))
    heard.order.replayed(0, batch(0))
    heard.order.replay_ended()
    assert (heard.numbers, heard.asked) == ([0, 1], [0, 2])
    for number in (2, 3):
        heard.order.replayed(number, batch(number))
    heard.order.replay_ended()
    assert heard.numbers == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_losses_are_repaired_in_order(seed):
    """A publisher that keeps 30 batches, a socket that loses a tenth, answers that come much later."""
    rng = random.Random(seed)
    heard = Heard()
    published = 0
    answers: list[list[int | None]] = []
    for _ in range(300):
        if heard.asked:
            first = heard.asked.pop()
            answers.append([*range(max(first, published - 30), published), None])
        if answers and rng.random() < 0.5:
            for number in answers.pop(0):
                if number is None:
                    heard.order.replay_ended()
                else:
                    heard.order.replayed(number, batch(number))
        if rng.random() < 0.9:
            heard.order.received(published, batch(published))
        published += 1
    heard.order.ask()
    while heard.asked or answers:
        if heard.asked:
            answers.append([*range(max(heard.asked.pop(), published - 30), published), None])
        for number in answers.pop(0):
            heard.order.replay_ended() if number is None else heard.order.replayed(number, batch(number))
    assert heard.order.num_lost + len(heard.numbers) == published == heard.order.next
    assert heard.numbers == sorted(set(heard.numbers))


def encoded(*events):
    return msgspec.msgpack.encode([1.5, list(events), 0])


def test_vllms_words_become_ours():
    stored = {"type": "BlockStored", "block_hashes": [2**64 - 1, 6], "parent_block_hash": 4, "block_size": 2,
              "token_ids": [1, 2, 3, 4], "lora_id": None, "medium": "GPU", "group_idx": 0}  # fmt: skip
    removed = {"type": "BlockRemoved", "block_hashes": [6], "medium": "GPU", "group_idx": 0}
    assert events_of(encoded(stored, removed, {"type": "AllBlocksCleared"})) == [
        BlocksStored(block_hashes=[2**64 - 1, 6], parent_hash=4, token_ids=pack_token_ids([1, 2, 3, 4])),
        BlocksRemoved(block_hashes=[6]),
        AllBlocksCleared(),
    ]


def test_other_groups_and_blocks_without_their_tokens_are_left_out():
    stored = {"type": "BlockStored", "block_hashes": [5], "parent_block_hash": None, "block_size": 2,
              "token_ids": [1, 2], "group_idx": 1}  # fmt: skip
    masked = stored | {"group_idx": 0, "token_ids": [1, 2, 3, 4]}
    assert (
        events_of(encoded(stored, masked, {"type": "BlockRemoved", "block_hashes": [5], "group_idx": 1}))
        == []
    )


def test_adapters_and_salts_separate_equal_tokens():
    plain = {"type": "BlockStored", "block_hashes": [5], "parent_block_hash": None, "block_size": 2,
             "token_ids": [1, 2]}  # fmt: skip
    salted = plain | {"extra_keys": [["salt"]]}
    adapted = plain | {"lora_name": "a", "extra_keys": [["a"]]}
    namespaces = []
    for word in (plain, salted, adapted):
        (event,) = events_of(encoded(word))
        assert isinstance(event, BlocksStored)
        namespaces.append(event.namespace)
    assert namespaces[0] == "" and len(set(namespaces)) == 3
