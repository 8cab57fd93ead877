"""Who holds which prefix: one structure for all workers, fed by the engines' KV events.

Every block some worker holds is a node: its chained hash (`prefix_hash`), the hash the engine
gave it, its children, and the set of its holders as bits of one integer. Engine hashes cannot be
recomputed at routing speed, so ours are computed from the tokens in the events, and removals,
which carry only engine hashes, find their node through a map.

**Holders shrink along a chain**, by construction: a worker counts as a holder of a block only
while it holds all blocks before it, as a hit must start at block 0. If an engine drops a block but
keeps a later one, the later one is set aside (`_detached`) and comes back when the gap is filled.
So a match need not walk: it probes depths 1, 64, 512, ... and bisects wherever the set of holders
changed. A prompt of 3,750 blocks that three workers hold to different lengths takes some forty
look-ups for the whole fleet, and a miss takes one.

**Copies.** vLLM does not merge equal blocks: it announces each physical copy when stored and each
when removed, so copies are counted and the last removal counts. (Its report mode "full" announces
reused blocks as well and would spoil the count; Baton's workers use "incremental".)

**Bounded.** Beyond `max_bytes` whole chains go, the least recently matched or extended first, from
their ends; what is forgotten is only a hit we no longer predict, and it is counted. `clear` gives a
worker fresh bits at once and wipes the old ones from the nodes bit by bit with later events, since
touching millions of nodes at once would stall the coordinator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from baton.contract.tokens import num_token_ids
from baton.policy.ledger import Vector
from baton.policy.prefix_hash import PrefixHasher, PromptHashes

BYTES_PER_BLOCK = 270
"""One held block with everything that points to it: 191 to 258 measured, as dictionaries grow in leaps
(tests/policy/test_kv_index_memory.py). Sets of holders are shared along a chain and add little."""

_FEW_WORKERS = 12
"""Up to here taking bits out one by one beats unpacking the set."""
_FEW_SETS, _CELLS_PER_WORKER = 8, 128
"""More sets than this are unpacked all at once, unless the table of bits would be nearly empty."""
_FEW_BLOCKS = 8
"""Spans up to here are walked: bisecting them costs as much when one holder drops out in them, and
far more when many do."""
_SWEPT_PER_BLOCK = 4


class _Node(msgspec.Struct, gc=False):
    """Kept out of the garbage collector: millions of them would make its passes long. Links go from
    parent to child only (`parent` is a value, not a reference), so there are no cycles."""

    value: int
    engine_hash: int
    parent: int | None
    depth: int
    bits: int
    children: _Node | dict[int, _Node] | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """Holders of a prompt's prefixes: (bits, depth), each worker once, at its longest prefix."""

    held: tuple[tuple[int, int], ...]

    @property
    def num_blocks(self) -> int:
        """Of the best worker."""
        return max((depth for _, depth in self.held), default=0)


NO_MATCH = Match(())


@dataclass(slots=True)
class IndexCounters:
    num_stored: int = 0
    num_removed: int = 0
    num_evicted: int = 0
    """Blocks forgotten for the byte cap."""
    num_unknown_parents: int = 0
    """Blocks whose parent is not indexed (evicted here, or its event was lost): not indexed either."""
    num_unknown_removals: int = 0
    num_cleared: int = 0


