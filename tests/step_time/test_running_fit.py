"""Coefficients from a stream of measurements."""

from __future__ import annotations

import random

import pytest

from baton.step_time.running_fit import RunningFit

TRUE = (0.004, 3e-5, 2e-9)


def measured(fit: RunningFit, coefficients, num: int, rng: random.Random, noise: float = 0.0) -> None:
    for _ in range(num):
        tokens = rng.randint(16, 4096)
        terms = (1.0, float(tokens), tokens * (tokens + 1) / 2)
        seconds = sum(c * t for c, t in zip(coefficients, terms, strict=True))
        fit.add(terms, seconds * (1 + rng.uniform(-noise, noise)))


def test_nothing_measured_is_zero():
    assert RunningFit(3).coefficients() == (0.0, 0.0, 0.0)


def test_exact_measurements_give_the_exact_coefficients():
    fit = RunningFit(3)
    measured(fit, TRUE, 200, random.Random(1))
    assert fit.coefficients() == pytest.approx(TRUE, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_noise_stays_small_in_what_is_predicted(seed):
    fit = RunningFit(3)
    measured(fit, TRUE, 1000, random.Random(seed), noise=0.3)
    for tokens in (64, 1024, 4096):
        terms = (1.0, tokens, tokens * (tokens + 1) / 2)
        truth = sum(c * t for c, t in zip(TRUE, terms, strict=True))
        guess = sum(c * t for c, t in zip(fit.coefficients(), terms, strict=True))
        assert guess == pytest.approx(truth, rel=0.35)


@pytest.mark.parametrize("seed", range(20))
def test_no_coefficient_is_ever_negative(seed):
    """Times that fall with the work would ask for a negative slope."""
    rng = random.Random(seed)
    fit = RunningFit(3)
    for _ in range(50):
        tokens = rng.randint(1, 1000)
        fit.add((1.0, float(tokens), float(tokens) ** 2), 1.0 / tokens + rng.random() * 0.01)
    assert all(value >= 0.0 for value in fit.coefficients())


def test_old_measurements_fade():
    fit = RunningFit(3, window=64)
    rng = random.Random(3)
    measured(fit, (0.5, 0.0, 0.0), 200, rng)
    measured(fit, TRUE, 2000, rng)
    assert fit.coefficients()[1] == pytest.approx(TRUE[1], rel=0.01)


def test_spread_is_zero_for_equal_prompts():
    fit = RunningFit(3)
    for _ in range(10):
        fit.add((1.0, 512.0, 512.0 * 513 / 2), 0.1)
    assert fit.spread(1) == pytest.approx(0.0, abs=1e-6)
    fit.add((1.0, 1024.0, 1024.0 * 1025 / 2), 0.2)
    assert fit.spread(1) > 0.2  # mean 558.5, deviation 147
