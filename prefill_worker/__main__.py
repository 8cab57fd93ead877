"""`python -m prefill_worker` and `baton prefill`."""

from __future__ import annotations

import sys

from baton.settings import load
from prefill_worker.settings import PrefillWorkerSettings
from prefill_worker.worker import run


def main(argv: list[str]) -> int:
    settings = load(PrefillWorkerSettings, argv, prog="baton prefill", description="Runs one prefill worker.")
    return run(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
