"""A worker's KV blocks, as vLLM keeps them: one queue of blocks nobody uses, least recently used first.

A block stays what it is while it waits in the queue, so a later prompt with the same beginning
finds it; whoever needs blocks takes them from the front, and what was in them is forgotten. A
finished request puts its blocks back last block first, so that the end of a prompt goes before its
beginning, and a held block always has all blocks before it.

Blocks are kept as *runs*: those of one hash, or those of one request that no hash names (generated
tokens, the last, partly filled block). Taking from the front takes a run's last block first, so runs
lose exactly the blocks in exactly the order that single blocks would; but a prompt of 100,000
tokens costs some 200 steps instead of 6,000.

Equal blocks computed twice at the same time exist twice; the newer copy answers for the hash, the
older one is nameless from then on (it would have been the first to go).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Run:
    """Blocks that come and go together. In the queue exactly while `num_users` is 0."""

    __slots__ = ("is_announced", "name", "num_blocks", "num_users")

    def __init__(self, name: int | None, num_blocks: int, num_users: int = 0) -> None:
        self.name = name
        """The hash it answers for; None: of no use to anybody else."""
        self.num_blocks = num_blocks
        self.num_users = num_users
        self.is_announced = False


class PrefixCache:
    def __init__(self, num_blocks: int, blocks_per_hash: int = 1) -> None:
        self.num_blocks = num_blocks
        self._blocks_per_hash = blocks_per_hash
        self._by_name: dict[int, Run] = {}
        self._queue: OrderedDict[Run, None] = OrderedDict({Run(None, num_blocks): None})
        self.num_free_blocks = num_blocks
        """In the queue, whatever they hold."""
        self.forgotten: list[int] = []
        """Announced hashes that are gone; whoever announces takes them from here."""

    def __len__(self) -> int:
        """Named runs."""
        return len(self._by_name)

    def match(self, hashes: Sequence[int], max_blocks: int) -> list[Run]:
        """Runs that hold the beginning of a prompt, in order; only the last one may be incomplete.
        `max_blocks` cuts the search, not the runs: see `num_hit_blocks`."""
        found: list[Run] = []
        get, full = self._by_name.get, self._blocks_per_hash
        left = max_blocks
        for name in hashes:
            if left <= 0:
                break
            run = get(name)
            if run is None:
                break
            found.append(run)
            left -= full
            if run.num_blocks < full:
                break
        return found

    def num_hit_blocks(self, runs: Sequence[Run], max_blocks: int) -> int:
        if not runs:
            return 0
        return min(max_blocks, (len(runs) - 1) * self._blocks_per_hash + runs[-1].num_blocks)

    def num_idle_blocks(self, runs: Sequence[Run]) -> int:
        """Of these, blocks in the queue: using the runs leaves so many fewer for others."""
        return sum([run.num_blocks for run in runs if not run.num_users])

    def use(self, runs: Sequence[Run]) -> None:
        queue = self._queue
        for run in runs:
            if not run.num_users:
                del queue[run]
                self.num_free_blocks -= run.num_blocks
            run.num_users += 1

    def take(self, num_blocks: int) -> bool:
        """Blocks from the front of the queue, for the caller to account for. False: there are not so
        many, and nothing changed."""
        if num_blocks > self.num_free_blocks:
            return False
        self.num_free_blocks -= num_blocks
        queue = self._queue
        while num_blocks:
            run = next(iter(queue))
            if run.is_announced:
                # With its last block the hash can no longer be had in full.
                assert run.name is not None
                self.forgotten.append(run.name)
                run.is_announced = False
            if run.num_blocks > num_blocks:
                run.num_blocks -= num_blocks
                break
            num_blocks -= run.num_blocks
            run.num_blocks = 0
            del queue[run]
            if run.name is not None:
                del self._by_name[run.name]
        return True

    def name(self, name: int, num_blocks: int) -> Run | None:
        """Taken blocks now hold this hash, and have one user. An older copy loses the name, unless it
        is longer: then None, and the blocks stay nameless."""
        older = self._by_name.get(name)
        if older is not None and older.num_blocks > num_blocks:
            return None
        run = Run(name, num_blocks, 1)
        if older is not None:
            older.name = None
            run.is_announced, older.is_announced = older.is_announced, False
        self._by_name[name] = run
        return run

    def leave(self, runs: Sequence[Run], num_nameless_blocks: int = 0) -> None:
        """A user of these runs, in the order of its prompt, is gone; so many more blocks after them
        were its alone."""
        queue = self._queue
        if num_nameless_blocks:
            queue[Run(None, num_nameless_blocks)] = None
            self.num_free_blocks += num_nameless_blocks
        for run in reversed(runs):
            run.num_users -= 1
            if not run.num_users:
                queue[run] = None
                self.num_free_blocks += run.num_blocks

    @property
    def runs_in_queue(self) -> list[Run]:
        """Next to go first."""
        return list(self._queue)
