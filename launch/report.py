"""Writes RUN_DIR/report.html, of a running run too: python launch/report.py RUN_DIR"""

import sys

from sgan_dist.report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
