"""What `baton profile` prints: the fit, and its errors where it had not looked."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from baton.step_time.profile import MeasuredStep, Profile


def report(profile: Profile, errors: Sequence[tuple[MeasuredStep, float]]) -> str:
    """`errors`: of each step by a fit that was not shown it."""
    lines = [f"{profile.model}, TP {profile.tensor_parallel_size} on {profile.hardware.get('name', '?')}"]
    lines += _fit_lines(profile)
    lines.append("")
    lines.append(f"{'not shown to the fit':<34}{'steps':>6}{'mean':>8}{'worst':>8}{'bias':>8}")
    for name, members in _regions(errors).items():
        sizes = [abs(error) for error in members]
        bias = sum(members) / len(members)
        lines.append(
            f"{name:<34}{len(members):>6}{sum(sizes) / len(sizes):>8.1%}{max(sizes):>8.1%}{bias:>+8.1%}"
        )
    spread = [
        max(step.repeats_s) / min(step.repeats_s) - 1 for step in profile.steps if min(step.repeats_s) > 0
    ]
    lines.append("")
    lines.append(f"repeats of one point differ by {median(spread):.0%} (median), {max(spread):.0%} at most")
    if profile.link is not None:
        rate, latency_ms = profile.link.bytes_per_s / 1e9, profile.link.latency_s * 1e3
        lines.append(f"KV moves at {rate:.2f} GB/s after {latency_ms:.1f} ms, the leg's start included")
    lines.append(f"a prompt costs {profile.leg_overhead_s * 1e3:.1f} ms beside its steps")
    return "\n".join(lines)


def _fit_lines(profile: Profile) -> list[str]:
    fits = profile.fits
    if fits.gpu is not None:
        scales = ", ".join(f"{name} {value:.2f}" for name, value in (fits.scales or {}).items())
        return [f"  roofline of {fits.gpu}, scaled: {scales}"]
    assert fits.prefill is not None and fits.decode is not None
    prompt, decode = fits.prefill, fits.decode
    return [
        f"  prefill step: {prompt.base_s * 1e3:.2f} ms + {prompt.per_prefill_token_s * 1e6:.2f} us/token "
        f"+ {prompt.per_prefill_pair_s * 1e9:.2f} ns/pair",
        f"  decode step:  {decode.base_s * 1e3:.2f} ms + {decode.per_decode_s * 1e6:.1f} us/sequence "
        f"+ {decode.per_context_token_s * 1e9:.1f} ns/token of context",
    ]


def _regions(errors: Sequence[tuple[MeasuredStep, float]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    prompts = sorted(step.num_prefill_tokens for step, _ in errors if step.num_prefill_tokens)
    batches = sorted(step.num_decodes for step, _ in errors if step.num_decodes)
    middle_prompt, middle_batch = median(prompts), median(batches)
    for step, error in errors:
        if step.num_prefill_tokens:
            is_small = step.num_prefill_tokens <= middle_prompt
            name = f"prefill {'up to' if is_small else 'above'} {middle_prompt:.0f} tokens"
        else:
            is_small = step.num_decodes <= middle_batch
            name = f"decode batch {'up to' if is_small else 'above'} {middle_batch:.0f}"
        found.setdefault(name, []).append(error)
    return dict(sorted(found.items(), key=lambda item: item[0].split()[0], reverse=True))
