"""`python -m sgan_dist COMMAND`, the same as `sgan-dist COMMAND`."""

import sys

from sgan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
