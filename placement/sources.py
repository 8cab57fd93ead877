"""Where step times come from: the roofline, constants that DistServe published, or measured profiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
from baton.step_time.profile import Profile, ProfileError, load_profile
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


@dataclass(frozen=True)
class ProfileSource:
    """What `baton profile` measured, one file per split; other splits are not known and not tried."""

    profiles: tuple[Profile, ...]

    @cached_property
    def by_split(self) -> dict[Split, Profile]:
        return {Split(p.tensor_parallel_size, p.pipeline_parallel_size): p for p in self.profiles}

    @property
    def name(self) -> str:
        return f"{self.profiles[0].model}, measured for {', '.join(map(str, self.by_split))}"

    @property
    def kv_bytes_per_token(self) -> float:
        return self.profiles[0].model_shape().kv_bytes_per_token

    @property
    def error_band(self) -> float | None:
        """The worst held-out step of all files."""
        return max(profile.held_out.worst_error for profile in self.profiles)

    def step_time(self, split: Split) -> StepTime | None:
        profile = self.by_split.get(split)
        return None if profile is None else profile.step_time()

    def kv_tokens(self, split: Split) -> int:
        profile = self.by_split.get(split)
        return 0 if profile is None else profile.kv_tokens


def profile_source(paths: str) -> ProfileSource:
    """Files with commas between them. Raises ProfileError."""
    profiles = tuple(load_profile(path.strip()) for path in paths.split(","))
    if len({profile.model for profile in profiles}) > 1:
        models = ", ".join(sorted({profile.model for profile in profiles}))
        raise ProfileError(f"the profiles are of different models: {models}")
    source = ProfileSource(profiles)
    if len(source.by_split) < len(profiles):
        raise ProfileError(f"{len(profiles)} profiles, but only {len(source.by_split)} different splits")
    return source
