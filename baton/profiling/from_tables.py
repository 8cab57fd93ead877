"""A profile from aiconfigurator's tables instead of a measurement: the same file, another provenance."""

from __future__ import annotations

import datetime
import importlib.metadata
from dataclasses import asdict

from baton.step_time import ModelShape, gpu_by_name, kv_tokens_that_fit
from baton.step_time.aiconfigurator import DECODES, observations
from baton.step_time.profile import MeasuredStep, Profile
from baton.step_time.profile_fit import Fitted, fit_steps


def profile_from_tables(
    model: str, system: str, shape: ModelShape, tensor_parallel_size: int
) -> tuple[Profile, Fitted]:
    """`model`: a Hugging Face name; `system`: as aiconfigurator and our GPUs both call it (`h100_sxm`).

    Raises NotInstalled, or ValueError with a sentence."""
    gpu = gpu_by_name(system)
    steps = [
        MeasuredStep(**item.work._asdict(), seconds=item.seconds, repeats_s=[item.seconds])
        for item in observations(model, system, tensor_parallel_size)
    ]
    fitted = fit_steps(steps, shape=shape, tp=tensor_parallel_size, pp=1, gpu=gpu.name)
    profile = Profile(
        model=model,
        shape=asdict(shape),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=1,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware={"device": "cuda", "name": f"aiconfigurator's tables of {system}"},
        software={
            "engine": "vllm, as in the tables",
            "aiconfigurator-core": importlib.metadata.version("aiconfigurator-core"),
        },
        settings={"dtype": "bfloat16"},
        kv_tokens=kv_tokens_that_fit(gpu, shape, tensor_parallel_size),
        max_batch_size=max(DECODES),
        max_step_tokens=max(step.num_prefill_tokens for step in steps),
        leg_overhead_s=0.0,
        steps=steps,
        transfers=[],
        fits=fitted.fits,
        held_out=fitted.held_out,
        link=None,
    )
    return profile, fitted
