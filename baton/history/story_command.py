"""`baton story REQUEST_ID`: all that happened to one request, from the records and logs of all processes.

    baton story REQUEST_ID --run DIR

DIR holds the logs of the fleet's processes (`.run` with `baton serve` and the fleet scripts), and the
clients' records where somebody kept them. Processes have to log at level info, the default.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baton.history.reader import BrokenRun
from baton.history.story import story

EXIT_OK, EXIT_FAILED = 0, 1
DEFAULT_RUN = ".run"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="baton story", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request_id", help="as in the x-request-id header")
    parser.add_argument(
        "--run", type=Path, default=Path(DEFAULT_RUN), metavar="DIR", help=f"absent: {DEFAULT_RUN}"
    )
    arguments = parser.parse_args(argv)
    try:
        print(story(arguments.run, arguments.request_id))
    except BrokenPipeError:
        return EXIT_OK
    except (BrokenRun, OSError) as error:
        print(f"baton story: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
