"""How much of the KV transfer is exposed: stock pull beside our own writes, in one pair of engines.

One prefill and one decode engine with one connector that takes the way of each request from its
parameters, so the modes alternate on the same processes and the same memory:

    pull    vLLM's own: the decode engine reads when the prefill is over
    end     we write, all of it after the last chunk; the decode engine has reserved its blocks before
    chunk   we write each chunk when it is computed
    layer   we write each layer of each chunk when it is computed

`exposed` is the time from the end of the prompt's last forward pass to the report of the decode engine
that all KV is there (streamed: and the first token, which comes with it); both are stamped in the engines
(`stamped_connector.py`), the same way in all modes. In all modes the prefill engine gives the first
token, and the decode engine's first token of its own is the second of the answer.

`bandwidth` compares writes of one chunk's size: streamed ones, and those of a process that does nothing but
NIXL WRITE with the same descriptors between pools like the engines', on the idle machine and while the same
engine computes a prompt.
The model is random and made for weight: 64 KiB of KV per token, 8 layers, float32.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from baton.contract.errors import ErrorReport
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvEvent, KvSource, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.demo_model import build_demo_model
from baton.engine.base import FinishedPrefill
from baton.engine.vllm.engine import VllmEngine
from baton.engine.vllm.settings import VllmEngineSettings, engine_arguments, transfer_arguments
from benchmarks.cpu_time import quiet_check
from benchmarks.figures import Bar, Figure, Report
from benchmarks.samples import paired_ratios, spread

MODES = ("pull", "end", "chunk", "layer")
CHUNK_TOKENS = 512
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 8, 8, 128
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
BLOCK_TOKENS = 32
KV_POOL_BYTES = 1280 << 20
MAIN_TOKENS = 4096
NUM_OUTPUT_TOKENS = 4
CONCURRENCY = 4
VOCABULARY = 2000
NUM_BARE_WRITES = 8
BARE_WRITE_EVERY_S = 0.4


@dataclass(frozen=True, slots=True)
class Plan:
    repeats: int
    lengths: tuple[int, ...]
    """Besides the main one, for flatness; chunk-wise only."""
    concurrent_tokens: int
    concurrent_repeats: int


FULL = Plan(repeats=4, lengths=(2048, 8192), concurrent_tokens=2048, concurrent_repeats=3)
QUICK = Plan(repeats=1, lengths=(2048,), concurrent_tokens=1024, concurrent_repeats=1)


@dataclass(slots=True)
class Timing:
    """One hand-off, seconds of the machine's monotonic clock."""

    submitted_s: float
    prefilled_s: float = 0.0
    """The client has the first token."""
    token_s: list[float] = field(default_factory=list)
    """The tokens that the decode engine computed, at the client."""
    forward_s: float = 0.0
    arrived_s: float = 0.0

    @property
    def prefill_s(self) -> float:
        return self.forward_s - self.submitted_s

    @property
    def exposed_s(self) -> float:
        return self.arrived_s - self.forward_s

    @property
    def first_token_s(self) -> float:
        """From the end of the forward pass, at the client."""
        return self.prefilled_s - self.forward_s

    @property
    def decode_step_s(self) -> float:
        """From the report that all KV is there to the decode engine's own first token, at the client."""
        return self.token_s[0] - self.arrived_s

    @property
    def second_token_s(self) -> float:
        return self.token_s[0] - self.forward_s


class BenchEngine(VllmEngine):
    """With the stamped connector and weights that need no file."""

    stamp_file: Path

    def _construct_blocking(self) -> Any:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        transfer = transfer_arguments(self._settings)
        transfer["kv_connector"] = "StampedConnector"
        transfer["kv_connector_module_path"] = "benchmarks.stamped_connector"
        transfer["kv_connector_extra_config"]["stamp_file"] = str(self.stamp_file)
        arguments = AsyncEngineArgs(
            **engine_arguments(self._settings),
            load_format="dummy",
            kv_transfer_config=KVTransferConfig(**transfer),
        )
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[self._gauge.logger_factory()])


