"""NVIDIA's aiconfigurator, when it is installed, as if it were a machine that was profiled.

Its tables are asked once for a grid of steps; the answers are fitted like measured ones (`fit_scales`,
`fit_linear`), because its own interpolation is neither monotone nor linear in the context. Written for
aiconfigurator 0.12.0 (Apache-2.0), the last version with this interface; it is not a dependency.
"""

from __future__ import annotations

import importlib
from typing import Any

from baton.step_time.base import StepWork, prefill_pairs
from baton.step_time.fit import Observation

PREFILL_TOKENS = (128, 512, 1_024, 2_048, 4_096, 8_192, 16_000)
DECODES = (1, 4, 16, 64, 128, 256)
CONTEXT_TOKENS = (512, 2_048, 8_192)


class NotInstalled(RuntimeError):
    """aiconfigurator is not there, or not in a version that this module can ask."""


def observations(
    model: str, system: str, tensor_parallel_size: int = 1, *, backend: str = "vllm"
) -> list[Observation]:
    """Steps of `model` (a Hugging Face name) on `system` (`h100_sxm`, `a100_sxm`, ...), from its tables.

    Raises NotInstalled, or ValueError with aiconfigurator's own words for a model or system that it
    does not know.
    """
    handle = _handle(model, system, tensor_parallel_size, backend)
    found = []
    for tokens in PREFILL_TOKENS:
        work = StepWork(num_prefill_tokens=tokens, num_prefill_pairs=prefill_pairs(tokens))
        found.append(_observation(work, handle.predict_prefill_latency(1, tokens), tensor_parallel_size))
    for batch in DECODES:
        for context in CONTEXT_TOKENS:
            work = StepWork(num_decodes=batch, num_context_tokens=batch * context)
            ms = handle.decode_step_latency(batch, context - 1, 2)  # the step's token is the context's last
            found.append(_observation(work, ms, tensor_parallel_size))
    return found


def _observation(work: StepWork, ms: float, tensor_parallel_size: int) -> Observation:
    return Observation(work, ms / 1e3, tensor_parallel_size)


def _handle(model: str, system: str, tensor_parallel_size: int, backend: str) -> Any:
    try:
        engine = importlib.import_module("aiconfigurator_core.sdk.engine")
        compile_engine = engine.EngineHandle.compile
    except (ImportError, AttributeError) as error:
        raise NotInstalled(f"aiconfigurator 0.12 cannot be asked: {error}") from None
    try:
        return compile_engine(model, system, backend, tp_size=tensor_parallel_size)
    except Exception as error:  # whatever its Rust core raises for what it has no tables of
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"aiconfigurator has no {model} on {system} with TP {tensor_parallel_size}: {first_line}"
        ) from None
