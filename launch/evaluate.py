"""Evaluates a run's classifier: python launch/evaluate.py RUN_DIR --split test"""

import sys

from sgan_dist.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
