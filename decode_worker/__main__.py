"""`python -m decode_worker` and `baton decode`."""

from __future__ import annotations

import sys

from baton.settings import load
from decode_worker.settings import DecodeWorkerSettings
from decode_worker.worker import run


def main(argv: list[str]) -> int:
    settings = load(DecodeWorkerSettings, argv, prog="baton decode", description="Runs one decode worker.")
    return run(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