class KvIndex:
    def __init__(
        self, block_size_tokens: int, *, seed: int | None = None, max_bytes: int = 2 * 1024**3
    ) -> None:
        """`seed` only for tests and replays; see `PrefixHasher`."""
        self.hasher = PrefixHasher(block_size_tokens, seed)
        self.counters = IndexCounters()
        self._max_blocks = max(1, max_bytes // BYTES_PER_BLOCK)
        self._nodes: dict[int, _Node] = {}
        self._by_engine_hash: dict[int, _Node] = {}
        self._aliases: dict[int, list[int]] = {}
        """Further engine hashes of a node: engines started with different hash seeds."""
        self._own_names: dict[tuple[int, int], _Node] = {}
        """(bit, engine hash) → node where a worker's hash names another prefix than other workers'."""
        self._copies: dict[tuple[int, int], int] = {}
        """(bit, value) → copies beyond the first."""
        self._detached: dict[int, int] = {}
        """Value → bits of workers that hold the block but not all before it."""
        self._leaves: OrderedDict[int, _Node] = OrderedDict()
        """Ends of chains, least recently used first."""
        self._bit_of_slot: dict[int, int] = {}
        self._slot_of_bit: Vector = np.zeros(0, dtype=np.int64)
        self._free_bits: list[int] = []
        self._live = 0
        """Bits of the workers known now."""
        self._retired = 0
        """Bits to be wiped from the nodes before they are given out again."""
        self._sweep: list[_Node] = []
        self._sweep_bits = 0

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    @property
    def num_blocks(self) -> int:
        return len(self._nodes)

    @property
    def num_bytes(self) -> int:
        """Estimated from the number of blocks."""
        return len(self._nodes) * BYTES_PER_BLOCK

    def prompt(self, packed: bytes, namespace: str = "") -> PromptHashes:
        return PromptHashes(self.hasher, packed, namespace)

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    def open(self, slot: int) -> None:
        """A worker, by its slot in the ledger. It holds nothing yet."""
        assert slot not in self._bit_of_slot, slot
        self._assign_bit(slot)

    def is_open(self, slot: int) -> bool:
        return slot in self._bit_of_slot

    def close(self, slot: int) -> None:
        bit = self._bit_of_slot.pop(slot, None)
        if bit is not None:
            self._retire(bit)

    def clear(self, slot: int) -> None:
        """The worker holds nothing any more: it restarted, reset its cache, or lost its events."""
        self.counters.num_cleared += 1
        bit = self._bit_of_slot[slot]
        self._assign_bit(slot)
        self._retire(bit)

    def _assign_bit(self, slot: int) -> None:
        if self._free_bits:
            number = self._free_bits.pop()
        else:
            number = len(self._slot_of_bit)
            self._slot_of_bit = np.append(self._slot_of_bit, 0)
        self._slot_of_bit[number] = slot
        self._bit_of_slot[slot] = 1 << number
        self._live |= 1 << number

    def _retire(self, bit: int) -> None:
        self._live &= ~bit
        self._retired |= bit
        for key in [key for key in self._copies if key[0] == bit]:
            del self._copies[key]
        for key in [key for key in self._own_names if key[0] == bit]:
            del self._own_names[key]
        for value in [value for value, bits in self._detached.items() if bits & bit]:
            self._drop_detached(value, bit)

    # ── events ───────────────────────────────────────────────────────────────────────────────

    def stored(
        self, slot: int, block_hashes: list[int], parent_hash: int | None, packed: bytes, namespace: str = ""
    ) -> None:
        """Consecutive full blocks after `parent_hash` (None: from the start of the prompt).
        `packed` holds their tokens. Raises ValueError, changing nothing, if the sizes disagree."""
        if num_token_ids(packed) != len(block_hashes) * self.hasher.block_size_tokens:
            raise ValueError(
                f"{len(block_hashes)} blocks of {self.hasher.block_size_tokens} tokens were stored "
                f"with {num_token_ids(packed)} tokens"
            )
        if not block_hashes:
            return
        bit = self._bit_of_slot[slot]
        parent: _Node | None = None
        if parent_hash is None:
            value, depth = self.hasher.root(namespace), 0
        else:
            parent = self._find(bit, parent_hash)
            if parent is None:
                self.counters.num_unknown_parents += len(block_hashes)
                return
            value, depth = parent.value, parent.depth
        values = self.hasher.chain(value, depth, packed, len(block_hashes))
        self.counters.num_stored += len(values)
        nodes, by_engine_hash = self._nodes, self._by_engine_hash
        is_attached = parent is None or bool(parent.bits & bit)
        bits_before, bits_after = 0, bit
        node = parent
        for engine_hash, value in zip(block_hashes, values, strict=True):
            parent, node = node, nodes.get(value)
            depth += 1
            if node is None:
                node = self._add(value, engine_hash, parent, depth)
                if by_engine_hash.setdefault(engine_hash, node) is not node:
                    self._own_names[bit, engine_hash] = node
            elif by_engine_hash.get(engine_hash) is not node:
                self._add_name(node, engine_hash, bit)
            if node.bits & bit or (self._detached and self._detached.get(value, 0) & bit):
                self._copies[bit, value] = self._copies.get((bit, value), 0) + 1
            elif is_attached:
                if node.bits != bits_before:
                    bits_before, bits_after = node.bits, node.bits | bit
                node.bits = bits_after  # one integer object for the whole run
                if self._detached and node.children is not None:
                    self._attach_children(node, bit)
            else:
                self._detached[value] = self._detached.get(value, 0) | bit
            is_attached = bool(node.bits & bit)
        assert node is not None
        if node.children is None:
            self._leaves[node.value] = node
            self._leaves.move_to_end(node.value)
        while len(nodes) > self._max_blocks:
            self._evict()
        if self._retired or self._sweep:
            self.sweep(_SWEPT_PER_BLOCK * len(values) + 16)

    def removed(self, slot: int, block_hashes: Iterable[int]) -> None:
        """One copy of each block is gone from the worker."""
        bit = self._bit_of_slot[slot]
        for engine_hash in block_hashes:
            node = self._find(bit, engine_hash)
            if node is None or not (node.bits | self._detached.get(node.value, 0)) & bit:
                self.counters.num_unknown_removals += 1
                continue
            self.counters.num_removed += 1
            value = node.value
            num_copies = self._copies.get((bit, value), 0) if self._copies else 0
            if num_copies:
                if num_copies == 1:
                    del self._copies[bit, value]
                else:
                    self._copies[bit, value] = num_copies - 1
                continue
            if self._own_names:
                self._own_names.pop((bit, engine_hash), None)
            if node.bits & bit:
                node.bits ^= bit
                if node.children is not None:
                    self._detach_children(node, bit)
                if not node.bits:
                    self._drop_if_unused(node)
            else:
                self._drop_detached(value, bit)

    # ── matching ─────────────────────────────────────────────────────────────────────────────

    def match(self, prompt: PromptHashes) -> Match:
        """The longest prefix of every worker that holds at least one block of the prompt."""
        get, value, live = self._nodes.get, prompt.value, self._live
        total = prompt.num_blocks
        if not total:
            return NO_MATCH
        deepest = get(value(1))
        if deepest is None or not deepest.bits & live:
            return NO_MATCH
        held: list[tuple[int, int]] = []
        low, low_bits = 1, deepest.bits & live
        while low < total:
            high = min(total, max(64, 8 * low))
            node = get(value(high))
            high_bits = node.bits & live if node is not None else 0
            if node is not None and high_bits:
                deepest = node
            spans = [(low, low_bits, high, high_bits)]
            while spans:
                left, left_bits, right, right_bits = spans.pop()
                if left_bits == right_bits:
                    continue
                if right - left <= _FEW_BLOCKS:
                    for found in prompt.between(left, right):
                        node = get(found)
                        bits = node.bits & live if node is not None else 0
                        if bits != left_bits:
                            held.append((left_bits ^ bits, left))
                            left_bits = bits
                        left += 1
                        if node is not None and bits and left > deepest.depth:
                            deepest = node
                    if left_bits != right_bits:
                        held.append((left_bits ^ right_bits, left))
                    continue
                middle = (left + right) >> 1
                node = get(value(middle))
                bits = node.bits & live if node is not None else 0
                if node is not None and bits and middle > deepest.depth:
                    deepest = node
                spans.append((left, left_bits, middle, bits))
                spans.append((middle, bits, right, right_bits))
            low, low_bits = high, high_bits
            if not high_bits:
                break
        if low_bits:
            held.append((low_bits, low))
        if deepest.children is None:
            self._leaves.move_to_end(deepest.value)
        return Match(tuple(held))

    def blocks_by_slot(self, match: Match, num_slots: int) -> Vector:
        """The match as a column beside the ledger's."""
        blocks: Vector = np.zeros(num_slots, dtype=np.int64)
        held = match.held
        if not held:
            return blocks
        slots = self._slot_of_bit
        num_bytes = max((len(slots) + 7) // 8, 1)
        num_workers = sum(bits.bit_count() for bits, _ in held)
        if len(held) > _FEW_SETS and len(held) * num_bytes * 8 <= _CELLS_PER_WORKER * num_workers:
            raw = b"".join(bits.to_bytes(num_bytes, "little") for bits, _ in held)
            cells = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little").nonzero()[0]
            rows, numbers = np.divmod(cells, num_bytes * 8)
            blocks[slots[numbers]] = np.array([depth for _, depth in held])[rows]
            return blocks
        one_by_one: list[int] = []
        depths: list[int] = []
        for bits, depth in held:
            if bits.bit_count() > _FEW_WORKERS:
                blocks[slots[_numbers(bits)]] = depth
                continue
            while bits:
                number = bits.bit_length() - 1
                one_by_one.append(number)
                depths.append(depth)
                bits ^= 1 << number
        if one_by_one:
            blocks[slots[one_by_one]] = depths
        return blocks

    # ── nodes ────────────────────────────────────────────────────────────────────────────────

    def _find(self, bit: int, engine_hash: int) -> _Node | None:
        if self._own_names:
            own = self._own_names.get((bit, engine_hash))
            if own is not None:
                return own
        return self._by_engine_hash.get(engine_hash)

    def _add(self, value: int, engine_hash: int, parent: _Node | None, depth: int) -> _Node:
        node = _Node(value, engine_hash, None if parent is None else parent.value, depth, 0)
        self._nodes[value] = node
        if parent is not None:
            children = parent.children
            if children is None:
                parent.children = node
                self._leaves.pop(parent.value, None)
            elif isinstance(children, dict):
                children[value] = node
            else:
                parent.children = {children.value: children, value: node}
        return node

    def _add_name(self, node: _Node, engine_hash: int, bit: int) -> None:
        known = self._find(bit, engine_hash)
        if known is node:
            return
        if known is not None:
            self._own_names[bit, engine_hash] = node
        else:
            self._by_engine_hash[engine_hash] = node
            self._aliases.setdefault(node.value, []).append(engine_hash)

    def _drop_if_unused(self, node: _Node) -> None:
        """Also its ancestors, as far as only this chain kept them."""
        while not node.bits and node.children is None and node.value not in self._detached:
            if self._nodes.get(node.value) is not node:
                return
            parent = self._unlink(node)
            if parent is None:
                return
            node = parent
        if node.children is None:
            self._leaves.setdefault(node.value, node)

    def _unlink(self, node: _Node) -> _Node | None:
        """Removes a childless node; its parent becomes the next to go if that was its only child."""
        del self._nodes[node.value]
        self._leaves.pop(node.value, None)
        names = [node.engine_hash]
        if self._aliases:
            names += self._aliases.pop(node.value, ())
        for name in names:
            if self._by_engine_hash.get(name) is node:
                del self._by_engine_hash[name]
        parent = None if node.parent is None else self._nodes[node.parent]
        if parent is None:
            return None
        if isinstance(parent.children, dict):
            del parent.children[node.value]
            if not parent.children:
                parent.children = None
        else:
            parent.children = None
        if parent.children is None:
            self._leaves[parent.value] = parent
            self._leaves.move_to_end(parent.value, last=False)
        return parent

    def _evict(self) -> None:
        _, node = self._leaves.popitem(last=False)
        value = node.value
        self.counters.num_evicted += 1
        holders = node.bits | self._detached.pop(value, 0)
        if self._copies or self._own_names:
            while holders:
                bit = holders & -holders
                holders ^= bit
                self._copies.pop((bit, value), None)
            for key in [key for key, own in self._own_names.items() if own is node]:
                del self._own_names[key]
        node.bits = 0
        self._unlink(node)

    # ── workers that hold a block but not all before it ──────────────────────────────────────

    def _detach_children(self, node: _Node, bit: int) -> None:
        pending = [node]
        while pending:
            for child in _children(pending.pop()):
                if child.bits & bit:
                    child.bits ^= bit
                    self._detached[child.value] = self._detached.get(child.value, 0) | bit
                    pending.append(child)

    def _attach_children(self, node: _Node, bit: int) -> None:
        pending = [node]
        while pending:
            for child in _children(pending.pop()):
                bits = self._detached.get(child.value, 0)
                if bits & bit:
                    child.bits |= bit
                    if bits == bit:
                        del self._detached[child.value]
                    else:
                        self._detached[child.value] = bits ^ bit
                    pending.append(child)

    def _drop_detached(self, value: int, bit: int) -> None:
        bits = self._detached[value] & ~bit
        if bits:
            self._detached[value] = bits
        else:
            del self._detached[value]
            self._drop_if_unused(self._nodes[value])

    # ── bits of workers that are gone ────────────────────────────────────────────────────────

    def sweep(self, num_blocks: int) -> bool:
        """Wipe retired bits from up to so many blocks. True: nothing is left to wipe."""
        if not self._sweep:
            if not self._retired:
                return True
            self._sweep, self._sweep_bits = list(self._nodes.values()), self._retired
            self._retired = 0
        keep = ~self._sweep_bits
        for _ in range(min(num_blocks, len(self._sweep))):
            node = self._sweep.pop()
            if node.bits & self._sweep_bits:
                node.bits &= keep
                if not node.bits:
                    self._drop_if_unused(node)
        if not self._sweep:
            self._free_bits += _numbers(self._sweep_bits).tolist()
            self._sweep_bits = 0
        return not self._sweep and not self._retired


def _children(node: _Node) -> list[_Node]:
    children = node.children
    if children is None:
        return []
    return list(children.values()) if isinstance(children, dict) else [children]


def _numbers(bits: int) -> npt.NDArray[np.intp]:
    """Positions of the set bits."""
    raw = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little").nonzero()[0]
