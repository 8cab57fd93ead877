"""Where step times come from: the roofline, or constants that DistServe published."""

from __future__ import annotations

from dataclasses import dataclass

from baton.step_time import (
    GpuSpec,
    ModelShape,
    StepTime,
    UnsupportedShape,
    gpu_by_name,
    kv_tokens_that_fit,
    roofline,
    shape_by_name,
)
from baton.step_time.distserve import CONSTANTS, KV_TOKENS, distserve
from placement.cluster import Split


@dataclass(frozen=True, slots=True)
class RooflineSource:
    """Data sheets and the shares of them that kernels reach; see docs/step-time.md."""

    gpu: GpuSpec
    shape: ModelShape

    @property
    def name(self) -> str:
        return f"{self.shape.name} on {self.gpu.name}, roofline"

    @property
    def kv_bytes_per_token(self) -> float:
        return self.shape.kv_bytes_per_token

    @property
    def error_band(self) -> float | None:
        return self.gpu.error_band

    def step_time(self, split: Split) -> StepTime | None:
        try:
            return roofline(self.gpu, self.shape, split.tensor, split.pipeline)
        except UnsupportedShape:
            return None

    def kv_tokens(self, split: Split) -> int:
        try:
            return kv_tokens_that_fit(self.gpu, self.shape, split.tensor, split.pipeline)
        except UnsupportedShape:
            return 0


@dataclass(frozen=True, slots=True)
class DistServeSource:
    """OPT-13B and OPT-66B on A100-80G, as published with the paper's artifact. Splits without constants
    are left out; KV capacities that its table lacks are computed from the shape."""

    model: str

    @property
    def name(self) -> str:
        return f"{self.model} on a100-80g-sxm, DistServe's constants"

    @property
    def kv_bytes_per_token(self) -> float:
        return shape_by_name(self.model).kv_bytes_per_token

    @property
    def error_band(self) -> float | None:
        return None

    def step_time(self, split: Split) -> StepTime | None:
        if (self.model, split.tensor) not in CONSTANTS:
            return None
        return distserve(self.model, split.tensor, split.pipeline)

    def kv_tokens(self, split: Split) -> int:
        known = KV_TOKENS[self.model].get((split.tensor, split.pipeline))
        if known is not None:
            return known
        try:
            shape = shape_by_name(self.model)
            return kv_tokens_that_fit(gpu_by_name("a100"), shape, split.tensor, split.pipeline)
        except UnsupportedShape:
            return 0


def distserve_source(model: str, gpu: GpuSpec) -> DistServeSource:
    """Raises ValueError for a model or GPU that it does not cover."""
    names = {name.lower(): name for name, _ in CONSTANTS}
    name = names.get(model.rpartition("/")[2].lower())
    if name is None or gpu.name != "a100-80g-sxm":
        raise ValueError(
            f"DistServe's constants cover {', '.join(sorted(set(names.values())))} on a100-80g-sxm, "
            f"not {model} on {gpu.name}"
        )
    return DistServeSource(name)