class Legs:
    """Resolves one future per leg and notes when tokens came."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[Any]] = {}
        self.token_s: dict[str, list[float]] = defaultdict(list)

    def expect(self, handoff_id: str) -> asyncio.Future[Any]:
        self._futures[handoff_id] = asyncio.get_running_loop().create_future()
        return self._futures[handoff_id]

    def on_step(self, deltas: list[SequenceDelta]) -> None:
        now_s = time.monotonic()
        for delta in deltas:
            self.token_s[delta.handoff_id] += [now_s] * len(delta.token_ids)
            if delta.finish_reason is not None:
                self._futures.pop(delta.handoff_id).set_result(delta)

    def on_kv_events(self, events: list[KvEvent]) -> None:
        return

    def on_prefill_finished(self, finished: FinishedPrefill) -> None:
        self._futures.pop(finished.delta.handoff_id).set_result(finished)

    def on_leg_failed(self, handoff_id: str, error: ErrorReport) -> None:
        self._futures.pop(handoff_id).set_result(error)

    def on_engine_dead(self, reason: str) -> None:
        raise SystemExit(reason)


class HandoffPair:
    """Two engines and one hand-off at a time, or several."""

    def __init__(self, folder: Path) -> None:
        self._stamps = {
            role: folder / f"{role.value}.jsonl" for role in (WorkerRole.PREFILL, WorkerRole.DECODE)
        }
        settings: dict[str, Any] = {
            "model": str(build_heavy_model(folder / "model")),
            "max_model_len": 8192 + 64,
            "max_num_batched_tokens": CHUNK_TOKENS,
            "kv_cache_bytes": KV_POOL_BYTES,
            "transfer": "stream",
            "kv_load_failure_policy": "fail",
            "is_prefix_caching_enabled": False,
        }
        self.prefill_legs, self.decode_legs = Legs(), Legs()
        self.prefill = BenchEngine(VllmEngineSettings(role=WorkerRole.PREFILL, **settings))
        self.decode = BenchEngine(VllmEngineSettings(role=WorkerRole.DECODE, **settings))
        self.prefill.stamp_file, self.decode.stamp_file = self._stamps.values()
        self._rng = random.Random(1)
        self._num_handoffs = 0
        self._source: dict[str, Any] = {}

    async def start(self) -> None:
        description = await self.prefill.start(self.prefill_legs)
        await self.decode.start(self.decode_legs)
        host, _, port = description.transfer_endpoint.partition(":")
        self._source = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.prefill._llm.vllm_config.kv_transfer_config.engine_id,
            "remote_host": host,
            "remote_port": int(port),
            "tp_size": 1,
        }

    async def stop(self) -> None:
        await self.prefill.stop()
        await self.decode.stop()

    async def hand_off(self, mode: str, num_tokens: int) -> Timing:
        self._num_handoffs += 1
        handoff_id = f"{mode}{self._num_handoffs}"
        prompt = [self._rng.randrange(VOCABULARY) for _ in range(num_tokens)]
        timing = Timing(submitted_s=time.monotonic())
        decoding = None
        if mode != "pull":
            decoding = self._begin_decode(handoff_id, prompt, self._stream_source(handoff_id, num_tokens), 1)
        finished = await self._begin_prefill(handoff_id, prompt, mode)
        if not isinstance(finished, FinishedPrefill):
            raise SystemExit(f"{handoff_id}: prefill failed: {finished}")
        timing.prefilled_s = time.monotonic()
        if decoding is None:
            whole = [*prompt, *finished.delta.token_ids]
            decoding = self._begin_decode(handoff_id, whole, finished.kv_source, 0)
        result = await decoding
        if not isinstance(result, SequenceDelta):
            raise SystemExit(f"{handoff_id}: decode failed: {result}")
        token_s = self.decode_legs.token_s.pop(handoff_id)
        timing.token_s = token_s if mode == "pull" else token_s[1:]  # the prefill engine's is told again
        self._read_stamps(handoff_id, timing)
        return timing

    async def prefill_alone(self, num_tokens: int) -> None:
        """Nobody takes its KV."""
        self._num_handoffs += 1
        prompt = [self._rng.randrange(VOCABULARY) for _ in range(num_tokens)]
        handoff_id = f"alone{self._num_handoffs}"
        await self._begin_prefill(handoff_id, prompt, "pull")
        self.prefill.abort(handoff_id)

    def _begin_prefill(self, handoff_id: str, prompt: list[int], mode: str) -> asyncio.Future[Any]:
        future = self.prefill_legs.expect(handoff_id)
        message = StartPrefill(
            handoff_id=handoff_id,
            request_id=handoff_id,
            prompt_token_ids=pack_token_ids(prompt),
            sampling=_sampling(1),
            keep_kv=True,
        )
        hold: dict[str, Any] = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "baton_hold_unless_stopped": True,
        }
        if mode != "pull":
            hold |= {"baton_stream_id": handoff_id, "baton_stream_writes": mode}
        self.prefill._start_leg(
            handoff_id, message.prompt_token_ids, message.sampling, is_prefill=True, transfer_params=hold
        )
        return future

    def _begin_decode(
        self, handoff_id: str, prompt: list[int], source: KvSource | None, num_more: int
    ) -> asyncio.Future[Any]:
        future = self.decode_legs.expect(handoff_id)
        self.decode.start_decode(
            StartDecode(
                handoff_id=handoff_id,
                request_id=handoff_id,
                prompt_token_ids=pack_token_ids(prompt),
                sampling=_sampling(NUM_OUTPUT_TOKENS - 1 + num_more),
                kv_source=source,
            )
        )
        return future

    def _stream_source(self, handoff_id: str, num_tokens: int) -> KvSource:
        params = self._source | {
            "baton_stream_id": handoff_id,
            "baton_stream_first_token": True,
            "remote_num_tokens": num_tokens,
        }
        return KvSource(lease_s=600.0, num_tokens=num_tokens, num_bytes=0, transfer_params=params)

    def _read_stamps(self, handoff_id: str, timing: Timing) -> None:
        for stamp in self.stamps(WorkerRole.PREFILL, "forward"):
            if stamp["req_id"].rpartition("-")[0] == handoff_id:
                timing.forward_s = stamp["at_s"]
        for stamp in self.stamps(WorkerRole.DECODE, "arrived"):
            if stamp["req_id"].rpartition("-")[0] == handoff_id:
                timing.arrived_s = stamp["at_s"]
        if not timing.forward_s or not timing.arrived_s:
            raise SystemExit(f"{handoff_id}: an engine did not stamp it")

    def stamps(self, role: WorkerRole, what: str) -> list[dict[str, Any]]:
        lines = self._stamps[role].read_text(encoding="utf-8").splitlines()
        return [stamp for line in lines if (stamp := json.loads(line))["what"] == what]


@dataclass(slots=True)
class Rates:
    """MB/s, one per write or copy."""

    write: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)


class BareWriter:
    """`bare_write` in a process of its own, one write and one copy whenever asked."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> BareWriter:
        command = ["-m", "benchmarks.bare_write", "--on-demand", "--layers", str(NUM_LAYERS)]
        command += ["--blocks", str(CHUNK_TOKENS // BLOCK_TOKENS)]
        command += ["--block-kib", str(KV_BYTES_PER_TOKEN * BLOCK_TOKENS // NUM_LAYERS // 1024)]
        command += ["--pool-blocks", str(KV_POOL_BYTES // (KV_BYTES_PER_TOKEN * BLOCK_TOKENS))]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(sys.executable, *command, stdin=pipe, stdout=pipe))

    async def measure(self, rates: Rates, times: int, until: asyncio.Task[None] | None = None) -> None:
        """As often as that, as far apart as chunks are; less often if `until` ends before."""
        for _ in range(times):
            await asyncio.sleep(BARE_WRITE_EVERY_S)
            if until is not None and until.done():
                return
            measured = await self._once()
            rates.write.append(measured["write_mb_per_s"])
            rates.copy.append(measured["memcpy_mb_per_s"])

    async def _once(self) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        async with asyncio.timeout(60.0):
            while not (line := await self._process.stdout.readline()).startswith(b"{"):
                if not line:
                    raise SystemExit("the bare writer has ended")
        measured: dict[str, float] = json.loads(line)
        return measured

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # it ends with that, and so does the process it writes to


def run(plan: Plan, *, repeats: int | None, modes: Sequence[str] | None) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(plan, repeats or plan.repeats, modes or MODES, Path(folder)))


async def _run(plan: Plan, repeats: int, modes: Sequence[str], folder: Path) -> Report:
    report = Report("handoff")
    pair = HandoffPair(folder)
    single: dict[str, list[Timing]] = defaultdict(list)
    several: dict[str, list[list[Timing]]] = defaultdict(list)
    flat: dict[int, list[Timing]] = defaultdict(list)
    bare = await BareWriter.start()
    idle, busy = Rates(), Rates()
    try:
        await pair.start()
        for mode in modes:  # handshakes, connections, kernels
            await pair.hand_off(mode, CHUNK_TOKENS)
        report.busy_before["single"] = quiet_check()
        for _ in range(repeats):
            for mode in modes:
                single[mode].append(await pair.hand_off(mode, MAIN_TOKENS))
            if "chunk" in modes:
                for length in plan.lengths:
                    flat[length].append(await pair.hand_off("chunk", length))
            await bare.measure(idle, NUM_BARE_WRITES)
            prefilling = asyncio.create_task(pair.prefill_alone(MAIN_TOKENS))
            await bare.measure(busy, NUM_BARE_WRITES, until=prefilling)
            await prefilling
        streamed = streamed_mb_per_s(pair)
        for _ in range(plan.concurrent_repeats):
            for mode in modes:
                if mode == "layer":
                    continue
                several[mode].append(
                    list(
                        await asyncio.gather(
                            *[pair.hand_off(mode, plan.concurrent_tokens) for _ in range(CONCURRENCY)]
                        )
                    )
                )
    finally:
        bare.stop()
        await pair.stop()
    judge_single(report, single)
    judge_flat(report, flat, single)
    judge_several(report, several)
    judge_bandwidth(report, streamed, idle, busy)
    report.remarks.append(
        f"{KV_BYTES_PER_TOKEN // 1024} KiB of KV per token, {CHUNK_TOKENS}-token chunks, "
        f"{MAIN_TOKENS} tokens alone, {plan.concurrent_tokens} tokens x {CONCURRENCY} "
        "at once; prefill and decode engine share this machine's cores."
    )
    return report


def judge_single(report: Report, timings: dict[str, list[Timing]]) -> None:
    bars = {
        ("exposed", "chunk", "pull"): Bar("<=", 0.25),
        ("exposed", "chunk", "end"): Bar("<=", 0.4),
        ("second_token", "chunk", "pull"): Bar("<=", 0.6),
        ("prefill", "chunk", "end"): Bar("<=", 1.05),
    }
    for row in ("prefill", "exposed", "first_token", "second_token"):
        values = {mode: [getattr(t, f"{row}_s") for t in runs] for mode, runs in timings.items()}
        for mode, seconds in values.items():
            report.figures.append(
                Figure(row=row, subject=mode, unit="ms", spread=spread([1e3 * value for value in seconds]))
            )
        for mode in ("end", "chunk", "layer"):
            for base in ("pull", "end"):
                if mode in values and base in values and mode != base:
                    report.figures.append(
                        Figure(
                            row=row,
                            subject=f"{mode} / {base}",
                            unit="x",
                            spread=spread(paired_ratios(values[mode], values[base])),
                            bar=bars.get((row, mode, base)),
                        )
                    )


def judge_flat(report: Report, flat: dict[int, list[Timing]], single: dict[str, list[Timing]]) -> None:
    """Exposed time of a long prompt over that of a short one: one chunk is exposed, whatever the length."""
    if not flat:
        return
    by_length = dict(flat) | {MAIN_TOKENS: single["chunk"]}
    for length, timings in sorted(by_length.items()):
        report.figures.append(
            Figure(
                row=f"exposed_{length}",
                subject="chunk",
                unit="ms",
                spread=spread([1e3 * t.exposed_s for t in timings]),
            )
        )
    short, long = min(by_length), max(by_length)
    ratios = paired_ratios([t.exposed_s for t in by_length[long]], [t.exposed_s for t in by_length[short]])
    report.figures.append(
        Figure(
            row="flatness",
            subject=f"chunk {long} / {short} tokens",
            unit="x",
            spread=spread(ratios),
            bar=Bar("<=", 2.0),
            note=f"({long // short} times the KV)",
        )
    )


def judge_several(report: Report, several: dict[str, list[list[Timing]]]) -> None:
    if not several:
        return
    for row in ("exposed", "decode_step", "second_token"):
        for mode, batches in several.items():
            values = [median(getattr(t, f"{row}_s") for t in batch) for batch in batches]
            report.figures.append(
                Figure(
                    row=f"{row}_at_{CONCURRENCY}",
                    subject=mode,
                    unit="ms",
                    spread=spread([1e3 * value for value in values]),
                )
            )
    medians = {
        mode: [median(t.second_token_s for t in batch) for batch in batches]
        for mode, batches in several.items()
    }
    for mode in medians:
        gaps = [
            max(t.second_token_s for t in batch) / median(t.second_token_s for t in batch)
            for batch in several[mode]
        ]
        report.figures.append(
            Figure(
                row=f"worst_gap_at_{CONCURRENCY}",
                subject=f"{mode} / its median",
                unit="x",
                spread=spread(gaps),
                bar=Bar("<=", 2.0) if mode == "chunk" else None,
            )
        )
    if "pull" in medians:
        for mode in ("end", "chunk"):
            if mode in medians:
                report.figures.append(
                    Figure(
                        row=f"second_token_at_{CONCURRENCY}",
                        subject=f"{mode} / pull",
                        unit="x",
                        spread=spread(paired_ratios(medians[mode], medians["pull"])),
                        bar=Bar("<=", 0.6) if mode == "chunk" else None,
                    )
                )


def streamed_mb_per_s(pair: HandoffPair) -> list[float]:
    """Of writes of one chunk."""
    one_chunk = CHUNK_TOKENS // BLOCK_TOKENS * NUM_LAYERS
    return [
        CHUNK_TOKENS * KV_BYTES_PER_TOKEN / stamp["took_s"] / 1e6
        for stamp in pair.stamps(WorkerRole.PREFILL, "write")
        if stamp["num_layer_blocks"] == one_chunk
    ]


def judge_bandwidth(report: Report, streamed: list[float], idle: Rates, busy: Rates) -> None:
    for subject, values in (
        ("memcpy, idle machine", idle.copy),
        ("memcpy, beside the model", busy.copy),
        ("bare NIXL WRITE, idle machine", idle.write),
        ("bare NIXL WRITE, beside the model", busy.write),
        ("streamed writes", streamed),
    ):
        if values:
            report.figures.append(
                Figure(row="bandwidth", subject=subject, unit="MB/s", spread=spread(values))
            )
    if not streamed:
        report.remarks.append("No streamed write was copied by the poster: no bandwidth to compare.")
        return
    for subject, base, bar in (
        ("beside the model", busy.write, Bar(">=", 0.8)),
        ("idle machine", idle.write, None),
    ):
        if base:
            report.figures.append(
                Figure(
                    row="bandwidth",
                    subject=f"streamed / bare NIXL WRITE, {subject}",
                    unit="x",
                    spread=spread([value / median(base) for value in streamed]),
                    bar=bar,
                )
            )


def build_heavy_model(path: Path) -> Path:
    """The demo model's tokenizer with the config of a model of 64 KiB KV per token. No weights of it."""
    build_demo_model(path)
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config |= {
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_KV_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 16384,
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def _sampling(max_tokens: int) -> SamplingSpec:
    return SamplingSpec(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
