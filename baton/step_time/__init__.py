"""How long an engine step takes: one model for the simulated engine, the router and the planner."""

from baton.step_time.base import StepTime, StepWork, prefill_pairs
from baton.step_time.gpus import GpuSpec, gpu_by_name
from baton.step_time.linear import LinearStepTime
from baton.step_time.link import KvLink, kv_link
from baton.step_time.memory import kv_tokens_that_fit
from baton.step_time.region import Region
from baton.step_time.roofline import RooflineStepTime, Scales, by_name, roofline
from baton.step_time.shapes import ModelShape, UnsupportedShape, load_shape, shape_by_name

__all__ = [
    "GpuSpec",
    "KvLink",
    "LinearStepTime",
    "ModelShape",
    "Region",
    "RooflineStepTime",
    "Scales",
    "StepTime",
    "StepWork",
    "UnsupportedShape",
    "by_name",
    "gpu_by_name",
    "kv_link",
    "kv_tokens_that_fit",
    "load_shape",
    "prefill_pairs",
    "roofline",
    "shape_by_name",
]
