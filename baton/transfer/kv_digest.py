"""Is a block that came from another engine what that engine computed for these tokens?

The source signs each block when it is computed: a hash of its bytes over all layers, plus the tag of its
tokens (`digest_orders`). Signatures lie in a table beside the KV, which is registered and transferred as if
it were one more layer, so they travel with their blocks by read or write, whichever moves them, and
need no message. The reader hashes what arrived and compares before the engine may use it.

The hash is linear: the sum of all 64-bit words, each times an odd number of its own, modulo 2^64. Any change
within one word (a flipped bit, for one) changes the sum for certain, a larger one but for chance, about
one in 2^64. What it finds: bytes that changed on the way or after signing, a block of another prompt or of
another place in this one, a block that was written over while it was read (late reads), a write that never
came. What it does not: KV that was computed wrongly, bytes changed between the comparison and their use,
and somebody who wants to deceive (it is no cryptographic signature).

One signature per KV head, where heads lie behind each other in a block: ranks of another
tensor-parallel size then take the signatures of their heads as they take the heads. All in torch, so a GPU
hashes on the device, in order with the kernels that computed the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.transfer.digest_orders import TaggedBlocks

TABLE_LAYER = "~kv-digest"
"""Sorts behind the names of a model's layers, which is the order in which regions are registered."""

WORD_BYTES = 8
CPU_PIECE_BYTES = 2 << 20
"""Hashed at once: fits a core's cache, and is large enough for torch's cost per call not to count."""
CUDA_PIECE_BYTES = 64 << 20
SEED = 20261121


class KvDigest:
    def __init__(self, layers: Sequence[torch.Tensor], table: torch.Tensor) -> None:
        """`layers`: each [blocks, heads, words], 64-bit. `table`: [blocks, heads]."""
        self.table = table
        self._layers = layers
        num_words = layers[0].shape[2]
        generator = torch.Generator().manual_seed(SEED)

        def odd(num_numbers: int) -> torch.Tensor:
            numbers = torch.randint(-(2**62), 2**62, (num_numbers,), generator=generator)
            return (2 * numbers + 1).to(table.device)

        self._word_factors = odd(num_words)
        self._layer_factors = odd(len(layers))
        piece_bytes = CUDA_PIECE_BYTES if table.is_cuda else CPU_PIECE_BYTES
        self._piece = max(1, piece_bytes // (layers[0].shape[1] * num_words * WORD_BYTES))

    def sign(self, blocks: TaggedBlocks) -> None:
        ids, tags = self._tensors(blocks)
        self.table[ids] = self._hash(ids) + tags

    def differing(self, blocks: TaggedBlocks) -> list[int]:
        """Ids of blocks whose bytes are not what was signed for these tokens."""
        ids, tags = self._tensors(blocks)
        differs = (self.table[ids] != self._hash(ids) + tags).any(dim=1)
        wrong: list[int] = ids[differs].tolist()
        return wrong

    def _tensors(self, blocks: TaggedBlocks) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(blocks.block_ids, dtype=torch.int64, device=self.table.device)
        tags = torch.tensor(blocks.tags, dtype=torch.int64, device=self.table.device)
        return ids, tags[:, None]

    def _hash(self, ids: torch.Tensor) -> torch.Tensor:
        """[blocks, heads]"""
        hashes = torch.zeros((len(ids), self.table.shape[1]), dtype=torch.int64, device=self.table.device)
        first = self._layers[0]
        words = torch.empty(
            (min(self._piece, len(ids)), *first.shape[1:]), dtype=torch.int64, device=first.device
        )
        for start in range(0, len(ids), self._piece):
            piece = ids[start : start + self._piece]
            some = words[: len(piece)]
            for layer, factor in zip(self._layers, self._layer_factors, strict=True):
                torch.index_select(layer, 0, piece, out=some)
                hashes[start : start + len(piece)] += some.mul_(self._word_factors).sum(dim=2) * factor
        return hashes


def words_of(cache: torch.Tensor, *, num_blocks: int, block_bytes: int, num_heads: int) -> torch.Tensor:
    """One layer's memory as [blocks, heads, 64-bit words]: exactly the bytes that a transfer moves.

    Raises ValueError: they do not divide so.
    """
    head_bytes, rest = divmod(block_bytes, num_heads)
    stride_bytes = cache.stride(0) * cache.element_size()
    start_bytes = cache.storage_offset() * cache.element_size()
    if rest or any(number % WORD_BYTES for number in (head_bytes, stride_bytes, start_bytes)):
        raise ValueError(
            f"blocks of {block_bytes} bytes, {stride_bytes} apart, are not {num_heads} heads of whole words"
        )
    words = torch.empty(0, dtype=torch.int64, device=cache.device)
    return words.set_(
        cache.untyped_storage(),
        start_bytes // WORD_BYTES,
        (num_blocks, num_heads, head_bytes // WORD_BYTES),
        (stride_bytes // WORD_BYTES, head_bytes // WORD_BYTES, 1),
    )
