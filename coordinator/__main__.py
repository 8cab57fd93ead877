"""`python -m coordinator` and `baton coordinator`."""

from __future__ import annotations

import sys

from baton.settings import load
from coordinator.process import run_coordinator
from coordinator.settings import CoordinatorSettings


def main(argv: list[str]) -> int:
    settings = load(CoordinatorSettings, argv, prog="baton coordinator", description="Runs the coordinator.")
    return run_coordinator(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
