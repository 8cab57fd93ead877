"""A measured worker as a file: what was measured, on what, and the model fitted to it.

The file keeps the observations, so that a better form can be fitted to old measurements, and says how
well its own fit did on the third it was not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from baton.step_time.base import StepTime, StepWork
from baton.step_time.gpus import gpu_by_name
from baton.step_time.linear import LinearStepTime
from baton.step_time.link import KvLink
from baton.step_time.phased import PhasedStepTime
from baton.step_time.region import Region
from baton.step_time.roofline import Scales, roofline
from baton.step_time.shapes import ModelShape

FORMAT = "baton-profile"
VERSION = 1
"""1 (2026-11): first."""


class ProfileError(ValueError):
    """A sentence: what about the file cannot be used."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what a profile holds: an unknown field is a mistake or a later version, never ignored."""


class MeasuredStep(Part, frozen=True, kw_only=True):
    num_prefill_tokens: int = 0
    num_prefill_pairs: float = 0.0
    num_decodes: int = 0
    num_context_tokens: int = 0
    seconds: float
    """The median of the repeats."""
    repeats_s: list[float]

    @property
    def work(self) -> StepWork:
        return StepWork(
            self.num_prefill_tokens, self.num_prefill_pairs, self.num_decodes, self.num_context_tokens
        )


class MeasuredTransfer(Part, frozen=True, kw_only=True):
    kv_bytes: int
    seconds: float
    """From the order to continue to the first token, without the step that computed it."""
    repeats_s: list[float]


class LinearFit(Part, frozen=True, kw_only=True):
    base_s: float
    per_prefill_token_s: float = 0.0
    per_prefill_pair_s: float = 0.0
    per_decode_s: float = 0.0
    per_context_token_s: float = 0.0

    def step_time(self, num_stages: int) -> LinearStepTime:
        return LinearStepTime(
            base_s=self.base_s,
            per_prefill_token_s=self.per_prefill_token_s,
            per_prefill_pair_s=self.per_prefill_pair_s,
            per_decode_s=self.per_decode_s,
            per_context_token_s=self.per_context_token_s,
            num_stages=num_stages,
        )


class Fits(Part, frozen=True, kw_only=True):
    """`prefill` and `decode`, or `gpu` and `scales`."""

    prefill: LinearFit | None = None
    decode: LinearFit | None = None
    gpu: str | None = None
    scales: dict[str, float] | None = None


class HeldOut(Part, frozen=True, kw_only=True):
    """Relative errors of a fit to two thirds of the steps on the other third."""

    mean_error: float
    worst_error: float
    num_steps: int


class LinkFit(Part, frozen=True, kw_only=True):
    bytes_per_s: float
    latency_s: float


class Profile(Part, frozen=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    model: str
    shape: dict[str, Any]
    """The fields of `ModelShape`."""
    tensor_parallel_size: int
    pipeline_parallel_size: int
    measured_at: str
    hardware: dict[str, str]
    software: dict[str, str]
    settings: dict[str, str]
    """Engine settings that change its times: dtype, block size, largest batch and step."""
    kv_tokens: int
    """What the engine could hold."""
    max_batch_size: int
    max_step_tokens: int
    """Longest prompt that was measured in one step."""
    leg_overhead_s: float
    """Of a prompt beside its steps: into the engine and back."""
    steps: list[MeasuredStep]
    transfers: list[MeasuredTransfer]
    fits: Fits
    held_out: HeldOut
    link: LinkFit | None
    """None: KV was not moved while measuring."""

    def model_shape(self) -> ModelShape:
        return ModelShape(**self.shape)

    def region(self) -> Region:
        prompts = [step.num_prefill_tokens for step in self.steps if step.num_prefill_tokens]
        decodes = [step for step in self.steps if step.num_decodes]
        return Region(
            min_prefill_tokens=min(prompts),
            max_prefill_tokens=max(prompts),
            max_decodes=max(step.num_decodes for step in decodes),
            max_context_tokens=max(-(-step.num_context_tokens // step.num_decodes) for step in decodes),
        )

    def step_time(self) -> StepTime:
        fits, stages = self.fits, self.pipeline_parallel_size
        if fits.gpu is not None:
            scales = Scales(**(fits.scales or {}))
            gpu = gpu_by_name(fits.gpu)
            return roofline(gpu, self.model_shape(), self.tensor_parallel_size, stages, scales=scales)
        assert fits.prefill is not None and fits.decode is not None
        return PhasedStepTime(
            prefill=fits.prefill.step_time(stages),
            decode=fits.decode.step_time(stages),
            region=self.region(),
        )

    def kv_link(self) -> KvLink | None:
        if self.link is None:
            return None
        return KvLink(bytes_per_s=self.link.bytes_per_s, latency_s=self.link.latency_s)


def save_profile(profile: Profile, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def load_profile(path: str | Path) -> Profile:
    """Raises ProfileError: no such file, not a profile, of another version, or it contradicts itself."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from None
    try:
        head = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ProfileError(f"{path} is not JSON: {error}") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ProfileError(f"{path} is not a profile written by `baton profile`")
    if head.get("version") != VERSION:
        raise ProfileError(f"{path} is a profile of version {head.get('version')}, this is for {VERSION}")
    try:
        profile = msgspec.convert(head, Profile)
        _check(profile)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise ProfileError(f"{path}: {error}") from None
    return profile


def _check(profile: Profile) -> None:
    has_linear = profile.fits.prefill is not None and profile.fits.decode is not None
    if has_linear == (profile.fits.gpu is not None):
        raise ValueError("fits holds neither prefill and decode nor a gpu with scales, or both")
    for phase in ("prefill", "decode"):
        if not any(bool(step.num_decodes) == (phase == "decode") for step in profile.steps):
            raise ValueError(f"no {phase} step was measured")
    for step in profile.steps:
        if not step.seconds > 0:
            raise ValueError(f"a measured step took {step.seconds:g} s, expected more than 0")
    profile.model_shape().check_parallel(profile.tensor_parallel_size, profile.pipeline_parallel_size)
    profile.step_time()
    profile.kv_link()
