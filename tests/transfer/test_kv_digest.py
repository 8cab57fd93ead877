"""Signatures of KV blocks: what was signed is recognised, everything else is not."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from baton.transfer.digest_orders import DigestBook, TaggedBlocks, block_tags  # noqa: E402
from baton.transfer.kv_digest import KvDigest, words_of  # noqa: E402

NUM_BLOCKS, NUM_HEADS, BLOCK, HEAD_BYTES = 12, 2, 4, 256
NUM_LAYERS = 3
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])]
PROMPT = list(range(100, 100 + 3 * BLOCK + 2))  # four blocks, the last one half full
TAGS = block_tags(PROMPT, BLOCK)


class Engine:
    """Memory of one, and its digest."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_BLOCKS, NUM_HEADS, HEAD_BYTES // 4)
        self.caches = [torch.randn(shape, generator=generator).to(device) for _ in range(NUM_LAYERS)]
        layers = [
            words_of(cache, num_blocks=NUM_BLOCKS, block_bytes=NUM_HEADS * HEAD_BYTES, num_heads=NUM_HEADS)
            for cache in self.caches
        ]
        self.digest = KvDigest(layers, torch.zeros((NUM_BLOCKS, NUM_HEADS), dtype=torch.int64, device=device))

    def receive(self, source: Engine, pairs: dict[int, int]) -> None:
        """As a transfer does: these blocks of all layers, and the table's."""
        for here, there in pairs.items():
            for mine, theirs in zip(self.caches, source.caches, strict=True):
                mine[here] = theirs[there]
            self.digest.table[here] = source.digest.table[there]


def transferred(device: str = "cpu") -> tuple[Engine, Engine, TaggedBlocks]:
    """Blocks 3, 1, 7, 2 of one engine signed, and arrived as 9, 10, 4, 5 in the other."""
    source, reader = Engine(device), Engine(device, seed=1)
    source.digest.sign(TaggedBlocks([3, 1, 7, 2], TAGS))
    reader.receive(source, dict(zip([9, 10, 4, 5], [3, 1, 7, 2], strict=True)))
    return source, reader, TaggedBlocks([9, 10, 4, 5], TAGS)


@pytest.mark.parametrize("device", DEVICES)
def test_what_arrived_is_what_was_signed(device: str) -> None:
    _, reader, arrived = transferred(device)
    assert reader.digest.differing(arrived) == []


@pytest.mark.parametrize("device", DEVICES)
def test_any_flipped_bit_is_found(device: str) -> None:
    """A change within one word changes a sum of odd multiples for certain: no bit may be missed."""
    rng = random.Random(1)
    for bit in range(32):
        _, reader, arrived = transferred(device)
        layer, block, head, number = rng.randrange(3), rng.choice([9, 10, 4, 5]), rng.randrange(2), bit
        word = reader.caches[layer].view(torch.int32)
        word[block, head, number] ^= -(2**31) if bit == 31 else 1 << bit
        assert reader.digest.differing(arrived) == [block]


def test_a_block_from_a_wrong_place_is_found_although_its_signature_is_right() -> None:
    """The tag says for which tokens: a neighbour's block came whole, and with its own signature."""
    source, reader, arrived = transferred()
    reader.receive(source, {10: 3})
    assert reader.digest.differing(arrived) == [10]


def test_a_block_of_another_prompt_is_found() -> None:
    """
    1. the source's blocks are freed and computed again for another prompt, which is signed as well
    2. a late read gets them: nothing is broken in them, and they are refused
    """
    source, reader, arrived = transferred()
    source.caches[0][7] += 1.0
    source.digest.sign(TaggedBlocks([7], block_tags([5] * BLOCK, BLOCK)))
    reader.receive(source, {4: 7})
    assert reader.digest.differing(arrived) == [4]


def test_a_write_that_never_came_is_found() -> None:
    _, reader, _ = transferred()
    assert reader.digest.differing(TaggedBlocks([11, 9], [TAGS[3], TAGS[0]])) == [11]


def test_many_blocks_are_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.transfer.kv_digest.CPU_PIECE_BYTES", 3 * NUM_HEADS * HEAD_BYTES)
    small_pieces, one_piece = Engine(), Engine()
    one_piece.digest._piece = NUM_BLOCKS
    everything = TaggedBlocks(list(range(NUM_BLOCKS)), [0] * NUM_BLOCKS)
    small_pieces.digest.sign(everything)
    one_piece.digest.sign(everything)
    assert torch.equal(small_pieces.digest.table, one_piece.digest.table)


def test_heads_are_signed_each_for_itself() -> None:
    """A rank of a larger group holds one of them, and gets its signature alone."""
    source, _, _ = transferred()
    signed = source.digest.table[3].tolist()
    source.caches[1][3, 1, 5] += 1.0
    source.digest.sign(TaggedBlocks([3], TAGS[:1]))
    assert source.digest.table[3, 0] == signed[0]
    assert source.digest.table[3, 1] != signed[1]


def test_memory_that_is_not_whole_words_is_refused() -> None:
    cache = torch.zeros((4, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match="12 bytes, 12 apart, are not 1 heads of whole words"):
        words_of(cache, num_blocks=4, block_bytes=12, num_heads=1)


# ── which blocks, under which tags ──────────────────────────────────────────────────────────


def test_a_tag_names_all_tokens_up_to_its_blocks_end() -> None:
    assert len(TAGS) == len(set(TAGS)) == 4  # 14 tokens in blocks of 4
    assert block_tags(PROMPT[: 2 * BLOCK], BLOCK) == TAGS[:2]
    changed = [7, *PROMPT[1:]]
    assert not set(block_tags(changed, BLOCK)) & set(TAGS)
    assert block_tags(PROMPT[:-1], BLOCK)[-1] != TAGS[-1], "a shorter tail is another block"


def test_a_prompt_is_signed_as_it_is_computed() -> None:
    """
    1. two chunks: full blocks only, each once
    2. the end of the prompt: its last block too, though it is not full
    """
    book = DigestBook(BLOCK)
    book.begin_prompt("r", PROMPT)
    assert book.on_step([("r", [3, 1], False, 7), ("other", [8], False, 4)]).to_sign == [
        TaggedBlocks([3], TAGS[:1])  # 7 tokens: one full block of 4
    ]
    assert book.on_step([("r", [7], False, 12)]).to_sign == [TaggedBlocks([1, 7], TAGS[1:3])]
    assert book.on_step([("r", [2], False, 14)]).to_sign == [TaggedBlocks([2], TAGS[3:])]
    assert book.on_step([("r", None, False, 15)]).to_sign == []


def test_a_resumed_prompt_is_signed_in_its_new_blocks() -> None:
    book = DigestBook(BLOCK)
    book.begin_prompt("r", PROMPT)
    book.on_step([("r", [3, 1], False, 8)])
    assert book.on_step([("r", [5, 6, 7], True, 12)]).to_sign == [TaggedBlocks([5, 6, 7], TAGS[:3])]


def test_a_reader_compares_the_blocks_it_did_not_have() -> None:
    book = DigestBook(BLOCK)
    book.expect("r", [9, 4], PROMPT)
    book.expect("has-all", [], PROMPT)
    assert book.on_step([]).to_compare == {"r": TaggedBlocks([9, 4], TAGS[2:])}
    assert book.on_step([]).to_compare == {}
