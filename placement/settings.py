"""What `baton plan` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.settings import SettingsError, option
from placement.requests import MIN_REQUESTS


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    model: str | None = option(
        None, "model folder with a config.json, a YAML file of its sizes, or a shipped name (Llama-3.1-8B)"
    )
    gpus: str = option("1x8:h100", "NODESxGPUS:NAME, or a YAML file, also for different GPUs per phase")
    network: float | None = option(
        None, "Gbit/s between nodes, per node and direction; absent: each GPU has its own NIC as known"
    )
    nvlink: float | None = option(
        None, "GB/s between two GPUs of a node, one direction; absent: as known for the GPU"
    )
    workload: str | None = option(
        None, "trace file, histogram (num_prompt_tokens,num_output_tokens,count), or PROMPT/OUTPUT lengths "
        "such as lognormal:755,1/lognormal:200,1"
    )  # fmt: skip
    burstiness: float | None = option(
        None, "CV of the gaps between arrivals, 1 is Poisson; absent: as recorded, else Poisson"
    )
    prefix_hits: float | None = option(
        None, "share of prompt tokens found in a prefix cache; absent: what the trace's hashes say at best"
    )
    ttft: float | None = option(None, "longest time to first token, seconds")
    tpot: float | None = option(None, "longest time per output token after the first, seconds")
    attainment: float = option(0.9, "share of requests that must keep both")
    rate: float | None = option(
        None, "requests per second to serve with the fewest GPUs; absent: most per GPU is looked for"
    )
    budget: int | None = option(None, "GPUs that may be used; absent: all of them")
    mode: Literal["joint", "high-affinity", "low-affinity"] = option(
        "joint", "search over everything, or one of DistServe's two algorithms"
    )
    step_times: str = option(
        "roofline",
        "where step times come from: `roofline`, `distserve` (published constants of OPT-13B and OPT-66B), "
        "or files of `baton profile` with commas between them, one per split",
    )
    tensor_parallel_sizes: str | None = option(
        None, "the only ones to try, like 1,2,3,4; absent: powers of two"
    )
    max_pipeline: int = option(4, "most pipeline stages of a worker")
    span_nodes: bool = option(False, "let a pipeline span nodes, which the fleet scripts cannot start")
    num_requests: int = option(MIN_REQUESTS, "per trial; fewer are quicker and less certain")
    seed: int = option(0, "of all draws; the same seed gives the same answer")
    json: bool = option(False, "print JSON instead of a table")
    plot: str | None = option(None, "write the attainment curves to this PNG or SVG", metavar="FILE")
    fleet_file: str | None = option(
        None, "write the chosen placement for scripts/start_fleet.sh", metavar="FLEET.yaml"
    )
    engine: Literal["vllm", "simulated"] = option("vllm", "engine named in the fleet file")

    def __post_init__(self) -> None:
        for name in ("model", "workload"):
            if getattr(self, name) is None:
                raise SettingsError(f"--{name} is missing")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise SettingsError(f"--rate is {self.rate:g} requests/s, expected more than 0")
        for name, least in (("budget", 1), ("max_pipeline", 1), ("num_requests", 200)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
        self.tensor_sizes()
        if self.plot is not None and Path(self.plot).suffix not in (".png", ".svg", ".pdf"):
            raise SettingsError(f"--plot {self.plot}: expected a name ending in .png, .svg or .pdf")

    def tensor_sizes(self) -> tuple[int, ...] | None:
        if self.tensor_parallel_sizes is None:
            return None
        parts = self.tensor_parallel_sizes.split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise SettingsError(
                f"--tensor-parallel-sizes is {self.tensor_parallel_sizes!r}, expected numbers like 1,2,4"
            )
        return tuple(sorted({int(part) for part in parts}))
