"""Re-makes the rows of docs/results.md: python launch/results.py [ROW ...] [--dry_run]"""

import signal
import sys

from sgan_dist.results import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run saves and ends
    sys.exit(main(sys.argv[1:]))
