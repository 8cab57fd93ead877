"""The simulated worker, block by block and step by step: slow, obvious, and its oracle.

Prompts are tuples of block contents; a partly filled block has none. Every block is an entry in one
queue of unused blocks, as in vLLM.
"""

from __future__ import annotations

from baton.step_time import StepTime, StepWork, prefill_pairs


class NaiveBlock:
    def __init__(self):
        self.name = None
        self.users = 0


class NaiveLeg:
    def __init__(self, leg_id, names, num_prompt, num_output, *, keep=None):
        self.leg_id, self.names, self.num_prompt, self.num_output, self.keep = (
            leg_id, names, num_prompt, num_output, keep,
        )  # fmt: skip
        self.done = 0
        self.kv = 0
        self.blocks: list[NaiveBlock] = []
        self.num_named = 0
        self.is_decoding = False
        self.cached = None


class NaiveWorker:
    def __init__(self, num_blocks: int, block: int, max_batch: int, budget: int, step_time: StepTime):
        self.block, self.max_batch, self.budget, self.step_time = block, max_batch, budget, step_time
        self.queue = [NaiveBlock() for _ in range(num_blocks)]
        self.by_name: dict[int, NaiveBlock] = {}
        self.waiting: list[NaiveLeg] = []
        self.running: list[NaiveLeg] = []
        self.now_s = 0.0
        self.log: list[tuple] = []

    def add(self, leg):
        self.waiting.append(leg)

    def _take(self):
        block = self.queue.pop(0)
        if block.name is not None:
            if self.by_name.get(block.name) is block:
                del self.by_name[block.name]
            block.name = None
        block.users = 1
        return block

    def _leave(self, leg):
        for block in reversed(leg.blocks):
            block.users -= 1
            if not block.users:
                self.queue.append(block)
        leg.blocks = []
        leg.kv = 0
        leg.is_decoding = False

    def _admit(self, budget, chunks):
        while self.waiting and budget and len(self.running) < self.max_batch:
            leg = self.waiting[0]
            hits = []
            for name in leg.names[: (leg.num_prompt - 1) // self.block]:
                if name not in self.by_name:
                    break
                hits.append(self.by_name[name])
            total = -(-(leg.num_prompt + leg.done) // self.block)
            if total - len(hits) > len(self.queue) - sum(1 for b in hits if not b.users):
                return
            for block in hits:
                if not block.users:
                    self.queue.remove(block)
                block.users += 1
            leg.blocks = hits + [self._take() for _ in range(total - len(hits))]
            leg.kv = len(hits) * self.block
            leg.num_named = len(hits)
            if leg.cached is None:
                leg.cached = leg.kv
            self.waiting.pop(0)
            self.running.append(leg)
            budget -= self._chunk(leg, budget, chunks)

    def _chunk(self, leg, budget, chunks):
        chunk = min(budget, leg.num_prompt + leg.done - leg.kv)
        chunks.append((leg, chunk))
        while leg.num_named < len(leg.names) and (leg.num_named + 1) * self.block <= leg.kv + chunk:
            block, name = leg.blocks[leg.num_named], leg.names[leg.num_named]
            if name in self.by_name:
                self.by_name[name].name = None  # the newer copy answers
            block.name = name
            self.by_name[name] = block
            leg.num_named += 1
        return chunk

    def step(self):
        budget, is_short = self.budget, False
        decodes: list[NaiveLeg] = []
        chunks: list[tuple[NaiveLeg, int]] = []
        for leg in list(self.running):
            if leg not in self.running or not budget:
                break
            if not leg.is_decoding:
                budget -= self._chunk(leg, budget, chunks)
                continue
            while leg.kv + 1 > len(leg.blocks) * self.block and not self.queue:
                is_short = True
                victim = self.running.pop()
                self._leave(victim)
                self.waiting.insert(0, victim)
                if victim is leg:
                    break
            if leg not in self.running:
                break
            if leg.kv + 1 > len(leg.blocks) * self.block:
                leg.blocks.append(self._take())
            budget -= 1
            decodes.append(leg)
        if not is_short:
            self._admit(budget, chunks)
        if not decodes and not chunks:
            return False
        self.now_s += self.step_time.step_s(
            StepWork(
                sum(chunk for _, chunk in chunks),
                sum([prefill_pairs(chunk, leg.kv) for leg, chunk in chunks]),
                len(decodes),
                sum(leg.kv + 1 for leg in decodes),
            )
        )
        finished = []
        for leg in decodes:
            leg.kv += 1
            leg.done += 1
            if leg.done == leg.num_output:
                finished.append(leg)
        for leg, chunk in chunks:
            leg.kv += chunk
            if leg.kv == leg.num_prompt + leg.done:
                leg.is_decoding = True
                leg.done += 1
                if leg.done == leg.num_output:
                    finished.append(leg)
        for leg in finished:
            self._end(leg)
        return True

    def _end(self, leg):
        self.running.remove(leg)
        self._leave(leg)
        self.log.append((leg.leg_id, leg.cached, round(self.now_s, 9)))
