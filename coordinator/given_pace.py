"""The fleet's pace as somebody gave it, instead of learning it: `--step-time`.

    PROFILE.json        step times and hand-offs as `baton profile` measured them
    GPU:MODEL[:TP]      the roofline of that GPU, model and tensor-parallel size, for both phases; the
                        hand-off is the link between two GPUs of one node

That is right only for a fleet that is like that, but it is known before the first request.
"""

from __future__ import annotations

from baton.policy.stay_or_go import Pace
from baton.step_time import KvLink, StepTime, StepWork, by_name, gpu_by_name, kv_link, load_shape
from baton.step_time.profile import load_profile


def given_pace(spec: str) -> Pace:
    """Raises ValueError with a sentence."""
    return _of_profile(spec) if spec.endswith(".json") else _of_roofline(spec)


def _of_profile(path: str) -> Pace:
    profile = load_profile(path)
    link = profile.kv_link()
    if link is None:
        raise ValueError(f"{path} holds no hand-offs: nothing says what going costs")
    return _pace(profile.step_time(), link)


def _of_roofline(spec: str) -> Pace:
    gpu, separator, rest = spec.partition(":")
    model, _, ranks = rest.partition(":")
    if not separator or not model:
        raise ValueError(
            f"{spec!r} is neither PROFILE.json nor GPU:MODEL[:TP], for example H100:Llama-3.1-8B"
        )
    if ranks and not ranks.isdigit():
        raise ValueError(f"{spec!r}: {ranks!r} is no tensor-parallel size")
    tensor_parallel_size = int(ranks or 1)
    shape = load_shape(model)
    link = kv_link(gpu_by_name(gpu), is_same_node=True, num_pairs=tensor_parallel_size)
    return _pace(by_name(gpu, shape, tensor_parallel_size), link)


def _pace(step: StepTime, link: KvLink) -> Pace:
    """A hand-off ends with the decode worker's first token, so one of its steps is part of it."""
    return Pace(
        prefill=step,
        decode=step,
        handoff_s=link.latency_s + step.step_s(StepWork(num_decodes=1, num_context_tokens=1)),
        handoff_per_byte_s=1.0 / link.bytes_per_s,
    )
