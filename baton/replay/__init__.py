"""Traces through simulated fleets, in virtual time, decided by the code that decides in production."""

from baton.replay.result import ReplayResult, Slo, Spread, spread
from baton.replay.settings import FleetShape, ReplaySettings, parse_fleet
from baton.replay.simulation import replay

__all__ = [
    "FleetShape",
    "ReplayResult",
    "ReplaySettings",
    "Slo",
    "Spread",
    "parse_fleet",
    "replay",
    "spread",
]
